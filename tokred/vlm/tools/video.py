"""Parts of video methods: changes from frame to frame, choices within frames, and slots that several tokens go into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.selection import ranked
from tokred.vlm.tools.greedy import directions


def apart(u: Tensor, v: Tensor) -> Tensor:
    """``(...,)`` float32: one less the cosine of rows whose directions ``(..., C)`` these are; of a zero row 1.

    Made from the difference of the directions, so that like rows give 0 and near-copies keep their order, which one
    less a rounded cosine loses.
    """
    # A zero row has no direction: its cosine with any counts as 0.
    lost = ((u == 0).all(-1).float() + (v == 0).all(-1).float()) / 2
    return (u - v).square().sum(-1) / 2 + lost


def changes(x: Tensor) -> Tensor:
    """``(B, T - 1, N)`` float32: :func:`apart` of each place and the same place of the frame before.

    Args:
        x: ``(B, T, N, C)``.
    """
    u = directions(x)
    return apart(u[:, 1:], u[:, :-1])


def within(scores: Tensor) -> Tensor:
    """``(B, T, N)`` int64: the rank of each token in its frame, 0 for the highest score; ties to the lower place.

    Args:
        scores: ``(B, T, N)``.
    """
    order = ranked(scores)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def chosen(stays: Tensor, count: int) -> Tensor:
    """``(B, count)`` int64 ascending: where ``(B, n)`` bool is True, so often in every row."""
    return stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def numbered(group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``(count,)`` int64 members of each group, and ``(n,)`` int64 the rank of each token among those of its group.

    Args:
        group: ``(n,)`` int64.
        count: of groups.
    """
    members = group.bincount(minlength=count)
    order = group.argsort(stable=True)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - (members.cumsum(0) - members)[group[order]]
    return members, rank


def gathered(root: Tensor, weight: Tensor | None = None) -> Reduction:
    """The reduction of one sample in which every token goes to its root, in the order of the roots.

    Args:
        root: ``(n,)`` int64: the token that each one goes into, itself for those that stand for a slot; -1: it leaves.
        weight: ``(n,)`` float32, what each counts for in the sum that a slot is; None: slots are plain means.
    """
    n = len(root)
    place = torch.arange(n, device=root.device)
    stands = root == place
    rows = stands.nonzero().squeeze(1)
    source = ((root >= 0) & ~stands).nonzero().squeeze(1)
    target = (stands.long().cumsum(0) - 1)[root[source]]
    return Reduction(
        rows[None], source[None], target[None], n, weight=None if weight is None else weight[None],
        mode="mean" if weight is None else "sum", by_size=False,
    )  # fmt: skip


def shares(group: Tensor, centre: Tensor, beta: float | None) -> Tensor:
    """``(B, n)`` float32: what each point counts for in the value of its cluster.

    Args:
        group: ``(B, n)`` int64, the cluster of each point.
        centre: ``(B, c)`` int64, the points that stand for the clusters.
        beta: share of the centre; the others have the rest in equal parts, and a centre without others counts whole.
            None: all members alike.
    """
    b, n = group.shape
    one = torch.ones(b, n, device=group.device)
    members = torch.zeros(centre.shape, device=group.device).scatter_add_(1, group, one)
    of = members.gather(1, group)
    if beta is None:
        return of.reciprocal()
    first = torch.zeros(b, n, dtype=torch.bool, device=group.device).scatter_(1, centre, True)
    share = torch.where(first, beta, (1 - beta) / (of - 1).clamp_min(1))
    return torch.where(of == 1, 1.0, share)


def cut(similar: Sequence[float], least: int, tau: float) -> list[tuple[int, int]]:
    """First and last frame of each segment of a clip: cuts where a frame is unlike the next.

    Args:
        similar: of the ``T`` frames, ``T - 1`` similarities of each and the next.
        least: segments; where fewer frames are unlike, the most unlike of the others are cut too, as far as there are
            any, the first of those that are alike.
        tau: below it a frame is unlike the next.
    """
    order = sorted(range(len(similar)), key=lambda t: (similar[t], t))
    cuts = sorted({*order[: least - 1], *(t for t in order if similar[t] < tau)})
    starts = [0, *(t + 1 for t in cuts)]
    return list(zip(starts, [*cuts, len(similar)], strict=True))


def frame_similarity(x: Tensor) -> list[float]:
    """``T - 1`` cosines of the mean token of each frame and of the next; waits for the device.

    Args:
        x: ``(T, N, C)`` float32.
    """
    u = directions(x.mean(1))
    return (1 - apart(u[1:], u[:-1])).tolist()
