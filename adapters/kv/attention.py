"""The attention function: attend over all rows, then let the policy act."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import attention_of, host_object, members, terms, words
from tokred.adapters.kv.across import across
from tokred.adapters.kv.again import COMING, REAL, returned
from tokred.adapters.kv.latents import LatentSite, carried, expanded
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.masks import MaskSpec, mask_function
from tokred.adapters.kv.products import attend as attend
from tokred.adapters.kv.products import stock
from tokred.adapters.kv.seat import PREFIX as PREFIX
from tokred.adapters.kv.seat import SEAT as SEAT
from tokred.adapters.kv.seat import Call
from tokred.adapters.kv.seat import Seat as Seat
from tokred.adapters.kv.sharing import Lent
from tokred.errors import UnsupportedModelError
from tokred.kernels.decode_attention import decode_attention
from tokred.kernels.dispatch import of_one_type
from tokred.kv.queue import Queue
from tokred.kv.site import CacheSite
from tokred.kv.stores import Query


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that is registered with transformers; arguments and result as it defines them.

    Raises:
        UnsupportedModelError: the module does not hand its arguments on, or is used in a way that is not known.
    """
    seat: Seat | None = options.pop(SEAT, None)
    layer = None if seat is None else seat.layer
    asked = bool(dropout) or not _MORE.isdisjoint(options)
    if seat is not None and seat.light and layer is not None and not asked and _fits(layer, query, key, attention_mask):
        return _light(Call(module, attention_mask, seat, scaling, dropout, options), layer, query, key, value)
    if words.CACHE_OF_A_BATCH.of(options) is not None:
        raise UnsupportedModelError("continuous batching keeps a cache of its own: call tokred.remove(model) first")
    if seat is None or layer is None:
        # No cache, a layer that is not compressed, drafts, or another model that shares the configuration.
        name = attention_of(words.CONFIG.need(module)).removeprefix(PREFIX)
        mask = attention_mask
        if isinstance(mask, MaskSpec):  # a query that sees all rows needs none, however many these are
            mask = None if mask.light else mask.stock(name)
        return stock(module, name, query, key, value, mask, scaling, dropout, options)
    if seat.crosses:
        plain = attention_mask is None or isinstance(attention_mask, MaskSpec)
        if not plain or words.EXTRA_BIAS.of(options) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} gave the attention a mask of its own for the encoder")
        return across(Call(module, attention_mask, seat, scaling, dropout, options), layer, query, attention_mask)
    if not seat.borrows:
        layer.waiting = False
        rows, made = layer.newest[0].shape, key.shape
        if key is not layer.newest[0] and (rows[:3] != made[:3] if not seat.latents else rows[2] != made[2]):
            raise UnsupportedModelError(f"{type(module).__name__} attends to other keys than its cache holds")
    if not isinstance(attention_mask, MaskSpec) or words.EXTRA_BIAS.of(options) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} gave the attention a mask of its own, which evicted rows do not fit"
        )
    call = Call(module, attention_mask, seat, scaling, dropout, options)
    if seat.borrows:
        return _borrow(call, layer, query)
    if seat.learned is not None and COMING in seat.learned.shared:
        return returned(call, layer, query, *(seat.learned.shared[name] for name in (COMING, REAL))), None
    before = layer.seen - query.shape[2]
    engine = layer.engine
    # A policy that does not watch what is there will not watch what comes.
    watched = not seat.rests and engine.watches(layer.clock, before)
    cut = engine.ends_prompt(layer.clock, before, layer.seen) if watched else None
    if cut is None:
        return _attend_and_act(call, layer, query, key, value, before)
    # The prompt's last forward also holds drafts: the prompt attends, votes and is compressed as if it were alone.
    drafts = layer.detach_newest(layer.seen - cut)
    count = cut - before
    rope = None if seat.rope is None else seat.rope.part(count)
    begun = None if seat.hidden is None else seat.hidden[:, :count]
    first = call._replace(spec=call.spec.part(count, cut), seat=seat._replace(rope=rope, hidden=begun))
    prompt, _ = _attend_and_act(first, layer, query[:, :, :count], *_keys_of(call, *layer.newest), before)
    layer.append(*drafts)
    rest, _ = _attend_and_act(call, layer, query[:, :, count:], *_keys_of(call, *layer.newest), cut)
    return torch.cat([prompt, rest], 1), None


# Arguments of a call by which more is asked than an attention over all rows.
_MORE = frozenset(name for word in (words.CACHE_OF_A_BATCH, words.EXTRA_BIAS, words.SOFTCAP) for name in word.names)


def _fits(layer: TokLayer, query: Tensor, key: Tensor, mask: Any) -> bool:
    """True for a query that sees all rows of a layer, each as one token."""
    if query.shape[2] != 1 or not isinstance(mask, MaskSpec) or not mask.light:
        return False
    shelf = layer.shelf
    return not layer.ragged and layer.weights is None and shelf.complete and key is shelf.newest[0]


def _light(call: Call, layer: TokLayer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The work of :func:`attention` at a step of which nothing else is asked, in as few moves as there are."""
    layer.waiting = False
    if call.seat.rests:
        out = _whole(call, layer, query, key, value)
        layer.settle(None)
        return out
    engine, before, scale = layer.engine, layer.seen - 1, call.scaling
    queue: Queue | None = engine.queue
    assert queue is not None  # or the seat were no light one
    guards, both = queue.due(engine, layer, before, layer.seen), None
    # Weights are asked of implementations that give some; others need not know who has attended.
    if guards is not None and layer.compressed and call.seat.implementation in terms.FUSED_KERNEL.names:
        both = queue.attend(layer, query, key, value, scale)
    out = _whole(call, layer, query, key, value) if both is None else (both[0].transpose(1, 2), None)
    score = None if both is None else both[1]
    if guards is None or not queue.act(layer, query, scale, layer.seen, guards, score):
        with torch.no_grad():
            engine.observe(layer, _site(call, layer, query), before)
    return out


def _keys_of(call: Call, keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values that queries meet, of the rows of a layer that has some."""
    assert keys is not None
    assert values is not None
    return expanded(call.module, keys, values) if call.seat.latents else (keys, values)


def _attend_and_act(
    call: Call, layer: TokLayer, query: Tensor, key: Tensor, value: Tensor, before: int
) -> tuple[Tensor, Tensor | None]:
    out = _attend(call, layer, query, key, value, before)
    engine = layer.engine
    if layer.lent is not None:
        layer.lent.append(_lend(call, layer, key, value, before, query.shape[2]))
    if not call.seat.rests and engine.watches(layer.clock, layer.seen):
        with torch.no_grad():
            if not _stepped(call, layer, query, before):
                engine.observe(layer, _site(call, layer, query), before)
    else:
        site = None
        if layer.store.reads:
            site = _site(call, layer, query)
            site.read = engine.read(layer.clock, before, layer.seen)
        layer.settle(site)
    return out


def _stepped(call: Call, layer: TokLayer, query: Tensor, before: int) -> bool:
    """True if the policy's step has been taken, without a site."""
    engine, spec = layer.engine, call.spec
    queue: Queue | None = engine.queue
    if queue is None or not spec.plain or spec.padding(layer.seen) is not None:
        return False
    # A site has more terms of the logits.
    if call.seat.latents or call.softcap is not None or call.sinks is not None:
        return False
    return queue.step(engine, layer, query.detach(), call.scaling, before, layer.seen)


def _lend(call: Call, layer: TokLayer, key: Tensor, value: Tensor, before: int, count: int) -> Lent:
    """The rows that the layer's own queries have just attended to."""
    if not layer.shelf.complete:
        key, value = _keys_of(call, layer.shelf.keys, layer.shelf.values)
    layer.shelf.lend()
    state = layer.slots, layer.weights, layer.compressed, layer.ragged, layer.seen, layer.settled, layer.engine
    return Lent(key, value, *state, before, count)


def _borrow(call: Call, layer: TokLayer, query: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention over the rows of another layer, as they were when its own queries saw them.

    Raises:
        UnsupportedModelError: the other layer has not run in this forward.
    """
    lent: list[Lent] = layer.lent or []
    # Where nothing else is wanted of a model it gives these layers the newest queries alone.
    skip = sum(one.queries for one in lent) - query.shape[2]
    if not lent or skip < 0:
        raise UnsupportedModelError(f"{type(call.module).__name__} ran before the layer whose rows it shares")
    outs: list[tuple[Tensor, Tensor | None]] = []
    begun = 0
    for i, one in enumerate(lent):
        left = one.queries - min(one.queries, skip)
        skip -= one.queries - left
        if left:
            part = call if i == len(lent) - 1 else call._replace(spec=call.spec.part(one.queries, one.seen))
            first, some = one.first + one.queries - left, query[:, :, begun : begun + left]
            outs.append(_over(part, one, some, one.keys, one.values, first))
            begun += left
    return outs[0] if len(outs) == 1 else (torch.cat([out for out, _ in outs], 1), None)


def _attend(
    call: Call, layer: TokLayer, query: Tensor, key: Tensor, value: Tensor, before: int
) -> tuple[Tensor, Tensor | None]:
    spec = call.spec
    if not layer.shelf.complete:
        # The store has more rows than it has handed over, and may know how to attend to all of them.
        several = layer.shelf.several and spec.plain and layer.weights is None
        known = (several or _one(call, layer, query)) and not call.seat.latents
        if known and not call.dropout and (call.sinks is None or layer.shelf.sunk):
            padding = partial(_padding, spec, layer.seen)
            heads = layer.shelf.attend(Query(query, call.scaling, call.softcap, padding, call.sinks))
            if heads is not None:
                return heads.transpose(1, 2).contiguous(), None
        key, value = _keys_of(call, layer.shelf.keys, layer.shelf.values)
    return _over(call, layer, query, key, value, before)


def _one(call: Call, rows: TokLayer | Lent, query: Tensor) -> bool:
    """True for one query that sees all rows but padding, each as one token."""
    return query.shape[2] == 1 and call.spec.plain and rows.weights is None


def _over(
    call: Call, layer: TokLayer | Lent, query: Tensor, key: Tensor, value: Tensor, before: int
) -> tuple[Tensor, Tensor | None]:
    """Attention over rows that are at hand."""
    spec = call.spec
    # One query that sees every row needs no mask, as with a dense cache of that length.
    bare = layer.compressed and _one(call, layer, query) and spec.key_mask is None and not layer.ragged
    if bare or (not layer.compressed and spec.queries == query.shape[2]):
        return _whole(call, layer, query, key, value)
    return _compressed(call, layer, query, key, value, before), None


def _whole(
    call: Call, rows: TokLayer | Lent, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The host's own attention: by its own mask, or by none over rows that are fewer."""
    spec, name = call.spec, call.seat.implementation
    mask = None if rows.compressed else spec.stock(name)
    known = spec.functions
    return stock(call.module, name, query, key, value, mask, call.scaling, call.dropout, call.options, known)


def _padding(spec: MaskSpec, seen: int, count: int) -> Tensor | None:
    """``[B, count]`` bool, False where the newest slots are padding; None: nowhere."""
    return spec.later(seen - count, seen)


def _site(call: Call, layer: TokLayer, query: Tensor) -> CacheSite:
    padding = call.spec.padding(layer.seen)
    if call.seat.latents:
        # Of latents every head makes keys of its own, but queries can be brought to them instead.
        dtype = torch.promote_types(*(rows.dtype for rows in layer.newest))
        return call.site(LatentSite, layer, carried(call.module, query, dtype), padding)
    return call.site(CacheSite, layer, query, padding)


def _compressed(call: Call, layer: TokLayer | Lent, query: Tensor, key: Tensor, value: Tensor, before: int) -> Tensor:
    """``[B, Q, H, D]``: attention over rows that hold the slots ``layer.slots``."""
    spec, positions, count = call.spec, layer.slots, query.shape[2]
    b, heads, n = key.shape[:3]
    if positions is not None:
        positions = positions.expand(b, heads, n)  # all heads' keys may be made of one row
    else:
        positions = torch.arange(n, dtype=torch.int32, device=key.device).expand(b, heads, n)
    dropout = call.dropout
    if _one(call, layer, query) and not dropout and call.sinks is None:
        # One query over rows that all lie behind it: only padding and empty rows are hidden.
        mask = spec.key_mask
        if layer.compressed and spec.later(layer.settled, layer.seen) is None:
            mask = None
        terms: dict[str, Any] = {"key_mask": mask, "scale": call.scaling, "softcap": call.softcap}
        out = decode_attention(*of_one_type(query, key, value), positions=positions, **terms).output
        return out.transpose(1, 2).contiguous()
    mask = spec.visible(before, count, positions, layer.ragged)
    bias = None
    if layer.weights is not None:
        bias = (layer.engine.parts.fate.alpha * layer.weights.log())[:, :, None]
    return attend(query, key, value, mask, bias, call.scaling, call.softcap, dropout, call.sinks)


def register(implementation: str) -> str:
    """Make both functions known to transformers, in front of an attention that a model has; harmless when repeated.

    Returns:
        The name that they are known by.
    """
    name = PREFIX + implementation.removeprefix(PREFIX)
    for registry, function in (("registry of attention", attention), ("registry of masks", mask_function)):
        members.REGISTER.need(host_object(registry))(name, function)
    return name
