"""Checks of an operator against a float64 reference on random inputs.

The error of every output is ``||out - ref|| / ||ref||``. It may be a small multiple of what the plain torch chain has
in the same low precision; so may the largest error of a single element, in which one misplaced row shows that
disappears in a norm. Fresh memory holds NaN while the operator runs, and two more runs have to agree bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs

# How much worse than the plain chain an operator may be: in the norm, and in its worst element.
NORM_MULTIPLE = 2.0
WORST_MULTIPLE = 4.0
# What is allowed where the chain is exact or nearly so. Float32 products may be three TF32 products.
NORM_FLOOR = 5e-6
WORST_FLOOR = 1e-4


class Verdict(NamedTuple):
    """The outcome of a check.

    Attributes:
        error: relative error of the output that comes closest to its bound.
        plain: the plain chain's error in the same output.
        allowed: the bound.
        failure: what is wrong; empty when the check passed.
    """

    error: float
    plain: float
    allowed: float
    failure: str


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Memory that torch allocates and does not write holds NaN; integers hold their largest value.

    Raises:
        RuntimeError: this build of torch does not fill memory.
    """
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            if not bool(torch.empty(64, device=device).isnan().all()):
                raise RuntimeError("torch did not fill fresh memory with NaN: unwritten outputs would not show")
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative error in the norm, and the largest one of an element over the root mean square; NaN gives infinity."""
    out, reference = out.double(), reference.double()
    if out.shape != reference.shape:
        return float("inf"), float("inf")
    finite = reference.isfinite()
    if not bool(torch.where(finite, out.isfinite(), out == reference).all()):
        return float("inf"), float("inf")
    if not bool(finite.any()):
        return 0.0, 0.0
    difference = torch.where(finite, out - reference, 0.0)
    norm = torch.where(finite, reference, 0.0).norm()
    scale = norm / finite.sum().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / norm.clamp_min(tiny)), float(difference.abs().max() / scale.clamp_min(tiny))


@torch.no_grad()
def check(case: Case, inputs: Inputs, device: torch.device, *, repeat: bool = True) -> Verdict:
    """Run a case's operator and its chain, and compare.

    Args:
        case: the operator.
        inputs: from ``case.make``.
        device: where they are.
        repeat: whether two more runs must agree bit for bit.
    """
    with poisoned(device):
        outputs = tuple(case.ours(inputs))
    again = [tuple(case.ours(inputs)) for _ in range(2)] if repeat else []
    wide, reference = case.reference(inputs)
    expected = case.values(wide, reference)
    found = case.values(wide, outputs)
    plain = case.values(wide, tuple(case.chain(inputs)))
    if len(found) != len(expected):
        return Verdict(float("inf"), 0.0, 0.0, f"{len(found)} outputs, expected {len(expected)}")
    worst = Verdict(0.0, 0.0, NORM_FLOOR, "")
    for number, (ours, theirs, right) in enumerate(zip(found, plain, expected, strict=True)):
        verdict = _judge(f"output {number}", errors(ours, right), errors(theirs, right))
        if bool(verdict.failure) > bool(worst.failure) or verdict.error / verdict.allowed > worst.error / worst.allowed:
            worst = verdict
    if not worst.failure and again and not _same(*again):
        return worst._replace(failure="two runs differ")
    return worst


def _judge(name: str, ours: tuple[float, float], plain: tuple[float, float]) -> Verdict:
    bounds = max(NORM_MULTIPLE * plain[0], NORM_FLOOR), max(WORST_MULTIPLE * plain[1], WORST_FLOOR)
    failure = ""
    if plain[0] == float("inf"):
        failure = f"{name}: the chain itself is wrong"
    elif not ours[0] <= bounds[0]:
        failure = f"{name}: error {ours[0]:.2e}, allowed {bounds[0]:.2e}"
    elif not ours[1] <= bounds[1]:
        failure = f"{name}: an element is {ours[1]:.2e} off, allowed {bounds[1]:.2e}"
    return Verdict(ours[0], plain[0], bounds[0], failure)


def _same(first: Outputs, second: Outputs) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
