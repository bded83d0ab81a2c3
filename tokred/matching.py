"""Matching: which tokens are merged into which. Shared by every method that merges pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.kernels.similarity_rows import best_match, unit
from tokred.reduction import Reduction

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
    first, second = _sides(n, prefix, suffix, split)
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


def _sides(n: int, prefix: int, suffix: int, split: Split) -> tuple[slice, slice]:
    """Positions of sources and of destinations, as slices (a view, no copy)."""
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
        a = metric.gather(1, sources.unsqueeze(-1).expand(-1, -1, metric.shape[-1]))
        b = metric.gather(1, destinations.unsqueeze(-1).expand(-1, -1, metric.shape[-1]))
        target = best_match(a, b).index + (0 if lead is None else lead.shape[1])
    representative = torch.cat([t for t in (lead, destinations, tail) if t is not None], dim=1)
    return Reduction(representative, sources, target, n, mode=mode)
