"""Queries and keys of a decoder layer, for the rows that a method asks for: by the layer's own norm, projections and
rotary function, so that any attention kernel can run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.swap import host_class
from tokred.adapters.vlm.columns import gather_columns
from tokred.core.attention import Attention
from tokred.kernels.dispatch import without_autocast

if TYPE_CHECKING:
    from transformers import Cache


class Input(NamedTuple):
    """Input of a decoder layer, and whatever its queries, keys and values are made with.

    Attributes:
        layer: the layer.
        x: ``(B, L, C)``.
        tables: cosines and sines ``(B or 1, L, D)``; None where the host handed the layer none.
        cache: of the forward, or None.
        past: rows that the layer's cache held before.
        mask: ``(B, past + L)`` bool, or None.
        autocast: whether the layer runs under autocast; methods decide outside of it.
    """

    layer: Any
    x: Tensor
    tables: tuple[Tensor, Tensor] | None
    cache: Cache | None
    past: int
    mask: Tensor | None
    autocast: bool = False


_PROJECTIONS = {"q": words.QUERY, "k": words.KEY, "v": words.VALUE}
_NORMS = {"q": words.QUERY_NORM, "k": words.KEY_NORM}


def attention_of(layer: Any) -> Any:
    """The attention module of a decoder layer."""
    return words.ATTENTION.part(layer)


def norm_behind_attention(layer: Any) -> Any:
    """The norm before a decoder layer's MLP; None where it has none of a known name."""
    return words.NORM_OF_MLP.part(layer, words.NORM_BEHIND.part(layer))


def supplies_rows(layer: Any) -> bool:
    """True where queries and keys of this decoder layer can be made as the layer makes them: by a norm before the
    attention, separate projections, and a rotary function of whole heads."""
    attention = attention_of(layer)
    norm = words.NORM_BEFORE.part(layer)
    if attention is None or not isinstance(norm, nn.Module):
        return False
    if not all(isinstance(word.part(attention), nn.Module) for word in _PROJECTIONS.values()):
        return False
    head_dim = words.HEAD_WIDTH.part(attention)
    for norm in _NORMS.values():
        # OLMo 2 norms all heads together before it splits them: what its layer does there is not repeated here.
        weight = getattr(norm.part(attention), "weight", None)
        if weight is not None and weight.shape[-1] != head_dim:
            return False
    return head_dim is not None and _rotary(attention) is not None


def _rotary(attention: Any) -> Any:
    # Each family's module has its own function of this name (Cohere interleaves, others rotate halves).
    return words.TURN.part(sys.modules[host_class(attention).__module__])


def _project(given: Input, which: str, first: int = 0, end: int | None = None) -> Tensor:
    """``(B, H, M, D)`` rotated queries or keys, or the values, of some columns."""
    # A method decides outside of autocast, but these have to be what the layer itself computes under it.
    kind = given.x.device.type
    cast = torch.autocast(kind, torch.get_autocast_dtype(kind)) if given.autocast else without_autocast(given.x)
    with cast:
        return _projected(given, which, first, end)


def _projected(given: Input, which: str, first: int, end: int | None) -> Tensor:
    attention = attention_of(given.layer)
    x = words.NORM_BEFORE.need(given.layer)(given.x[:, first:end])
    heads: Tensor = _PROJECTIONS[which].need(attention)(x).view(*x.shape[:2], -1, words.HEAD_WIDTH.need(attention))
    norm = _NORMS[which].part(attention) if which in _NORMS else None
    if norm is not None:
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    if which == "v":
        return heads
    assert given.tables is not None  # hosts with a rotary function hand its tables to every layer
    cos, sin = (t[:, first:end] for t in given.tables)
    turned: Tensor = _rotary(attention)(heads, heads, cos, sin)[0]
    return turned


def values_of(given: Input) -> Tensor:
    """``(B, Hk, L, D)`` values of the layer's own input."""
    return _project(given, "v")


def heads_of(given: Input, *, ran: bool) -> Attention:
    """Attention of a layer, whose queries are made as they are asked for.

    Args:
        given: its input.
        ran: whether it has run already, so that its cache holds the keys.
    """
    attention = attention_of(given.layer)

    def keys() -> Tensor:
        # After the layer has run its cache holds the new keys; before, at most those of earlier turns. A cache of which
        # a policy has evicted rows holds other columns than the layer is given: then only the new ones are judged.
        held = _held(given, words.LAYER_INDEX.need(attention))
        if ran and held is not None and held.shape[2] == given.past + given.x.shape[1]:
            return held
        new = _project(given, "k")
        if ran or held is None or given.past == 0 or held.shape[2] != given.past:
            return new
        return torch.cat([held, new], 2)

    def queries(first: int, end: int) -> Tensor:
        return _project(given, "q", first, end)

    found = keys()
    past = found.shape[2] - given.x.shape[1]
    # The mask is of all rows that the layer should hold; a sliding layer holds the newest of them alone.
    mask = given.mask
    if mask is not None:
        mask = mask[:, mask.shape[1] - found.shape[2] :]
        if mask.shape[1] < found.shape[2]:
            mask = torch.nn.functional.pad(mask, (past, 0), value=True)
    return Attention(
        queries,
        found,
        scale=words.SCALE.part(attention),
        softcap=words.CAP.part(attention),
        window=words.WINDOW.part(attention),
        mask=mask,
        causal=True,
        offset=past,
    )


def _held(given: Input, index: int) -> Tensor | None:
    """Keys of the layer's cache, where its rows are the layer's columns."""
    layers = words.LAYERS.part(given.cache)
    if layers is None or index >= len(layers):
        return None
    layer = layers[index]
    # Keys of a compressed or quantised cache cannot be read as they are.
    if getattr(layer, "compressed", False) or words.PACKED.on(layer):
        return None
    keys = words.KEYS.part(layer)
    return keys if isinstance(keys, Tensor) and keys.ndim == 4 else None


class LayerCount(NamedTuple):
    """Tokens at the input of one decoder layer: the columns it ran on, and the real and visual ones of each sample."""

    columns: int
    real: tuple[int, ...]
    visual: tuple[int, ...]


class Step:
    """Tokens that are left from one layer on.

    Attributes:
        columns: ``(B, M)`` which of layer 0's columns of this forward.
        valid: ``(B, M)`` bool, False on filler.
        visual: ``(B, M)`` bool.
        real, counts: real and visual tokens of each sample.
        ragged: whether any is filler or padding.
    """

    def __init__(
        self, columns: Tensor, valid: Tensor, visual: Tensor, real: tuple[int, ...], counts: tuple[int, ...]
    ) -> None:
        self.columns = columns
        self.valid = valid
        self.visual = visual
        self.real = real
        self.counts = counts
        self.ragged = min(real) < columns.shape[1]
        self._moved: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def move(self, value: Any, dim: int) -> Any:
        """``value`` (a tensor, or a tuple of them) at the columns that are left, made once for all layers."""
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(self.move(one, dim) for one in value)
        # Hosts hand the same tables and positions to every layer. The value is held, so that its id stays its own.
        key = (id(value), dim)
        if key not in self._moved:
            self._moved[key] = (value, gather_columns(value, self.columns, dim))
        return self._moved[key][1]
