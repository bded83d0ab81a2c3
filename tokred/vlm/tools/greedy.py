"""Greedy sets of tokens that differ from each other: farthest points, and the determinant of a kernel.

Both pick one token after the other and hold on to what the earlier picks mean for every other token, so that a pick
costs one row of similarities. Up to 2,048 tokens the rows are read from a matrix made at once; beyond, each is made
when it is needed. All in float32; equal values go to the lower index. The host never waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokred.core.selection import highest
from tokred.kernels.dispatch import accumulator_dtype, without_autocast
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.greedy_rows import determinant_rows, determinant_steps, farthest_rows
from tokred.kernels.similarity_rows import best_match

Distance = Literal["cos", "l1", "l2"]

# A matrix of all pairs is stored up to so many tokens.
DENSE = 2048
# Entries of a block of pairs, where there is no matrix.
_BLOCK = DENSE * DENSE
# A gain that is no larger, or no larger than this share of what the token alone would gain, is none: it is what
# rounding leaves of a token that the picks span already.
LEAST_GAIN = 1e-10
LEAST_SHARE = 1e-5


def directions(x: Tensor) -> Tensor:
    """Rows of length one in float32; a zero row stays zero (norms are clamped to 1e-12)."""
    x = x.to(accumulator_dtype(x.dtype))
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12)


def farthest_points(
    x: Tensor,
    n: int,
    *,
    metric: Distance = "cos",
    start: int | Literal["isolated", "medoid"] = "isolated",
    dense: int = DENSE,
) -> Tensor:
    """Pick tokens one by one, each as far as possible from its nearest one among those picked before.

    Args:
        x: ``(B, N, C)``, any float type.
        n: how many, 1 to ``N``.
        metric: ``cos``: one minus the cosine; ``l1`` or ``l2``: of the difference of two tokens.
        start: the first pick: the token whose nearest other one is farthest; the one with the least sum of distances;
            or the token of that number.
        dense: up to so many tokens the distances of all pairs are stored.

    Returns:
        ``(B, n)`` int64, in the order of the picks.

    Raises:
        ValueError: ``n`` or ``start`` is out of range, or ``metric`` or ``start`` is unknown.
    """
    b, length, _ = x.shape
    if not 1 <= n <= length:
        raise ValueError(f"n must lie in 1 to the {length} tokens, got {n}")
    if metric not in ("cos", "l1", "l2"):
        raise ValueError(f"metric is {metric!r}; allowed are 'cos', 'l1', 'l2'")
    with torch.no_grad(), without_autocast(x):
        pairs = _Distances(x, metric, dense)
        pick = _first(pairs, start, b, length, x.device)
        if pairs.full is not None:
            return farthest_rows(pairs.full, pick, n)
        picks = [pick]
        nearest = pairs.of(pick)
        for _ in range(n - 1):
            pick = nearest.argmax(1)
            picks.append(pick)
            nearest = torch.minimum(nearest, pairs.of(pick))
        return torch.stack(picks, 1)


def _first(pairs: _Distances, start: int | str, b: int, n: int, device: torch.device) -> Tensor:
    if isinstance(start, int):
        if not 0 <= start < n:
            raise ValueError(f"start is token {start}; allowed are 0 to {n - 1}")
        return torch.full((b,), start, device=device)
    if start == "isolated":
        return pairs.isolation().argmax(1)
    if start == "medoid":
        return pairs.total().argmin(1)
    raise ValueError(f"start is {start!r}; allowed are 'isolated', 'medoid' or the number of a token")


class _Distances:
    """Distances of all pairs; that of a token to itself counts as minus infinity, so that no pick is picked again."""

    def __init__(self, x: Tensor, metric: str, dense: int) -> None:
        self.metric = metric
        self.x = directions(x) if metric == "cos" else x.to(accumulator_dtype(x.dtype))
        self.n = x.shape[1]
        self.full = self._block(self.x) if self.n <= dense else None
        if self.full is not None:
            self.full.diagonal(dim1=1, dim2=2).fill_(-torch.inf)

    def _block(self, rows: Tensor) -> Tensor:
        """``(B, K, N)`` from ``(B, K, C)``."""
        if self.metric == "cos":
            return torch.baddbmm(rows.new_ones(1), rows, self.x.mT, alpha=-1)
        if self.metric == "l2":
            return torch.cdist(rows, self.x, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.cdist(rows, self.x, p=1.0)

    def of(self, picks: Tensor) -> Tensor:
        """``(B, N)`` distances from ``(B,)`` picks."""
        at = picks.unsqueeze(1)
        return self._block(gather_rows(self.x, at)).squeeze(1).scatter_(1, at, -torch.inf)

    def isolation(self) -> Tensor:
        """``(B, N)`` the distance of every token to its nearest other one."""
        if self.full is not None:
            return self.full.masked_fill(self.full == -torch.inf, torch.inf).amin(2)
        if self.metric != "l1":
            found = best_match(self.x, self.x, metric="dot" if self.metric == "cos" else "distance", exclude_self=True)
            return 1 - found.score if self.metric == "cos" else -found.score
        return torch.cat([self._others(i, step).amin(2) for i, step in self._steps()], 1)

    def total(self) -> Tensor:
        """``(B, N)`` the sum of every token's distances to the others."""
        if self.full is not None:
            return self.full.masked_fill(self.full == -torch.inf, 0).sum(2)
        return torch.cat([self._others(i, step, 0.0).sum(2) for i, step in self._steps()], 1)

    def _steps(self) -> list[tuple[int, int]]:
        step = max(1, _BLOCK // (self.n * self.x.shape[0]))
        return [(i, min(step, self.n - i)) for i in range(0, self.n, step)]

    def _others(self, first: int, count: int, own: float = math.inf) -> Tensor:
        block = self._block(self.x[:, first : first + count])
        block.diagonal(first, 1, 2).fill_(own)
        return block


class Picks(NamedTuple):
    """A greedy choice.

    Attributes:
        order: ``(B, n)`` int64, the picks in their order.
        gain: ``(B, n)`` float32, what each multiplied the determinant with; 0 where the kernel was exhausted.
        chosen: ``(B, n)`` int64, ascending: the picks, and in place of those that found the kernel exhausted the tokens
            with the highest weights that were not picked.
    """

    order: Tensor
    gain: Tensor
    chosen: Tensor


def determinant_points(x: Tensor, n: int, weight: Tensor | None = None, *, dense: int = DENSE) -> Picks:
    """Pick tokens one by one, each the one that makes the determinant of the kernel among the picks largest.

    The kernel of two tokens is their cosine times the weights of both. What a pick would multiply the determinant with
    is updated for all tokens by one step of a Cholesky factorisation.

    Args:
        x: ``(B, N, C)``, any float type.
        n: how many, 1 to ``N``.
        weight: ``(B, N)``, not negative; None: one each.
        dense: up to so many tokens the kernel is stored.

    Raises:
        ValueError: ``n`` is out of range.

    Source: Chen et al., Fast Greedy MAP Inference for Determinantal Point Process, NeurIPS 2018; the order in which an
    exhausted kernel is filled up is ours.
    """
    b, length, _ = x.shape
    if not 1 <= n <= length:
        raise ValueError(f"n must lie in 1 to the {length} tokens, got {n}")
    with torch.no_grad(), without_autocast(x):
        rows = directions(x)
        weight = rows.new_ones(b, length) if weight is None else weight.to(rows.dtype)
        # A token's cosine with itself is one, not what rounding makes of it: alike weights are a tie.
        gains: Tensor = weight.square() * (rows != 0).any(-1)
        least = (gains * LEAST_SHARE).clamp_min(LEAST_GAIN)
        rows = rows * weight.unsqueeze(-1)
        if length <= dense:
            picks, gain = determinant_rows(rows @ rows.mT, gains, least, n)
        else:
            picks, gain = determinant_steps(lambda pick: gather_rows(rows, pick) @ rows.mT, gains, least, n)
        return Picks(picks, gain, _filled(picks, gain > 0, weight))


def _filled(picks: Tensor, alive: Tensor, weight: Tensor) -> Tensor:
    n = weight.shape[1]
    # Picks from an exhausted kernel land in a column of their own.
    score = torch.nn.functional.pad(weight, (0, 1)).scatter(1, torch.where(alive, picks, n), torch.inf)[:, :n]
    return highest(score, picks.shape[1])[0]
