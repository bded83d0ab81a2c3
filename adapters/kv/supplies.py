"""Supplies of a language model: inputs that its sites hand over, and modules that read the stream behind attentions."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.adapters.contract import members, words
from tokred.adapters.swap import host_class

if TYPE_CHECKING:
    from tokred.adapters.kv.rehearsal import Rehearsal


def projection(attention: Any) -> str | None:
    return next((n for n in words.OUTPUT.names if isinstance(getattr(attention, n, None), nn.Module)), None)


def norms(decoder: nn.Module, found: dict[int, tuple[str, nn.Module]]) -> dict[int, tuple[nn.Module, nn.Module] | None]:
    """For each layer the decoder layer, and the module that reads the stream after the attention."""
    config = words.CONFIG.need(decoder)
    if words.PARALLEL.part(config, False) or words.ABREAST.part(config, 0):
        # The norm reads the stream before the attention, or layers read several streams and it reads one.
        return dict.fromkeys(found)
    around = {id(child): m for m in decoder.modules() for child in m.children()}
    pairs: dict[int, tuple[nn.Module, nn.Module] | None] = {}
    for i, (_, attention) in found.items():
        layer = around.get(id(attention))
        reader = None if layer is None else _after_attention(layer)
        pairs[i] = None if layer is None or reader is None else (layer, reader)
    return pairs


def _after_attention(layer: Any) -> nn.Module | None:
    """The module whose input is the stream with the attention added."""
    if words.NORM_OF_MLP.on(layer):
        word = words.NORM_OF_MLP
    elif words.NORM_BEHIND_MLP.on(layer):
        word = words.MLP  # norms stand behind attention and MLP, which reads the stream itself
    else:
        word = words.NORM_BEHIND
    found = word.part(layer)
    return found if isinstance(found, nn.Module) else None


def supplies(
    decoder: Any, found: dict[int, tuple[str, nn.Module]], compressed: tuple[int, ...], rehearsal: Rehearsal
) -> set[str]:
    from tokred.adapters.kv.rope import of_one_number, turned_channels

    supplied = {"q", "k", "v"}
    if all(words.STATES.among(inspect.signature(host_class(m).forward).parameters) for _, m in found.values()):
        supplied |= {"hidden", "module"}
    if all(projection(m) is not None for _, m in found.values()):
        supplied.add("projection")
    attention: Any = found[compressed[0] if compressed else next(iter(found))][1]
    head_dim = words.HEAD_WIDTH.part(attention)
    turns = all(rehearsal.turns(found[i][1]) for i in compressed)
    turned = turned_channels(decoder, attention) if head_dim is not None and turns else 0
    if 0 < turned <= int(head_dim or 0):
        supplied |= {"rotation", "rope"} if turned == head_dim else {"rotation"}
    # Tokens run again by themselves where every layer keeps rows of all, and positions are one number a token.
    asked = inspect.signature(host_class(decoder).forward).parameters
    every = len(compressed) == words.DEPTH.need(words.CONFIG.need(decoder)) and "module" in supplied
    if every and of_one_number(decoder) and words.POSITIONS.among(asked) and members.EMBED.on(decoder):
        supplied.add("again")
    return supplied
