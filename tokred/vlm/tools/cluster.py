"""Clusters of tokens by density peaks (DPC-KNN)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.dispatch import without_autocast

# Distances of so many pairs are held at once: those of 2,048 points.
BLOCK = 1 << 22


class Clusters(NamedTuple):
    """Groups of points.

    Attributes:
        centre: ``(B, c)`` int64, the points that stand for the groups, ascending.
        group: ``(B, n)`` int64, the group of each point.
    """

    centre: Tensor
    group: Tensor


def density_peaks(x: Tensor, count: int, neighbours: int, *, block: int = BLOCK) -> Clusters:
    """Points of high density that are far from points of higher density are centres; the others go to the nearest.

    Density is the exponential of less the mean squared distance to the nearest points, the point itself included, with
    distances divided by the root of the channels. Of two points of one density the first counts as denser.

    Args:
        x: ``(B, n, C)``.
        count: groups, 1 to ``n``.
        neighbours: points that density is measured with, at most ``n``.
        block: where there are more pairs of points, distances are made block by block and never all stored.

    Source: Du et al., Study on density peaks clustering based on k-nearest neighbors, 2016. The authors of SparseVLM
    add noise to break ties, which nothing here depends on.
    """
    b, n, _ = x.shape
    with torch.no_grad(), without_autocast(x):
        x = x.float()
        step = max(1, block // (b * n))
        whole = _distances(x, x) if step >= n else None
        parts = [slice(i, i + step) for i in range(0, n, step)]

        def rows(part: slice) -> Tensor:
            return _distances(x[:, part], x) if whole is None else whole

        near = torch.cat([rows(p).topk(min(neighbours, n), largest=False).values for p in parts], 1)
        density = torch.exp(-near.square().mean(-1))
        place = torch.arange(n, device=x.device)
        found, most = [], []
        for p in parts:
            d, mine, other = rows(p), density[:, p].unsqueeze(2), density.unsqueeze(1)
            denser = (other > mine) | ((other == mine) & (place < place[p].unsqueeze(1)))
            found.append(d.masked_fill(~denser, torch.inf).amin(-1))
            most.append(d.amax((1, 2)))
        apart = torch.cat(found, 1)
        apart = torch.where(apart.isinf(), torch.stack(most).amax(0).unsqueeze(1), apart)
        order = (density * apart).argsort(dim=1, descending=True, stable=True)
        centre = order[:, :count].sort(dim=1).values
        at = centre.unsqueeze(1)
        group = torch.cat([_to(rows(p), at).argmin(-1) for p in parts], 1)
        group = group.scatter(1, centre, torch.arange(count, device=x.device).expand(b, -1))
        return Clusters(centre, group)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[-1] ** 0.5
    return found


def _to(d: Tensor, centre: Tensor) -> Tensor:
    return d.gather(2, centre.expand(-1, d.shape[1], -1))
