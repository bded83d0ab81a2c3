# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators ``tokred::coded_scores`` and ``tokred::coded_sums``; neither has a gradient."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from tokred.kernels.coded_rows.reference import CodedRows, scores_reference, sums_reference
from tokred.kernels.dispatch import Refusal, interpreting, mode, traced, use_kernel

# A program holds a few rows.
WIDEST = 512

_library = torch.library.Library("tokred", "FRAGMENT")
_ARGUMENTS = "Tensor first, Tensor second, Tensor table, Tensor factor, int kind, int width, int bits, bool unit"
_library.define(f"coded_scores(Tensor q, {_ARGUMENTS}) -> Tensor")
_library.define(f"coded_sums(Tensor weights, {_ARGUMENTS}) -> Tensor")

_NUMBA_FOUND = importlib.util.find_spec("numba") is not None


def refusals(x: Tensor, width: int) -> list[Refusal]:
    """Why the Triton kernels cannot run, besides the device."""
    return [
        Refusal(width > WIDEST, f"rows of {width} numbers are longer than the {WIDEST} that a program holds"),
        Refusal(x.dtype == torch.float64, "the kernel works in float32, not float64"),
        Refusal(x.numel() == 0, "the input is empty"),
    ]


def why_not_compiled(x: Tensor) -> str | None:
    """Why the compiled loops cannot run on a query or weights like ``x``; None: they can."""
    table = (
        Refusal(x.device.type != "cpu", f"the tensors are on {x.device.type}"),
        Refusal(mode() == "torch", "TOKRED_KERNELS is torch"),
        Refusal(not _NUMBA_FOUND, "numba is not installed (pip install 'tokred[cpu]')"),
        Refusal(x.dtype == torch.float64, "the loops work in float32, not float64"),
        Refusal(traced(), "operations are being traced"),
    )
    return next((row.reason for row in table if row.applies), None)


def _run(name: str, x: Tensor, rows: CodedRows) -> Tensor:
    if use_kernel(f"coded_{name}", x, lambda: refusals(x, rows.width)):
        from tokred.kernels.coded_rows import triton

        return getattr(triton, f"launch_{name}")(x, rows)  # type: ignore[no-any-return]
    if why_not_compiled(x) is None and not interpreting() and x.numel() and rows.count:
        from tokred.kernels.coded_rows import cpu

        return getattr(cpu, name)(x, rows)  # type: ignore[no-any-return]
    return {"scores": scores_reference, "sums": sums_reference}[name](x, rows)


def _operator(
    name: str,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    table: Tensor,
    factor: Tensor,
    kind: int,
    width: int,
    bits: int,
    unit: bool,
) -> Tensor:
    return _run(name, x, CodedRows(first, second, table, factor, kind, width, bits, unit))


for _name in ("scores", "sums"):
    _library.impl(f"coded_{_name}", functools.partial(_operator, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("tokred::coded_scores")
def _(
    q: Tensor,
    first: Tensor,
    second: Tensor,
    table: Tensor,
    factor: Tensor,
    kind: int,
    width: int,
    bits: int,
    unit: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:3], first.shape[2]), dtype=torch.float32)


@torch.library.register_fake("tokred::coded_sums")
def _(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    table: Tensor,
    factor: Tensor,
    kind: int,
    width: int,
    bits: int,
    unit: bool,
) -> Tensor:
    return weights.new_empty((*weights.shape[:3], width), dtype=torch.float32)
