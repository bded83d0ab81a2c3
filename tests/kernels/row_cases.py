"""Random reductions and a loop over their groups: the oracle of the row merges' tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    representative: Tensor
    source: Tensor
    target: Tensor


def make(batch: int, n: int, r: int, *, drops: bool = True, seed: int = 0) -> Case:
    """A random reduction of n rows to n - r slots, some sources dropped."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, n, generator=generator).argsort(1)
    target = torch.randint(-1 if drops else 0, n - r, (batch, r), generator=generator)
    return Case(order[:, r:], order[:, :r], target)


def members(case: Case, b: int, m: int) -> list[int]:
    """The rows of a slot: the representative, then the sources in the order of their rows."""
    found = [int(s) for s, t in zip(case.source[b], case.target[b], strict=True) if int(t) == m]
    return [int(case.representative[b, m]), *sorted(found)]


def oracle(
    x: Tensor, case: Case, size: Tensor | None, weight: Tensor | None, mode: str, dtype: torch.dtype = torch.float64
) -> Tensor:
    """One group at a time, in ``dtype`` arithmetic; differentiable."""
    x = x.to(dtype)
    rows = []
    for b in range(x.shape[0]):
        for m in range(case.representative.shape[1]):
            group = members(case, b, m)
            rows.append(
                combine(x[b, group], *(None if t is None else t[b, group].to(dtype) for t in (size, weight)), mode)
            )
    return torch.stack(rows).view(x.shape[0], -1, x.shape[2])


def combine(rows: Tensor, size: Tensor | None, weight: Tensor | None, mode: str) -> Tensor:
    ones = rows.new_ones(rows.shape[0])
    weight = ones if weight is None else weight
    if mode == "keep" or (rows.shape[0] == 1 and mode != "sum"):
        return rows[0]
    if mode == "max":
        return rows.amax(0)
    if mode == "sum":
        return (rows * weight[:, None]).sum(0)
    gain = weight * (ones if size is None else size)
    mean = (rows * gain[:, None]).sum(0) / gain.sum()
    if mode == "mean":
        return mean
    lengths = rows.norm(dim=1)
    if float(mean.detach().norm()) < 1e-6:
        return rows[int(lengths.detach().argmax())]
    return mean / mean.norm() * lengths.max()


def assert_as_good(ours: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Our error is at most twice that of plain arithmetic in the same type, beyond two roundings of the answer."""
    eps = torch.finfo(ours.dtype).eps
    error = (ours.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2 * eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def per_row(batch: int, n: int, seed: int) -> Tensor:
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.25


def rows(batch: int, n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(batch, n, c, generator=torch.Generator().manual_seed(seed)).to(dtype)
