# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators ``tokred::coded_scores`` and ``tokred::coded_sums``; neither has a gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tokred.kernels.coded_rows.reference import CodedRows, scores_reference, sums_reference
from tokred.kernels.dispatch import interpreting, use_kernel, why_not_loops
from tokred.kernels.packed_rows.registration import restoring_refusals

_library = torch.library.Library("tokred", "FRAGMENT")
_ARGUMENTS = "Tensor first, Tensor second, Tensor table, Tensor factor, int kind, int width, int bits, bool unit"
_library.define(f"coded_scores(Tensor q, {_ARGUMENTS}) -> Tensor")
_library.define(f"coded_sums(Tensor weights, {_ARGUMENTS}) -> Tensor")


def why_not_compiled(x: Tensor) -> str | None:
    """Why the compiled loops cannot run on a query or weights like ``x``; None: they can."""
    return why_not_loops(x)


def _run(name: str, x: Tensor, rows: CodedRows) -> Tensor:
    if use_kernel(f"coded_{name}", x, lambda: restoring_refusals(x, rows.width)):
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
