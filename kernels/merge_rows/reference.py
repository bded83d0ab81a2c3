"""The definition of the row merges in plain torch: also the tuned path on a CPU, and what autograd and compile see.

The representatives' rows are copied once; after that only the ``R`` sources and the slots they go into are touched. A
source that is dropped is replaced by the representative of slot 0 and sent to slot 0 with no weight, which changes
nothing and asks nothing of the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.rows import flat_index, rows_of

# Means shorter than this have no direction: a norm-preserving merge then takes the longest member itself.
SHORTEST = 1e-6

_HALVES = (torch.float16, torch.bfloat16)


class _Edges(NamedTuple):
    """The sources of a reduction, ready to use: all but ``source`` are flat, ``B * R`` long."""

    source: Tensor  # [B, R], dropped ones replaced
    alive: Tensor  # [B, R] bool
    slot: Tensor  # rows of the answer, 0 for dropped ones


def _edges(representative: Tensor, source: Tensor, target: Tensor) -> _Edges:
    alive = target >= 0
    source = torch.where(alive, source, representative[:, :1])
    slot = flat_index(target.clamp(min=0), (representative.shape[1], 1))
    return _Edges(source, alive, slot)


def _gain(size: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What each row counts for: size times weight, ``(B, N)``, or None for ones."""
    gain = size if weight is None else (weight if size is None else size * weight)
    return None if gain is None else gain.to(dtype)


def _shares(gain: Tensor | None, representative: Tensor, edges: _Edges, dtype: torch.dtype) -> Tensor:
    """Each source's share of its slot's total, ``(B * R, 1)``; nothing where the whole slot weighs nothing."""
    if gain is None:
        own = edges.alive.to(dtype).view(-1)
        total = torch.ones(representative.numel(), dtype=dtype, device=own.device)
    else:
        own = (gain.gather(1, edges.source) * edges.alive).view(-1)
        total = gain.gather(1, representative).view(-1)
    total = total.index_add(0, edges.slot, own).index_select(0, edges.slot)
    return (own / total.clamp(min=torch.finfo(dtype).tiny)).unsqueeze(1)


def merge_sizes(size: Tensor | None, representative: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The sum of the members' sizes, ``(B, M)`` float32; see :func:`tokred.kernels.merge_rows.merge_sizes`."""
    if size is None:
        total = torch.ones(representative.shape, dtype=torch.float32, device=representative.device)
    else:
        size = size.to(torch.float32)
        total = size.gather(1, representative)
    if source.shape[1] == 0 or representative.shape[1] == 0:
        return total
    edges = _edges(representative, source, target)
    own = edges.alive.to(torch.float32) if size is None else size.gather(1, edges.source) * edges.alive
    return total.view(-1).index_add_(0, edges.slot, own.view(-1)).view(representative.shape)


def merge_rows(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
) -> Tensor:
    """The merged rows; see :func:`tokred.kernels.merge_rows.merge_rows` for arguments and modes."""
    batch, slots, channels = x.shape[0], representative.shape[1], x.shape[2]
    scaled = mode == "sum" and weight is not None
    touched = mode != "keep" and source.shape[1] > 0 and slots > 0
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, size, weight))
    if x.dtype in _HALVES and (scaled or (touched and (recording or mode == "mlerp"))):
        return merge_rows(x.float(), representative, source, target, size, weight, mode).to(x.dtype)

    rows = rows_of(x)
    where = flat_index(representative, rows.steps)
    y = rows.table.index_select(0, where)  # [B * M, C], fresh: may be changed in place
    wide = dispatch.accumulator_dtype(x.dtype)
    if scaled and weight is not None:
        y = y * weight.to(wide).gather(1, representative).view(-1, 1)
    if touched:
        edges = _edges(representative, source, target)
        moved = rows.table.index_select(0, flat_index(edges.source, rows.steps))  # [B * R, C]
        if mode == "max":
            y = y.scatter_reduce(0, edges.slot.unsqueeze(1).expand_as(moved), moved, "amax")
        elif mode == "sum":
            _add_sum(y, moved, edges, weight, wide)
        else:
            gain = _gain(size, weight, wide)
            _add_mean(y, moved, edges, _shares(gain, representative, edges, wide), wide)
            if mode == "mlerp":
                y = _lengthen(y, moved, edges, rows.table.index_select(0, where.index_select(0, edges.slot)))
    return y.view(batch, slots, channels)


def _add_mean(y: Tensor, moved: Tensor, edges: _Edges, share: Tensor, wide: torch.dtype) -> None:
    """Add to each slot its sources' shares of their distance from the representative; ``y`` is changed."""
    base = y.index_select(0, edges.slot)
    if y.dtype == wide:
        y.index_add_(0, edges.slot, (moved - base).mul_(share))
    else:
        base = base.to(wide)
        _add_rounded(y, base, (moved - base).mul_(share), edges)


def _add_sum(y: Tensor, moved: Tensor, edges: _Edges, weight: Tensor | None, wide: torch.dtype) -> None:
    """Add to each slot its weighted sources; ``y`` is changed."""
    factor = edges.alive.to(wide)
    if weight is not None:
        factor = weight.to(wide).gather(1, edges.source) * factor
    added = moved * factor.view(-1, 1)
    if y.dtype == wide:
        y.index_add_(0, edges.slot, added)
    else:
        _add_rounded(y, y.index_select(0, edges.slot).to(wide), added, edges)


def _writers(edges: _Edges, slots: int) -> Tensor:
    """For each source, the number of one source that goes into the same slot: the same one for all of them."""
    numbers = torch.arange(edges.slot.numel(), device=edges.slot.device)
    return edges.slot.new_empty(slots).scatter_(0, edges.slot, numbers).index_select(0, edges.slot)


def _add_rounded(y: Tensor, base: Tensor, added: Tensor, edges: _Edges) -> None:
    """Add rows to half-precision slots with one rounding, keeping wide sums for the touched slots only."""
    writer = _writers(edges, y.shape[0])
    total = torch.zeros_like(added).index_add_(0, writer, added).index_select(0, writer)
    # Sources of one slot write the same row.
    y.index_copy_(0, edges.slot, (base + total).to(y.dtype))


def _lengthen(y: Tensor, moved: Tensor, edges: _Edges, base: Tensor) -> Tensor:
    """Give the mean of each slot that took a source the length of its longest member.

    Args:
        y: ``(B * M, C)`` the means.
        moved: ``(B * R, C)`` the sources' rows.
        edges: the sources.
        base: ``(B * R, C)`` the representative of each source's slot.
    """
    slots, slot = y.shape[0], edges.slot
    mean = y.index_select(0, slot)
    own, first = moved.norm(dim=1), base.norm(dim=1)
    longest = own.new_zeros(slots).scatter_reduce(0, slot, torch.maximum(own, first), "amax").index_select(0, slot)
    length = mean.norm(dim=1)
    # The longest member: the representative (key 0) before the sources, those in the order of their rows.
    last = torch.iinfo(torch.int64).max
    key = torch.where(first == longest, 0, torch.where(own == longest, edges.source.reshape(-1) + 1, last))
    best = key.new_full((slots,), last).scatter_reduce(0, slot, key, "amin").index_select(0, slot)
    is_best = (best == edges.source.reshape(-1) + 1) & (own == longest)
    numbers = torch.arange(slot.numel(), device=slot.device)
    holder = slot.new_zeros(slots + 1).scatter_(0, torch.where(is_best, slot, slots), numbers).index_select(0, slot)
    member = torch.where((best == 0).unsqueeze(1), base, moved.index_select(0, holder))
    flat = (length < SHORTEST).unsqueeze(1)
    scale = longest / torch.where(length < SHORTEST, 1.0, length)
    new = torch.where(flat, member, mean * scale.unsqueeze(1))
    # One source per slot carries the change, and none where all that came was dropped.
    took = torch.zeros(slots, dtype=torch.int64, device=slot.device).index_add_(
        0, slot, edges.alive.reshape(-1).to(torch.int64)
    )
    writes = (_writers(edges, slots) == numbers) & (took.index_select(0, slot) > 0)
    return y.index_add(0, slot, torch.where(writes.unsqueeze(1), new - mean, 0.0))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the channels, in ``x``'s type, whatever the type of its parameters."""
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = dispatch.accumulator_dtype(x.dtype)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps).to(x.dtype)
