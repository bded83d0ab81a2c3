"""The definition of the row merges in plain torch: also the tuned path on a CPU, and what autograd and compile see.

The representatives' rows are copied once; after that only the sources and the slots they go into are touched. Where
values may not be looked at (on a device, under a trace) a dropped source is replaced by a stand-in: the representative
of slot 0, sent to slot 0 with no weight, which changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.rows import flat_index, offsets, rows_of

# Means shorter than this have no direction: a norm-preserving merge then takes the longest member itself.
SHORTEST = 1e-6

_HALVES = (torch.float16, torch.bfloat16)


class _Edges(NamedTuple):
    """The sources that go into a slot, flat: ``E`` of them."""

    member: Tensor  # [E] row numbers in a contiguous (B * N) table
    row: Tensor  # [E] row numbers in the table that holds x
    slot: Tensor  # [E] row numbers of the answer
    alive: Tensor | None  # [E] bool, False on the stand-ins of dropped sources; None: there are none


def _edges(representative: Tensor, source: Tensor, target: Tensor, n: int, steps: tuple[int, ...]) -> _Edges:
    alive = target >= 0
    slots = (representative.shape[1], 1)
    # On a CPU looking at the values costs nothing; a device would be waited for, and a trace would break.
    if source.device.type == "cpu" and type(source) is Tensor and not dispatch.traced():
        member = flat_index(source, (n, 1))
        row = member if steps == (n, 1) else flat_index(source, steps)
        slot = flat_index(target, slots)
        if not bool(alive.all()):
            chosen = alive.reshape(-1).nonzero().view(-1)
            slot, member, kept = slot.index_select(0, chosen), member.index_select(0, chosen), member
            row = member if row is kept else row.index_select(0, chosen)
        return _Edges(member, row, slot, None)
    source = torch.where(alive, source, representative[:, :1])
    slot = flat_index(target.clamp(min=0), slots)
    return _Edges(flat_index(source, (n, 1)), flat_index(source, steps), slot, alive.reshape(-1))


def _gain(size: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The gain of each row in a mean: size times weight, ``(B * N,)``, or None for ones."""
    size, weight = (None if t is None else t.to(dtype) for t in (size, weight))
    gain = size if weight is None else (weight if size is None else size * weight)
    return None if gain is None else gain.reshape(-1)


def _own(gain: Tensor | None, edges: _Edges, dtype: torch.dtype) -> Tensor:
    """The gain of each source, ``(E,)``; that of stand-ins is zero."""
    if gain is None:
        return torch.ones_like(edges.slot, dtype=dtype) if edges.alive is None else edges.alive.to(dtype)
    own = gain.index_select(0, edges.member)
    return own if edges.alive is None else own * edges.alive


def _totals(gain: Tensor | None, own: Tensor, representative: Tensor, edges: _Edges, n: int) -> Tensor:
    """Sum of the gains of each slot's members, ``(B * M,)``."""
    if gain is None:
        total = torch.ones(representative.numel(), dtype=own.dtype, device=own.device)
    else:
        total = gain.index_select(0, flat_index(representative, (n, 1)))
    return total.index_add(0, edges.slot, own)


def merge_sizes(size: Tensor | None, representative: Tensor, source: Tensor, target: Tensor, n: int) -> Tensor:
    """The sum of the members' sizes, ``(B, M)`` float32; see :func:`tokred.kernels.merge_rows.merge_sizes`."""
    gain = _gain(size, None, torch.float32)
    edges = _edges(representative, source, target, n, (n, 1)) if representative.shape[1] else _no_edges(source)
    own = _own(gain, edges, torch.float32)
    return _totals(gain, own, representative, edges, n).view(representative.shape)


def _no_edges(like: Tensor) -> _Edges:
    none = like.new_empty(0)
    return _Edges(none, none, none, None)


def merge_rows(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
    slot_size: Tensor | None = None,
) -> Tensor:
    """The merged rows; see :func:`tokred.kernels.merge_rows.merge_rows` for arguments and modes."""
    batch, n, channels = x.shape
    slots = representative.shape[1]
    scaled = mode == "sum" and weight is not None
    touched = mode != "keep" and source.shape[1] > 0 and slots > 0
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, size, weight))
    recording = learns or dispatch.traced()
    if x.dtype in _HALVES and (scaled or (touched and recording)):
        return merge_rows(x.float(), representative, source, target, size, weight, mode, slot_size).to(x.dtype)

    rows = rows_of(x)
    y = rows.table.index_select(0, flat_index(representative, rows.steps))  # [B * M, C], fresh: changed in place below
    wide = dispatch.accumulator_dtype(x.dtype)
    gain = _gain(None if mode == "sum" else size, weight, wide)
    if scaled and gain is not None:
        y = y * gain.index_select(0, flat_index(representative, (n, 1))).unsqueeze(1)
    if touched:
        edges = _edges(representative, source, target, n, rows.steps)
        moved = rows.table.index_select(0, edges.row)  # [E, C]
        if mode == "max":
            where = edges.slot.unsqueeze(1).expand_as(moved)
            y = y.scatter_reduce(0, where, moved, "amax") if recording else y.scatter_reduce_(0, where, moved, "amax")
        else:
            base = y.index_select(0, edges.slot)  # [E, C]
            own = _own(gain, edges, wide)
            if mode == "sum":
                added = moved.to(wide) * own.unsqueeze(1)
            else:
                if slot_size is None or weight is not None:
                    total = _totals(gain, own, representative, edges, n)
                else:
                    total = slot_size.to(wide).reshape(-1)
                total = total.index_select(0, edges.slot)
                # A slot whose members all weigh nothing stays its representative.
                share = own / total.clamp(min=torch.finfo(wide).tiny)
                added = (moved.to(wide) - base).mul_(share.unsqueeze(1))
            y = _write(y, base, moved, added, edges, mode, recording)
    return y.view(batch, slots, channels)


def merge_tokens(
    x: Tensor, representative: Tensor, source: Tensor, target: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of every slot and the slots' sizes, where no source is dropped, nothing records a
    gradient and ``x`` is contiguous and as wide as its sums: every index is made once, everything else in place."""
    batch, n, channels = x.shape
    slots = representative.shape[1]
    starts = offsets(batch, n, source)
    rep, member = (representative + starts).view(-1), (source + starts).view(-1)
    slot = (target + offsets(batch, slots, source)).view(-1)
    if size is None:
        total, own = torch.ones(rep.shape[0]), torch.ones(slot.shape[0])
    else:
        flat = size.reshape(-1)
        total, own = flat.index_select(0, rep), flat.index_select(0, member)
    total.index_add_(0, slot, own)
    table = x.view(batch * n, channels)
    y = table.index_select(0, rep)
    moved, base = table.index_select(0, member), y.index_select(0, slot)
    share = own.div_(total.index_select(0, slot)).unsqueeze(1)
    if x.dtype not in _HALVES:
        y.index_add_(0, slot, moved.sub_(base).mul_(share.to(x.dtype)))
        return y.view(batch, slots, channels), total.view(batch, slots)
    # Half precision is rounded once: the first source of each slot holds its wide sum, and all of them write it.
    base = base.float()
    added = moved.float().sub_(base).mul_(share)
    first = torch.empty(y.shape[0], dtype=torch.int64).scatter_(0, slot, torch.arange(slot.shape[0]))
    writer = first.index_select(0, slot)
    summed = base.index_add_(0, writer, added).index_select(0, writer)
    y.index_copy_(0, slot, summed.to(x.dtype))
    return y.view(batch, slots, channels), total.view(batch, slots)


def _write(y: Tensor, base: Tensor, moved: Tensor, added: Tensor, edges: _Edges, mode: str, recording: bool) -> Tensor:
    """Bring what the sources add into the touched slots.

    Args:
        y: ``(B * M, C)`` the representatives; may be changed.
        base: ``(E, C)`` the representative of each source's slot.
        moved: ``(E, C)`` the sources.
        added: ``(E, C)`` what each source adds, in the type of the sums.
        edges: the sources.
        mode: mean, sum or mlerp.
        recording: whether autograd or a trace records.
    """
    slot = edges.slot
    if mode != "mlerp" and y.dtype == added.dtype:
        return y.index_add_(0, slot, added)
    # One source of each slot, the same for all of them, holds its wide sum: half precision is rounded once.
    numbers = torch.arange(slot.numel(), device=slot.device)
    writer = slot.new_empty(y.shape[0]).scatter_(0, slot, numbers).index_select(0, slot)
    new = base + torch.zeros_like(added).index_add(0, writer, added).index_select(0, writer)
    if mode == "mlerp":
        new = _lengthen(new, moved.to(new.dtype), base.to(new.dtype), edges, y.shape[0])
        if edges.alive is not None:  # a slot to which only stand-ins came
            took = edges.alive.new_zeros(y.shape[0], dtype=torch.int64).index_add_(0, slot, edges.alive.to(torch.int64))
            new = torch.where((took.index_select(0, slot) > 0).unsqueeze(1), new, base)
    if recording:
        return y.index_add(0, slot, torch.where((writer == numbers).unsqueeze(1), new - base, 0.0))
    # Sources of one slot write the same row.
    return y.index_copy_(0, slot, new.to(y.dtype))


def _lengthen(mean: Tensor, moved: Tensor, base: Tensor, edges: _Edges, slots: int) -> Tensor:
    """The norm-preserving mean of each source's slot: the mean's direction, the longest member's length.

    Args:
        mean: ``(E, C)`` the mean of each source's slot.
        moved: ``(E, C)`` the sources.
        base: ``(E, C)`` the representative of each source's slot.
        edges: the sources.
        slots: length of the flat answer.

    Returns:
        ``(E, C)``.
    """
    slot, member = edges.slot, edges.member
    own, first, length = moved.norm(dim=1), base.norm(dim=1), mean.norm(dim=1)
    longest = own.new_zeros(slots).scatter_reduce(0, slot, torch.maximum(own, first), "amax").index_select(0, slot)
    # Among equally long members the representative (key 0) comes first, then the sources in the order of their rows.
    last = torch.iinfo(torch.int64).max
    key = torch.where(first == longest, 0, torch.where(own == longest, member + 1, last))
    best = key.new_full((slots,), last).scatter_reduce(0, slot, key, "amin").index_select(0, slot)
    numbers = torch.arange(slot.numel(), device=slot.device)
    holds = torch.where(best == member + 1, slot, slots)
    holder = slot.new_zeros(slots + 1).scatter_(0, holds, numbers).index_select(0, slot)
    row = torch.where((best == 0).unsqueeze(1), base, moved.index_select(0, holder))
    short = length < SHORTEST
    scale = longest / torch.where(short, 1.0, length)
    return torch.where(short.unsqueeze(1), row, mean * scale.unsqueeze(1))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the channels, in ``x``'s type, whatever the type of its parameters."""
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = dispatch.accumulator_dtype(x.dtype)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps).to(x.dtype)
