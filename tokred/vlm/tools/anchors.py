"""Distinctive anchors: tokens that speak for many others and that no stronger one already speaks for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.selection import ranked
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.video import gathered

Pool = Literal["all", "rest"]
Position = Literal["median", "first", "mean", "last"]


_BLOCK = 1 << 20  # numbers of similarities at a time


def anchor_scores(unit: Tensor, pool: Tensor | None = None) -> Tensor:
    """How well each token speaks for others, less how far a stronger one already does.

    ``R_i (1 - max C_ij)`` over stronger ``j``, of which ``R_j > R_i`` (the lower index where they are alike), ``R`` the
    sum of a token's cosines ``C``, its own included; infinite for the strongest. Similarities are made in blocks.

    Args:
        unit: ``(B, N, C)`` float32 features of length one.
        pool: ``(B, N)`` bool, the tokens that are summed over and compared with; None: all.

    Returns:
        ``(B, N)`` float32.
    """
    b, n, _ = unit.shape
    among = unit if pool is None else unit * pool.unsqueeze(-1)
    strength = (unit * among.sum(1, keepdim=True)).sum(-1)
    place = torch.arange(n, device=unit.device)
    found = []
    step = max(1, _BLOCK // max(1, b * n))
    for first in range(0, n, step):
        rows = slice(first, first + step)
        mine, other = strength[:, rows].unsqueeze(2), strength.unsqueeze(1)
        stronger = (other > mine) | ((other == mine) & (place < place[rows].unsqueeze(1)))
        if pool is not None:
            stronger = stronger & pool.unsqueeze(1)
        redundant = (unit[:, rows] @ unit.mT).masked_fill(~stronger, -torch.inf).amax(-1)
        found.append(torch.where(stronger.any(-1), strength[:, rows] * (1 - redundant), torch.inf))
    return torch.cat(found, 1)


def merged_into_anchors(
    x: Tensor, kept: Tensor, anchors: int, pool: Pool = "all", position: Position = "median"
) -> Reduction:
    """The reduction that keeps some tokens as they are, and merges all others into some of these others.

    Args:
        x: ``(B, N, C)`` features that are compared.
        kept: ``(B, P)`` int64 tokens that stay alone.
        anchors: how many of the others stand for the rest, 0 to ``N - P``.
        pool: whether anchors are scored among ``"all"`` tokens or among the ``"rest"``.
        position: which member represents a slot, and gives it its position: the ``"median"`` (the lower of two middle
            ones), the ``"first"``, the one nearest to the ``"mean"`` place (the lower of two), or the ``"last"``.

    Returns:
        Slots in the order of their representatives; merging is the plain mean of the members.
    """
    b, n, _ = x.shape
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    rest = torch.ones(b, n, dtype=torch.bool, device=x.device).scatter(1, kept, False)
    if not anchors:
        return Reduction.keep(kept.sort(1).values, n)
    # The slot of each token: kept ones have one each, then anchors, each with the tokens most similar to it.
    slot = _groups(unit, rest, anchors, pool) + kept.shape[1]
    slot = slot.scatter(1, kept, torch.arange(kept.shape[1], device=x.device).expand(b, -1))
    representative, order = _speakers(slot, kept.shape[1] + anchors, position).sort(1)
    others = torch.ones_like(rest).scatter(1, representative, False)
    source = others.to(torch.uint8).argsort(dim=1, stable=True)[:, order.shape[1] :]
    target = order.argsort(1).gather(1, slot).gather(1, source)
    return Reduction(representative, source, target, n, mode="mean", by_size=False, complete=True)


def beside_slots(
    x: Tensor, step: Reduction, total: int, pool: Pool = "all", position: Position = "median"
) -> Reduction:
    """Slots of a reduction, and beside them anchors that the tokens it leaves out are merged into, up to a total.

    Args:
        x: ``(B, N, C)`` features that are compared.
        step: the reduction; its slots and their values stay as they are, and samples may keep different numbers.
        total: slots of each sample. Where the reduction has as many or more, there are no anchors; where it leaves out
            fewer tokens than are missing, each of those is its own.
        pool, position: see :func:`merged_into_anchors`.

    Raises:
        ValueError: the reduction hands tokens out to several slots, or combines them by anything but sums and means.
    """
    if step.mode == "keep" and step.mask is None and not step.source.shape[1]:
        return merged_into_anchors(x, step.representative, max(0, total - step.slots), pool, position)
    index, weight = step.index, weights_of(step)
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    stands = step.representative.gather(1, index.clamp_min(0))
    left = index < 0
    slots = torch.full((len(x),), step.slots, device=x.device) if step.mask is None else step.mask.sum(1)
    parts = []
    for i, (have, missing) in enumerate(zip(slots.tolist(), left.sum(1).tolist(), strict=True)):
        anchors, rest = max(0, min(total - have, missing)), left[i : i + 1]
        root, counts = torch.where(rest, -1, stands[i : i + 1])[0], weight[i]
        if anchors:
            # One slot more holds all that is not of the rest, and is asked for nothing.
            group = torch.where(rest, _groups(unit[i : i + 1], rest, anchors, pool), anchors)
            members = group[0].bincount(minlength=anchors + 1)
            speakers = _speakers(group, anchors + 1, position)[0]
            root = torch.where(rest[0], speakers[group[0]], root)
            counts = torch.where(rest[0], members[group[0]].float().reciprocal(), counts)
        parts.append(gathered(root, counts))
    return stacked(parts)


def weights_of(step: Reduction) -> Tensor:
    """``(B, N)`` float32: what each token counts for in the sum that its slot is; those in none as 1.

    Raises:
        ValueError: a token goes into several slots, or slots are no sums.
    """
    index, one = step.index, torch.ones(*step.batch, step.length, device=step.representative.device)
    if step.mode not in ("keep", "mean", "sum") or (not step.composes and bool((step.sizes() > 1).any())):
        how = "hands tokens out to several slots" if not step.composes else f"combines tokens by {step.mode!r}"
        raise ValueError(f"a reduction that {how} has no weight of each token")
    given = one if step.weight is None else step.weight.float()
    if step.mode == "sum":
        return given
    slot = torch.where(index < 0, step.slots, index)
    if step.mode == "mean":
        total = torch.zeros(*step.batch, step.slots + 1, device=one.device).scatter_add_(1, slot, given)
        return torch.where(index < 0, one, given / total.gather(1, slot))
    place = torch.arange(step.length, device=one.device)
    return (step.representative.gather(1, index.clamp_min(0)) == place).logical_or(index < 0).float()


def _groups(unit: Tensor, rest: Tensor, anchors: int, pool: Pool) -> Tensor:
    """``(B, N)`` int64: the anchor of each token, 0 to ``anchors - 1``; of tokens that are not of the rest, any.

    Args:
        unit: ``(B, N, C)`` float32 features of length one.
        rest: ``(B, N)`` bool, tokens that go into anchors and may be some.
        anchors: 1 to as many as those.
        pool: see :func:`merged_into_anchors`.
    """
    scores = anchor_scores(unit, rest if pool == "rest" else None)
    first = ranked(scores.masked_fill(~rest, -torch.inf))[:, :anchors].sort(1).values
    own = torch.arange(anchors, device=unit.device).expand(len(unit), -1)
    return best_match(unit, gather_rows(unit, first)).index.scatter(1, first, own)


def _speakers(slot: Tensor, slots: int, position: Position) -> Tensor:
    """``(B, slots)`` int64: the member of each slot that represents it.

    Args:
        slot: ``(B, N)`` int64 of every token; none is empty.
    """
    b, n = slot.shape
    place = torch.arange(n, device=slot.device).expand(b, -1)
    count = torch.zeros(b, slots, dtype=torch.long, device=slot.device).scatter_add(1, slot, torch.ones_like(slot))
    start = count.cumsum(1) - count
    if position == "mean":
        total = torch.zeros(b, slots, dtype=torch.float64, device=slot.device).scatter_add(1, slot, place.double())
        far = (place - (total / count).gather(1, slot)).abs()
        order, rank = (slot * 2 * n + far).argsort(dim=1, stable=True), torch.zeros_like(count)
    else:
        order = slot.argsort(dim=1, stable=True)
        rank = {"median": (count - 1) // 2, "first": torch.zeros_like(count), "last": count - 1}[position]
    return order.gather(1, start + rank)
