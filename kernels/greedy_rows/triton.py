# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the greedy choices: one program a sample makes all picks, one after the other.

A pick costs one row of the matrix instead of a launch for each of several small operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the factorisation that a program reads together.
STEPS = 8


@triton.jit(do_not_specialize=["n"])
def farthest_rows_fwd_kernel(distance, first, picks, N, n, BLOCK_N: tl.constexpr):
    """``picks[b]``: see the reference. The smallest distances stay in registers."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    inside = column < N
    rows = distance + b * N * N
    pick = tl.load(first + b)
    tl.store(picks + b * n, pick)
    nearest = tl.load(rows + pick * N + column, mask=inside, other=float("-inf"))
    for t in range(1, n):
        best = tl.max(nearest, axis=0)
        pick = tl.min(tl.where((nearest == best) & inside, column, N), axis=0).to(tl.int64)
        tl.store(picks + b * n + t, pick)
        row = tl.load(rows + pick * N + column, mask=inside, other=float("-inf"))
        nearest = tl.minimum(nearest, row)


@triton.jit(do_not_specialize=["n"])
def determinant_rows_fwd_kernel(
    kernel, gains, least, factor, picks, gained, N, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """``picks[b]`` and ``gained[b]``: see the reference. ``factor`` ``[B, n, N]`` is scratch, a row written by each
    pick and read by all later ones."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    inside = column < N
    rows = kernel + b * N * N
    known = factor + b * n * N
    gain = tl.load(gains + b * N + column, mask=inside, other=-1.0)
    floor = tl.load(least + b * N + column, mask=inside, other=0.0)
    for t in range(n):
        best = tl.max(gain, axis=0)
        pick = tl.min(tl.where((gain == best) & inside, column, N), axis=0).to(tl.int64)
        best = tl.maximum(best, 0.0)
        tl.store(picks + b * n + t, pick)
        tl.store(gained + b * n + t, best)
        row = tl.load(rows + pick * N + column, mask=inside, other=0.0)
        for start in range(0, t, BLOCK_T):
            step = start + tl.arange(0, BLOCK_T)
            weight = tl.load(known + step * N + pick, mask=step < t, other=0.0)
            tile = tl.load(
                known + step[:, None] * N + column[None, :], mask=(step < t)[:, None] & inside[None, :], other=0.0
            )
            row -= tl.sum(weight[:, None] * tile, axis=0)
        scaled = tl.where(best > 0, row / tl.sqrt(tl.maximum(best, 1e-30)), 0.0)
        tl.store(known + t * N + column, scaled, mask=inside)
        # The next pick reads what other threads have written.
        tl.debug_barrier()
        gain -= scaled * scaled
        gain = tl.where(gain > floor, gain, 0.0)
        gain = tl.where(column == pick, -1.0, gain)
        gain = tl.where(inside, gain, -1.0)


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


def launch_farthest(distance: Tensor, first: Tensor, n: int) -> Tensor:
    """One launch; shapes as in the reference."""
    b, length, _ = distance.shape
    picks = torch.empty(b, n, dtype=torch.int64, device=distance.device)
    block = triton.next_power_of_2(length)
    farthest_rows_fwd_kernel[(b,)](
        distance.contiguous(), first.contiguous(), picks, length, n, BLOCK_N=block, num_warps=_warps(block)
    )
    return picks


def launch_determinant(kernel: Tensor, gains: Tensor, least: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """One launch; shapes as in the reference."""
    b, length, _ = kernel.shape
    picks = torch.empty(b, n, dtype=torch.int64, device=kernel.device)
    gained = torch.empty(b, n, dtype=kernel.dtype, device=kernel.device)
    factor = torch.empty(b, n, length, dtype=kernel.dtype, device=kernel.device)
    block = triton.next_power_of_2(length)
    determinant_rows_fwd_kernel[(b,)](
        kernel.contiguous(), gains.contiguous(), least.contiguous(), factor, picks, gained, length, n,
        BLOCK_N=block, BLOCK_T=STEPS, num_warps=_warps(block),
    )  # fmt: skip
    return picks, gained
