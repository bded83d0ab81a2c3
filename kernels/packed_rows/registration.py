# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators ``tokred::packed_scores`` and ``tokred::packed_sums``; neither has a gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.dispatch import Refusal, interpreting, use_kernel
from tokred.kernels.packed_rows.reference import EVEN, PackedRows, scores_reference, sums_reference

# A program holds a few rows.
WIDEST = 512

_library = torch.library.Library("tokred", "FRAGMENT")
_ARGUMENTS = "Tensor codes, Tensor scale, Tensor zero, int bits, int group, bool tokens"
_library.define(f"packed_scores(Tensor q, {_ARGUMENTS}) -> Tensor")
_library.define(f"packed_sums(Tensor weights, {_ARGUMENTS}) -> Tensor")


def even(bits: int, group: int) -> bool:
    """True where the codes of a group fill its bytes."""
    return bits in EVEN and group * bits % 8 == 0


def refusals(x: Tensor, bits: int, group: int, width: int) -> list[Refusal]:
    """Why the Triton kernels cannot run, besides the device."""
    return [
        Refusal(bits not in EVEN, f"the kernel reads 1, 2, 4 or 8 bits, not {bits}"),
        *restoring_refusals(x, width),
    ]


def restoring_refusals(x: Tensor, width: int) -> list[Refusal]:
    """Why kernels that restore rows as they read them cannot run, whatever the rows are held in."""
    return [
        Refusal(width > WIDEST, f"rows of {width} numbers are longer than the {WIDEST} that a program holds"),
        Refusal(x.dtype == torch.float64, "the kernel works in float32, not float64"),
        Refusal(x.numel() == 0, "the input is empty"),
    ]


def why_not_loops(x: Tensor, bits: int, group: int) -> str | None:
    """Why the compiled loops cannot run on a query or weights like ``x``; None: they can."""
    return dispatch.why_not_loops(
        x, [Refusal(not even(bits, group), f"{group} codes of {bits} bits do not fill whole bytes")]
    )


def _run(name: str, x: Tensor, rows: PackedRows) -> Tensor:
    if use_kernel(f"packed_{name}", x, lambda: refusals(x, rows.bits, rows.group, rows.width)):
        from tokred.kernels.packed_rows import triton

        return getattr(triton, f"launch_{name}")(x, rows)  # type: ignore[no-any-return]
    loops = why_not_loops(x, rows.bits, rows.group) is None and not interpreting()
    if loops and x.numel() and rows.count and not (name == "sums" and rows.tokens):
        from tokred.kernels.packed_rows import cpu

        return getattr(cpu, name)(x, rows)  # type: ignore[no-any-return]
    return {"scores": scores_reference, "sums": sums_reference}[name](x, rows)


def _operator(
    name: str, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, tokens: bool
) -> Tensor:
    return _run(name, x, PackedRows(codes, scale, zero, bits, group, tokens))


for _name in ("scores", "sums"):
    _library.impl(f"packed_{_name}", functools.partial(_operator, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("tokred::packed_scores")
def _(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, tokens: bool) -> Tensor:
    rows = PackedRows(codes, scale, zero, bits, group, tokens)
    return q.new_empty((*q.shape[:3], rows.count), dtype=torch.float32)


@torch.library.register_fake("tokred::packed_sums")
def _(weights: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, tokens: bool) -> Tensor:
    rows = PackedRows(codes, scale, zero, bits, group, tokens)
    return weights.new_empty((*weights.shape[:3], rows.width), dtype=torch.float32)
