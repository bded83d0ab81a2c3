"""Checks of the arguments of a call; every message names the argument that is wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.similarity_rows.windows import Windows, gather_mask, gather_rows

METRICS = ("cosine", "dot", "distance")
FUNCTIONS = ("elu", "gaussian", "identity", "relu")
REDUCTIONS = ("max", "sum", "count", "topk")
MAX_K = 16


class Call(NamedTuple):
    """A checked call; ``windows`` is None once rows have been gathered.

    Attributes:
        a: ``(B, Na, D)`` or ``(B, ..., Na, D)``.
        b: ``(B, Nb, D)`` or ``(B, ..., Nb, D)``.
        metric: a name of `METRICS`.
        a_mask: ``(..., Na)`` like ``a``.
        b_mask: ``(..., Nb)`` like ``b``.
        exclude_self: leave pairs of the same index out.
        windows: groups to compare in.
    """

    a: Tensor
    b: Tensor
    metric: str
    a_mask: Tensor | None
    b_mask: Tensor | None
    exclude_self: bool
    windows: Windows | None

    def result_shape(self) -> tuple[int, ...]:
        """``(..., Na)``, or ``(B, W, Na)`` with windows."""
        return (self.a.shape[0], *self.windows.a.shape) if self.windows is not None else self.a.shape[:-1]

    def partners(self) -> int | Tensor:
        """How many rows of ``b`` each row of ``a`` is compared with; a tensor broadcasts over ``result_shape``."""
        if self.windows is None:
            return self.b.shape[-2] if self.b_mask is None else self.b_mask.sum(-1, keepdim=True)
        mask = gather_mask(self.b_mask, self.windows.b, self.windows.padded)
        return self.windows.b.shape[-1] if mask is None else mask.sum(-1, keepdim=True)

    def gathered(self) -> Call:
        """The same call on ``(B, W, n, D)`` tensors; indices are then inside the groups."""
        if self.windows is None:
            return self
        to_a, to_b, padded = self.windows
        a_mask, b_mask = gather_mask(self.a_mask, to_a, padded), gather_mask(self.b_mask, to_b, padded)
        rows = gather_rows(self.a, to_a)
        columns = rows if self.a is self.b and to_a is to_b else gather_rows(self.b, to_b)
        a_mask, b_mask = _expand(a_mask, rows), _expand(b_mask, columns)
        return Call(rows, columns, self.metric, a_mask, b_mask, self.exclude_self, None)


def _expand(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(x.shape[:-1])


def check_function(function: str, margin: float) -> None:
    """Refuse a function of a sum that is not known, and a margin that it does not allow."""
    if function not in FUNCTIONS:
        raise ValueError(f"function is {function!r}; allowed are {', '.join(FUNCTIONS)}")
    if function == "gaussian" and not margin < 1:
        raise ValueError(f"margin is {margin}; the gaussian function needs one below 1 (its deviation is 1 - margin)")


def checked(
    a: Tensor,
    b: Tensor,
    metric: str,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    exclude_self: bool,
    windows: Windows | None,
) -> Call:
    """The call with its masks expanded, or an error that names the argument."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed are {', '.join(METRICS)}")
    if a.dtype != b.dtype or not a.is_floating_point():
        raise TypeError(f"a is {a.dtype} and b {b.dtype}; both must be of the same floating-point type")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; both must be on the same device")
    if a.dim() < 3 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected (..., Na, D) and (..., Nb, D) "
            "with the same leading dimensions, at least one"
        )
    if a_mask is not None:
        a_mask = _checked_mask("a_mask", a_mask, a)
    if b_mask is not None:
        b_mask = _checked_mask("b_mask", b_mask, b)
    rows, columns = a, b
    if windows is not None:
        _check_windows(windows, a)
        rows, columns = windows.a.unsqueeze(-1), windows.b.unsqueeze(-1)
    if exclude_self and rows.shape[-2] != columns.shape[-2]:
        raise ValueError(
            f"exclude_self compares rows of equal number; got {rows.shape[-2]} of a and {columns.shape[-2]} of b"
        )
    return Call(a, b, metric, a_mask, b_mask, exclude_self, windows)


def _checked_mask(name: str, mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}; it must be bool, True = takes part")
    if mask.device != x.device:
        raise ValueError(f"{name} is on {mask.device}, the rows are on {x.device}")
    if mask.shape != x.shape[:-1] and mask.shape != x.shape[-2:-1]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected {tuple(x.shape[:-1])} or {tuple(x.shape[-2:-1])}"
        )
    return mask.expand(x.shape[:-1])


def _check_windows(windows: Windows, a: Tensor) -> None:
    if a.dim() != 3:
        raise ValueError(f"windows need a and b of shape (B, N, D); a has {tuple(a.shape)}")
    for name, positions in (("windows.a", windows.a), ("windows.b", windows.b)):
        if positions.dtype != torch.int64:
            raise TypeError(f"{name} is {positions.dtype}; positions must be int64")
        if positions.device != a.device:
            raise ValueError(f"{name} is on {positions.device}, the rows are on {a.device}")
    if windows.a.dim() != 2 or windows.b.dim() != 2 or windows.a.shape[0] != windows.b.shape[0]:
        raise ValueError(
            f"windows.a has shape {tuple(windows.a.shape)} and windows.b {tuple(windows.b.shape)}; "
            "expected (W, Na) and (W, Nb)"
        )
