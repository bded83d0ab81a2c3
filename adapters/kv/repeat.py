"""Forwards that repeat the context, for scores that are known only after them; they leave nothing in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import arguments, cache_name, members, words
from tokred.adapters.contract.spelling import Word
from tokred.adapters.kv.cache import TokCache
from tokred.adapters.kv.given import padding_in
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.swap import host_class
from tokred.kv.repeat import CONTEXT, Piece, Probe, pieces, tokens_of


def repeat(module: nn.Module, given: dict[str, Any], cache: TokCache) -> None:
    """After a decoder's forward: note its tokens, and feed all noted ones again where layers wait for their score.

    The passes run the decoder's own forward, without its hooks, and without the head behind it. Their tokens stand
    right behind the last ones.

    Args:
        module: the decoder.
        given: arguments of the forward that has just ended, by name.
        cache: of that forward.
    """
    engine = cache.engine
    repeats = engine.repeats
    if repeats is None or engine.probe is not None:
        return
    holder = next((layer for layer in words.LAYERS.need(cache) if isinstance(layer, TokLayer)), None)
    if holder is None or not engine.records(holder.clock, holder.seen):
        return
    embed: Callable[[Tensor], Tensor] = members.EMBED.need(module)()
    context = _joined(holder.notes.pop(CONTEXT, None), given, embed)
    site = engine.waiting
    if site is None:
        # Nothing waits for its score yet: more of the prompt is to come, or nothing has to go.
        holder.notes[CONTEXT] = context
        return
    recorded, mask = context.shape[1], padding_in(words.ATTENTION_MASK.of(given))
    seen = members.LENGTH.need(cache)()
    real = context.new_ones(context.shape[:2], dtype=torch.bool)
    if site.padding is not None:
        real = site.padding.mask[:, -recorded:].to(context.device)
    probe = engine.probe = Probe(repeats, recorded)
    before = cache.snapshot()
    try:
        for piece in pieces(repeats, real, site.lengths):
            probe.piece = piece
            tokens, meant = tokens_of(piece, context, embed)
            _feed(module, given, cache, tokens, _mask(mask, meant, tokens, seen), piece)
            cache.restore_layers(before)
    finally:
        engine.probe = None
        cache.restore_layers(before)
    engine.judged(probe)


def _joined(noted: Tensor | None, given: dict[str, Any], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The noted tokens and those of this forward: ids ``[B, R]``, or embeddings ``[B, R, C]`` if any were given so."""
    ids: Tensor | None = words.INPUT_IDS.of(given)
    new: Tensor = words.EMBEDS.at(given) if ids is None else ids
    new = new.detach()
    if noted is None:
        return new.clone() if new.ndim == 2 else new
    if noted.ndim != new.ndim:
        noted, new = (embed(t) if t.ndim == 2 else t for t in (noted, new))
    return torch.cat([noted, new], 1)


def _mask(mask: Any, meant: Tensor | None, tokens: Tensor, seen: int) -> Tensor | None:
    """``[B, L]`` for the slots so far and those of the pass; None where all are real."""
    if mask is None and meant is None:
        return None
    b, m = tokens.shape[:2]
    if mask is None:
        mask = torch.ones(b, seen, dtype=torch.int64, device=tokens.device)
    new = mask.new_ones(b, m) if meant is None else meant.to(mask.dtype)
    return torch.cat([mask[:, :seen], new], 1)


def _feed(
    module: Any, given: dict[str, Any], cache: TokCache, tokens: Tensor, mask: Tensor | None, piece: Piece
) -> None:
    forward = host_class(module).forward
    new: dict[Word, Any] = {
        words.INPUT_IDS if tokens.ndim == 2 else words.EMBEDS: tokens,
        words.ATTENTION_MASK: mask,
        words.CACHED: True,
    }
    positions = words.POSITIONS.of(given)
    if positions is not None:
        last = positions.amax(-1, keepdim=True)
        if last.ndim == 3 and len(last) > 2:
            # Several axes: text goes on behind the furthest of them, wherever an image has left the others.
            last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand(3, -1, -1)])
        new[words.POSITIONS] = last + 1 + torch.arange(tokens.shape[1], device=last.device)
    new = {word: value for word, value in new.items() if value is not None}
    module.forward(**arguments(forward, new), **{cache_name(forward): cache})
