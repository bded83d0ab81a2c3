"""Tokens whose rows have left a cache, and which are computed again from their ids before the newest token runs.

They run through the decoder as a forward of their own, at their true positions: each sees the rows that are held of
tokens before it, and those that come back with it. Then the newest token sees them all. That is what one forward of all
of them would compute, since none of them sees the newest token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import arguments, cache_name, members, words
from tokred.adapters.contract.spelling import Word
from tokred.adapters.kv.cache import TokCache, layers_of
from tokred.adapters.kv.given import padding_in
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.products import attend
from tokred.adapters.kv.seat import Call
from tokred.adapters.swap import host_class
from tokred.errors import TokenStateError
from tokred.kernels.decode_attention import SENTINEL, visible_positions
from tokred.kernels.gather_rows import gather_rows
from tokred.kv.release import returning
from tokred.kv.repeat import CONTEXT

if TYPE_CHECKING:
    from tokred.adapters.kv.hooks import CacheSettings

# Of a cache: positions ``[B, N]`` of all tokens, as the model was given them.
_POSITIONS = "positions"
# Of the forward that is running: slots ``[B, r]`` of what comes back, and which of all slots are real.
COMING, REAL = "coming", "real"


def oversee(settings: CacheSettings, module: nn.Module, given: dict[str, Any], cache: TokCache) -> None:
    """Before a decoder's forward: let the score judge all tokens so far, and compute some again that it wants back.

    Args:
        settings: of the model.
        module: the decoder.
        given: arguments of the forward, by name.
        cache: of it.

    Raises:
        TokenStateError: a forward has broken off after its tokens were judged.
    """
    score = cache.engine.parts.score
    if score.returns is None:
        return
    holder = next(layer for layer in layers_of(cache) if isinstance(layer, TokLayer))
    embed: Callable[[Tensor], Tensor] = members.EMBED.need(module)()
    ids: Tensor | None = words.INPUT_IDS.of(given)
    # One judgement for all layers, so that it is noted in one of them.
    seen, notes = holder.seen, holder.notes
    new: Tensor = words.EMBEDS.at(given) if ids is None else ids
    if seen != (0 if CONTEXT not in notes else notes[CONTEXT].shape[1]):
        raise TokenStateError(
            "the cache has judged other tokens than its layers have seen: a forward broke off. Restore a snapshot, or "
            "start from an empty cache"
        )
    mask = padding_in(words.ATTENTION_MASK.of(given))
    b, m = new.shape[:2]
    real = None if mask is None else mask[:, : seen + m].bool()
    learned = settings.learn()
    with torch.no_grad():
        x = embed(new) if new.ndim == 2 else new
        sigma = score.foresee(learned, x, notes, None if real is None else real[:, seen:])
        notes[CONTEXT] = _joined(notes.get(CONTEXT), new.detach(), embed)
        places = _positions(given, seen, m, b, new.device)
        notes[_POSITIONS] = torch.cat([notes[_POSITIONS], places], 1) if _POSITIONS in notes else places
        if m == 1 and seen and score.returns and not learned.training:
            _bring(settings, module, cache, holder, sigma, real)


def _joined(noted: Tensor | None, new: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Ids ``[B, N]`` of all tokens, or embeddings ``[B, N, C]`` if any were given so."""
    if noted is None:
        return new
    if noted.ndim != new.ndim:
        noted, new = (embed(t) if t.ndim == 2 else t for t in (noted, new))
    return torch.cat([noted, new], 1)


def _positions(given: dict[str, Any], seen: int, m: int, b: int, device: torch.device) -> Tensor:
    """``[B, M]`` int64 as the forward was given them, or as the model counts."""
    found: Tensor | None = words.POSITIONS.of(given)
    if found is None:
        return torch.arange(seen, seen + m, device=device).expand(b, -1)
    return found.to(device).expand(b, -1)


def _bring(
    settings: CacheSettings, module: nn.Module, cache: TokCache, holder: TokLayer, sigma: Tensor, real: Tensor | None
) -> None:
    """Compute the most important of the released tokens again; their rows stand in all layers until the policy acts.

    Args:
        settings, module, cache: as :func:`oversee` has them.
        holder: the first layer; all hold the same tokens.
        sigma: ``[B, N]`` importance.
        real: ``[B, N]`` bool, False on padding; None: all are tokens.
    """
    slots, seen, notes = holder.slots, holder.seen, holder.notes
    if slots is None:
        return  # nothing has left yet
    held = torch.zeros(len(slots), seen + 1, dtype=torch.bool, device=slots.device)
    # Empty rows have a slot that no token has; they go to a column that is cut off.
    released = ~held.scatter(1, slots[:, 0].long().clamp(max=seen), True)[:, :seen]
    if real is not None:
        released = released & real[:, :seen]
    score = cache.engine.parts.score
    assert score.returns is not None  # asked before
    found = returning(sigma[:, :seen], released, score.returns)
    if found is None:
        return
    index, meant = found
    context: Tensor = notes[CONTEXT]
    tokens = context.gather(1, index) if context.ndim == 2 else gather_rows(context, index)
    new: dict[Word, Any] = {
        words.INPUT_IDS if tokens.ndim == 2 else words.EMBEDS: tokens,
        words.POSITIONS: notes[_POSITIONS].gather(1, index),
        words.CACHED: True,
    }
    forward, before = host_class(module).forward, cache.snapshot()
    settings.shared[COMING] = index.masked_fill(~meant, SENTINEL).int()
    settings.shared[REAL] = real
    try:
        module.forward(**arguments(forward, new), **{cache_name(forward): cache})
    except BaseException:
        cache.restore_layers(before)
        raise
    finally:
        del settings.shared[COMING], settings.shared[REAL]
    for layer in layers_of(cache):
        layer.sort()


def returned(call: Call, layer: TokLayer, query: Tensor, coming: Tensor, real: Tensor | None) -> Tensor:
    """``[B, r, H, D]``: attention of tokens that come back, whose rows are the newest of the layer.

    Args:
        call: of the attention function.
        layer: that they have been added to, as if they were the next ones.
        query: ``[B, H, r, D]``.
        coming: ``[B, r]`` int32 slots, ``SENTINEL`` where a sample has fewer.
        real: ``[B, N]`` bool by slot, False on padding; None: all are tokens.
    """
    layer.place(coming)
    key, value, slots = *layer.newest, layer.slots
    assert slots is not None  # something has left, or nothing would come back
    seen = visible_positions(slots, None, real)[:, :, None] & (slots[:, :, None] <= coming[:, None, :, None])
    return attend(query, key, value, seen, None, call.scaling, call.softcap, call.dropout, call.sinks)
