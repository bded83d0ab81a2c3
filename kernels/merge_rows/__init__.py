"""``merge_rows`` and ``unmerge_rows``: the members of each slot of a reduction become one row, and back.

A reduction of ``N`` rows to ``M`` slots is given in compact form. ``representative`` ``(B, M)`` int64 is the input row
that stands for each slot; ``source`` ``(B, R)`` int64 are other input rows; ``target`` ``(B, R)`` int64 is the slot
each source goes into, or -1 where it is dropped. Slot ``m`` has the members ``representative[m]`` and every
``source[r]`` with ``target[r] == m``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.dispatch import traced, use_kernel, why_not
from tokred.kernels.gather_rows import reference as gather_reference
from tokred.kernels.gather_rows.registration import refusals as gather_refusals
from tokred.kernels.merge_rows import reference
from tokred.kernels.merge_rows.registration import refusals, size_refusals, slot_totals
from tokred.kernels.rows import check_index, check_range, check_shape

__all__ = [
    "MODES",
    "MergedNorm",
    "merge_rows",
    "merge_rows_norm",
    "merge_sizes",
    "merge_tokens",
    "unmerge_rows",
    "why_not_kernel",
]

_merge_op = torch.ops.tokred.merge_rows.default
_merge_norm_op = torch.ops.tokred.merge_rows_norm.default
_gather_op = torch.ops.tokred.gather_rows.default

MODES = ("mean", "sum", "max", "mlerp", "keep")


class MergedNorm(NamedTuple):
    """Merged rows and their LayerNorm, both ``(B, M, C)``."""

    x: Tensor
    normed: Tensor


def merge_rows(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
    slot_size: Tensor | None = None,
) -> Tensor:
    """Combine the members of each slot into one row.

    Modes: ``mean`` is ``sum(w s x) / sum(w s)``; ``sum`` is ``sum(w x)``; ``max`` the maximum per channel; ``mlerp``
    the direction of the mean with the length of the longest member, or that member itself where the mean is shorter
    than 1e-6 (the representative before the sources, these in the order of their rows); ``keep`` the representative.
    Half precision is accumulated in float32. Without weights a slot with one member holds exactly that row. A ``mean``
    whose weights are all zero is its representative.

    Args:
        x: ``(B, N, C)``, any float type.
        representative: ``(B, M)`` int64 in ``[0, N)``.
        source: ``(B, R)`` int64 in ``[0, N)``.
        target: ``(B, R)`` int64 in ``[0, M)``, or -1 to drop the source.
        size: ``(B, N)`` float, how many original tokens each row stands for; None: one each.
        weight: ``(B, N)`` float, not negative; an extra weight per row; None: ones.
        mode: one of :data:`MODES`.
        slot_size: ``(B, M)`` what :func:`merge_sizes` answered for ``size``, where it is at hand: saves the torch path
            summing the sizes again.

    Returns:
        ``(B, M, C)`` of ``x``'s type.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape does not fit, or ``mode`` is unknown; with ``TOKRED_DEBUG=1`` also an index out of range.

    Source: Bolya et al., Token Merging, ICLR 2023 (mean); Kim et al., Token Fusion, WACV 2024 (mlerp).
    """
    _check_merge(x, representative, source, target, size, weight, mode)
    if use_kernel("merge_rows", x, lambda: refusals(x, size, weight, mode)):
        return _merge_op(x, representative, source, target, size, weight, mode)  # type: ignore[no-any-return]
    if mode == "mean" and weight is None and source.shape[1] and _in_place(x, size) and bool((target >= 0).all()):
        return reference.merge_tokens(x, representative, source, target, size)[0]
    if slot_size is not None:
        _check_per_row("slot_size", slot_size, x.shape[0], representative.shape[1], x.device)
    return reference.merge_rows(x, representative, source, target, size, weight, mode, slot_size)


def merge_rows_norm(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
) -> MergedNorm:
    """:func:`merge_rows` and the LayerNorm of the sub-layer that follows, from one read of the rows.

    Args:
        x: ``(B, N, C)``; this and the reduction as in :func:`merge_rows`.
        representative: ``(B, M)``.
        source: ``(B, R)``.
        target: ``(B, R)``.
        norm_weight: ``(C,)`` scale of the LayerNorm, or None.
        norm_bias: ``(C,)`` shift of the LayerNorm, or None.
        eps: added to the variance.
        size: ``(B, N)``, or None.
        weight: ``(B, N)``, or None.
        mode: one of :data:`MODES`.

    Returns:
        The merged rows, and their LayerNorm in the same type.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape does not fit, or ``mode`` is unknown.
    """
    _check_merge(x, representative, source, target, size, weight, mode)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            check_shape(name, value, (x.shape[2],))
    if use_kernel("merge_rows_norm", x, lambda: refusals(x, size, weight, mode, norm=True)):
        rows = (x, representative, source, target, size, weight, mode)
        return MergedNorm(*_merge_norm_op(*rows, norm_weight, norm_bias, eps))
    merged = reference.merge_rows(x, representative, source, target, size, weight, mode)
    return MergedNorm(merged, reference.layer_norm(merged, norm_weight, norm_bias, eps))


def merge_sizes(size: Tensor | None, representative: Tensor, source: Tensor, target: Tensor, n: int) -> Tensor:
    """How many original tokens each slot stands for: the sum of its members' sizes. Weights do not matter.

    Args:
        size: ``(B, N)`` float, or None where every row is one original token.
        representative: ``(B, M)`` int64 in ``[0, N)``.
        source: ``(B, R)`` int64 in ``[0, N)``.
        target: ``(B, R)`` int64 in ``[0, M)``, or -1.
        n: number of rows ``N``.

    Returns:
        ``(B, M)`` float32.

    Raises:
        TypeError: an index is not int64.
        ValueError: a shape does not fit; with ``TOKRED_DEBUG=1`` also an index out of range.
    """
    _check_reduction(representative, source, target, n, representative.shape[0], representative.device)
    if size is not None:
        _check_per_row("size", size, representative.shape[0], n, representative.device)
    like = representative if size is None else size
    if use_kernel("merge_sizes", like, lambda: size_refusals(size)):
        return slot_totals(None if size is None else size.float(), representative, source, target)
    return reference.merge_sizes(size, representative, source, target, n)


def merge_tokens(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    size: Tensor | None = None,
    complete: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`merge_rows` with mode ``mean``, and :func:`merge_sizes`: what a block does with its tokens, in one call.

    Args:
        x: ``(B, N, C)``.
        representative: ``(B, M)``; this and the next two as in :func:`merge_rows`.
        source: ``(B, R)``.
        target: ``(B, R)``.
        size: ``(B, N)`` float32, or None.
        complete: no target is -1, which saves the torch path from looking.

    Returns:
        The rows ``(B, M, C)``, and the sizes of the slots ``(B, M)`` float32.

    Raises:
        TypeError, ValueError: as :func:`merge_rows`.
    """
    if complete and _in_place(x, size):
        _check_merge(x, representative, source, target, size, None, "mean")
        return reference.merge_tokens(x, representative, source, target, size)
    totals = merge_sizes(size, representative, source, target, x.shape[1])
    return merge_rows(x, representative, source, target, size=size, slot_size=totals), totals


def _in_place(x: Tensor, size: Tensor | None) -> bool:
    """True where the torch path may look at values and write into its results: a plain CPU call without gradients."""
    recording = torch.is_grad_enabled() and (x.requires_grad or (size is not None and size.requires_grad))
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype != torch.float64
        and x.is_contiguous()
        and (size is None or size.dtype == torch.float32)
        and not recording
        and not traced()
        and not use_kernel("merge_rows", x, lambda: refusals(x, size, None, "mean"))
    )


def unmerge_rows(y: Tensor, index: Tensor) -> Tensor:
    """Give every input row the row of its slot: the inverse of a merge, as one gather.

    Args:
        y: ``(B, M, C)``.
        index: ``(B, N)`` int64, the slot of each input row in ``[0, M)``; -1 gives a row of zeros.

    Returns:
        ``(B, N, C)``.

    Raises:
        TypeError: ``index`` is not int64.
        ValueError: a shape does not fit; with ``TOKRED_DEBUG=1`` also an index out of range.
    """
    if y.ndim != 3 or not y.is_floating_point():
        raise ValueError(f"y must be (B, M, C) of a float type, got {tuple(y.shape)} of {y.dtype}")
    check_index("index", index, (y.shape[0], None), y.device)
    check_range("index", index, -1, y.shape[1])
    if use_kernel("unmerge_rows", y, lambda: gather_refusals(y)):
        return _gather_op(y, index, True)  # type: ignore[no-any-return]
    return gather_reference.gather_rows_or_zero(y, index)


def why_not_kernel(
    x: Tensor, *, size: Tensor | None = None, weight: Tensor | None = None, mode: str = "mean", norm: bool = False
) -> str | None:
    """The reason for which :func:`merge_rows` would not reach its Triton kernel, or None if it would.

    Args:
        x: ``(B, N, C)``; this and the next three as in :func:`merge_rows`.
        size: ``(B, N)``, or None.
        weight: ``(B, N)``, or None.
        mode: one of :data:`MODES`.
        norm: ask for :func:`merge_rows_norm`.
    """
    return why_not(x, lambda: refusals(x, size, weight, mode, norm=norm))


def _check_merge(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, C), got {tuple(x.shape)}")
    batch, n, _ = x.shape
    _check_reduction(representative, source, target, n, batch, x.device)
    if size is not None:
        _check_per_row("size", size, batch, n, x.device)
    if weight is not None:
        _check_per_row("weight", weight, batch, n, x.device)


def _check_reduction(
    representative: Tensor, source: Tensor, target: Tensor, n: int, batch: int, device: torch.device
) -> None:
    check_index("representative", representative, (batch, None), device)
    check_index("source", source, (batch, None), device)
    check_index("target", target, (batch, source.shape[1]), device)
    check_range("representative", representative, 0, n)
    check_range("source", source, 0, n)
    check_range("target", target, -1, representative.shape[1])


def _check_per_row(name: str, value: Tensor, batch: int, n: int, device: torch.device) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a float tensor, got {found}")
    check_shape(name, value, (batch, n))
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the rows are on {device}")
