"""Matching: which tokens are merged into which. Shared by every method that merges pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tokred.core.ragged import bounds, pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.selection import ranked
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match, unit

Split = Literal["alternate", "sequential"]


def mergeable(n: int, prefix: int = 0, suffix: int = 0) -> int:
    """How many of ``n`` tokens one bipartite step can merge away at most: half of the unprotected ones."""
    return max(0, (n - prefix - suffix) // 2)


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    *,
    prefix: int = 0,
    suffix: int = 0,
    split: Split = "alternate",
    mask: Tensor | None = None,
    mode: str = "mean",
) -> Reduction:
    """Pair each of the ``r`` most redundant source tokens with its most similar destination token.

    Tokens are split by position: even positions are sources, odd ones destinations. Survivors come out as the prefix,
    the unmerged sources, all destinations, the suffix; the unmerged sources are in ascending position, or, where no
    token is protected, in descending order of their best score, as the method's authors have it. The order matters:
    the next layer splits by position again and so compares new pairs.

    Args:
        metric: ``(B, N, D)`` vectors that are compared by cosine, any float type; need not be normalised.
        r: tokens to remove; capped at half of the unprotected ones.
        prefix, suffix: leading and trailing tokens that take no part.
        split: ``"alternate"``, or ``"sequential"`` (first half against second; a baseline that costs accuracy).
        mask: ``(B, N)`` bool, False on padding, which is never paired with a real token.
        mode: how merged tokens are combined, see :class:`tokred.Reduction`.

    Raises:
        ValueError: ``metric`` is not three-dimensional, or ``r`` is negative.

    Source: Bolya et al., Token Merging, ICLR 2023, section 3; ties go to the lower index (ours).
    """
    if metric.ndim != 3:
        raise ValueError(f"metric must be (B, N, D), got shape {tuple(metric.shape)}")
    if r < 0:
        raise ValueError(f"r must not be negative, got {r}")
    b, n, _ = metric.shape
    r = min(r, mergeable(n, prefix, suffix))
    if r == 0:
        return Reduction.identity((b,), n, metric.device)
    first, second = sides_of(n, prefix, suffix, split)
    with torch.no_grad():
        a_mask, b_mask = (None, None) if mask is None else (mask[:, first], mask[:, second])
        compared: Literal["cosine", "dot"] = "cosine"
        if metric.device.type == "cpu":  # both sides at once; elsewhere the kernel normalises as it reads
            metric, compared = unit(metric), "dot"
        score, match = best_match(metric[:, first], metric[:, second], metric=compared, a_mask=a_mask, b_mask=b_mask)
        order = score.argsort(dim=1, descending=True, stable=True)
        merged, unmerged = order[:, :r], order[:, r:]
        if prefix or suffix:
            unmerged = unmerged.sort(dim=1).values
        target = match.gather(1, merged) + (prefix + unmerged.shape[1])
    return _assemble(merged, unmerged, target, n, prefix, suffix, (first, second), mode)


def sides_of(n: int, prefix: int = 0, suffix: int = 0, split: Split = "alternate") -> tuple[slice, slice]:
    """Positions of sources and of destinations among ``n`` tokens, as slices (a view, no copy)."""
    end = n - suffix
    if split == "sequential":
        middle = prefix + (end - prefix + 1) // 2
        return slice(prefix, middle), slice(middle, end)
    even, odd = (prefix, prefix + 1) if prefix % 2 == 0 else (prefix + 1, prefix)
    return slice(even, end, 2), slice(odd, end, 2)


def _assemble(
    merged: Tensor,
    unmerged: Tensor,
    target: Tensor,
    n: int,
    prefix: int,
    suffix: int,
    sides: tuple[slice, slice],
    mode: str,
) -> Reduction:
    """Positions within the two sides, back to positions in the sequence."""
    first, second = sides
    step = first.step or 1
    b = merged.shape[0]
    positions = torch.arange(n, device=merged.device).expand(b, -1)
    parts = [positions[:, :prefix], unmerged, positions[:, second], positions[:, n - suffix :]]
    if step != 1 or first.start:
        parts[1] = torch.add(first.start, unmerged, alpha=step)
        merged = torch.add(first.start, merged, alpha=step)
    representative = torch.cat([p for p in parts if p.shape[1]], dim=1)
    return Reduction(representative, merged, target, n, mode=mode, complete=True)


def match_to(
    metric: Tensor,
    sources: Tensor,
    destinations: Tensor,
    *,
    lead: Tensor | None = None,
    tail: Tensor | None = None,
    mode: str = "mean",
) -> Reduction:
    """Merge every source into its most similar destination, anywhere.

    Args:
        metric: ``(B, N, D)``, compared by cosine.
        sources: ``(B, R)`` positions that are merged away.
        destinations: ``(B, K)`` positions that receive.
        lead, tail: ``(B, P)`` positions that stay as they are, before and after the destinations in the output.
        mode: how merged tokens are combined.
    """
    n = metric.shape[1]
    with torch.no_grad():
        a, b = gather_rows(metric, sources), gather_rows(metric, destinations)
        target = best_match(a, b).index + (0 if lead is None else lead.shape[1])
    representative = torch.cat([t for t in (lead, destinations, tail) if t is not None], dim=1)
    return Reduction(representative, sources, target, n, mode=mode)


def without_padding(plan: Reduction, mask: Tensor | None) -> Reduction:
    """A plan for a batch of uneven counts: padding stays padding, and none of it goes into a real token.

    Args:
        plan: from ``N`` tokens, of one leading dimension.
        mask: ``(B, N)`` bool, False on padding; None: there is none, and the plan is returned as it is.
    """
    if mask is None:
        return plan
    target = plan.target.masked_fill(~mask.gather(1, plan.source), -1)
    return replace(plan, target=target, mask=mask.gather(1, plan.representative), complete=False)


def bipartite_uneven_matching(
    metric: Tensor,
    count: Callable[[Tensor], Tensor],
    *,
    prefix: int = 0,
    suffix: int = 0,
    split: Split = "alternate",
    mask: Tensor | None = None,
    mode: str = "mean",
) -> Reduction:
    """:func:`bipartite_soft_matching` in which every sample merges as many pairs as its own scores say.

    A sample that merges none keeps its order, as it would alone. Waits for the device once.

    Args:
        metric: ``(B, N, D)``; this and the rest as in :func:`bipartite_soft_matching`.
        count: from the best scores of the sources, ``(B, A)`` float32, -inf where a source has no partner (padding), to
            the number of pairs that each sample merges, ``(B,)`` integers; capped at the sources that have a partner.
        prefix, suffix: leading and trailing tokens that take no part.
        split: how sources and destinations are told apart.
        mask: ``(B, N)`` bool, False on padding.
        mode: how merged tokens are combined.

    Raises:
        ValueError: ``metric`` is not three-dimensional.
    """
    if metric.ndim != 3:
        raise ValueError(f"metric must be (B, N, D), got shape {tuple(metric.shape)}")
    b, n, _ = metric.shape
    if mergeable(n, prefix, suffix) == 0:
        return Reduction.identity((b,), n, metric.device)
    sides = first, second = sides_of(n, prefix, suffix, split)
    with torch.no_grad():
        a_mask, b_mask = (None, None) if mask is None else (mask[:, first], mask[:, second])
        score, match = best_match(metric[:, first], metric[:, second], a_mask=a_mask, b_mask=b_mask)
        r = torch.minimum(count(score), (score > -torch.inf).sum(1)).clamp_min(0)
        low, high = bounds(r, score.shape[1])
        if high == 0:
            return Reduction.identity((b,), n, metric.device)
        order = ranked(score)
        merged, going = order[:, :high], match.gather(1, order[:, :high])
        if low == high and mask is None:
            left = order[:, high:]
            left = left.sort(dim=1).values if prefix or suffix else left
            return _assemble(merged, left, going + prefix + left.shape[1], n, prefix, suffix, sides, mode)
        position = torch.arange(n, device=metric.device)
        goes = position[:high] < r.unsqueeze(1)
        stays = ~torch.zeros_like(order, dtype=torch.bool).scatter(1, merged, goes)
        line = position[: order.shape[1]].expand(b, -1) if prefix or suffix else order
        receives = torch.ones_like(position[second], dtype=torch.bool).expand(b, -1)
        stays = torch.cat([stays.gather(1, line), receives], 1)
        rows = torch.cat([position[first][line], position[second].expand(b, -1)], 1)
        rows = torch.where(r.unsqueeze(1) > 0, rows, position[prefix : n - suffix])
        if mask is not None:
            stays = stays & mask.gather(1, rows)
        slot = (stays.cumsum(1) - 1 + prefix)[:, order.shape[1] :]
        target = torch.where(goes, slot.gather(1, going), -1)
        free = n - prefix - suffix
        rows, kept = pack(rows, stays, (free - high, free - low) if mask is None else None)
        representative, kept = with_protected(rows, kept, n, prefix, suffix)
    return Reduction(representative, position[first][merged], target, n, mask=kept, mode=mode)


def raster_order(reduction: Reduction, suffix: int = 0) -> Reduction:
    """The same reduction with its slots in the order of the first token of each.

    Where every reduction of a sequence is ordered so, tokens stay sorted by the first original token that they stand
    for, as a row by row reading of the image meets them.

    Args:
        reduction: of one leading dimension.
        suffix: trailing slots that stay behind all others, padding included.

    Raises:
        TypeError: tokens are handed out in shares, so no slot has members of its own.
    """
    if not reduction.composes:
        raise TypeError("the slots of a soft reduction have no first token to be ordered by")
    if reduction.trivial:
        return reduction
    n, m = reduction.length, reduction.slots
    first = reduction.representative
    if reduction.mask is not None:
        first = torch.where(reduction.mask, first, n)
    # Sources that are dropped go to a column of their own.
    into = torch.where(reduction.target < 0, m, reduction.target)
    first = torch.nn.functional.pad(first, (0, 1), value=n).scatter_reduce(1, into, reduction.source, "amin")[:, :m]
    if suffix:
        first = torch.cat([first[:, : m - suffix], first[:, m - suffix :] + n], 1)
    order = first.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    target = torch.where(reduction.target < 0, -1, rank.gather(1, reduction.target.clamp_min(0)))
    mask = None if reduction.mask is None else reduction.mask.gather(1, order)
    return replace(reduction, representative=reduction.representative.gather(1, order), target=target, mask=mask)
