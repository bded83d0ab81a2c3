"""Clusters of tokens by density peaks (DPC-KNN)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """Groups of points.

    Attributes:
        centre: ``(B, c)`` int64, the points that stand for the groups, ascending.
        group: ``(B, n)`` int64, the group of each point.
    """

    centre: Tensor
    group: Tensor


def density_peaks(x: Tensor, count: int, neighbours: int) -> Clusters:
    """Points of high density that are far from points of higher density are centres; the others go to the nearest.

    Density is the exponential of less the mean squared distance to the nearest points, the point itself included, with
    distances divided by the root of the channels. Of two points of one density the first counts as denser.

    Args:
        x: ``(B, n, C)``.
        count: groups, 1 to ``n``.
        neighbours: points that density is measured with, at most ``n``.

    Source: Du et al., Study on density peaks clustering based on k-nearest neighbors, 2016. The authors of SparseVLM
    add noise to break ties, which nothing here depends on.
    """
    b, n, c = x.shape
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.float()
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / c**0.5
        near = d.topk(min(neighbours, n), largest=False).values
        density = torch.exp(-near.square().mean(-1))
        place = torch.arange(n, device=x.device)
        mine, other = density.unsqueeze(2), density.unsqueeze(1)
        denser = (other > mine) | ((other == mine) & (place < place.unsqueeze(1)))
        apart = d.masked_fill(~denser, torch.inf).amin(-1)
        apart = torch.where(apart.isinf(), d.amax((1, 2)).unsqueeze(1), apart)
        order = (density * apart).argsort(dim=1, descending=True, stable=True)
        centre = order[:, :count].sort(dim=1).values
        to_centre = d.gather(2, centre.unsqueeze(1).expand(-1, n, -1))
        group = to_centre.argmin(-1).scatter(1, centre, torch.arange(count, device=x.device).expand(b, -1))
        return Clusters(centre, group)
