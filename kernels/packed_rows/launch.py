# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Launches of Triton kernels that restore rows as they read them: what packed and coded rows share.

A program takes a share of the rows of one (sample, key/value head) pair, a tile at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from tokred.kernels.rows import contiguous_steps

# Rows of a tile; shares of a pair's rows, so that few heads still fill a GPU.
_TILE, _PROGRAMS = 64, 512


class Held(Protocol):
    """Rows ``[B, Hk, P, D]`` in some form."""

    @property
    def count(self) -> int:
        """Rows ``P`` of each head."""

    @property
    def width(self) -> int:
        """Numbers ``D`` of a row."""


class Given(NamedTuple):
    """Arguments of kernels for rows in a form: tensors without gaps inside a pair, strides of samples and heads, and
    constants of the form."""

    parts: tuple[Tensor, ...]
    strides: tuple[int, ...]
    constants: dict[str, int]


def without_gaps(x: Tensor) -> Tensor:
    """``x``, or a copy where units of a head do not follow one another."""
    return x if x.stride()[2:] == contiguous_steps(x.shape[2:]) else x.contiguous()


def scores(kernel: Any, q: Tensor, rows: Held, given: Given) -> Tensor:
    """``[B, Hk, G, P]`` float32: products of queries ``[B, Hk, G, D]`` with all rows, by a kernel."""
    b, heads, g, _ = q.shape
    out = torch.empty(b, heads, g, rows.count, dtype=torch.float32, device=q.device)
    if rows.count:
        parts, strides, constants = given
        splits, share = _shares(b * heads, rows.count)
        kernel[(b * heads, splits)](
            q.contiguous(), *parts, out, heads, g, rows.count, share, *strides, **constants, **_blocks(g, rows.width)
        )
    return out


def sums(kernel: Any, weights: Tensor, rows: Held, given: Given) -> Tensor:
    """``[B, Hk, G, D]`` float32: sums of all rows by weights ``[B, Hk, G, P]``, by a kernel."""
    b, heads, g, count = weights.shape
    parts, strides, constants = given
    splits, share = _shares(b * heads, count)
    out = torch.empty(b, heads, splits, g, rows.width, dtype=torch.float32, device=weights.device)
    kernel[(b * heads, splits)](
        weights.contiguous(), *parts, out, heads, g, count, share, splits, *strides, **constants,
        **_blocks(g, rows.width),
    )  # fmt: skip
    return out.sum(2)


def _shares(pairs: int, count: int) -> tuple[int, int]:
    """Shares of each pair's rows, and rows of one."""
    splits = max(1, min(-(-count // _TILE), _PROGRAMS // pairs))
    share = -(-count // splits)
    return -(-count // share), share


def _blocks(heads: int, width: int) -> dict[str, int]:
    """Sizes of a tile, powers of two that a product takes."""
    return {
        "HEADS": max(16, triton.next_power_of_2(heads)), "BLOCK_C": max(16, triton.next_power_of_2(width)),
        "BLOCK_T": _TILE,
    }  # fmt: skip
