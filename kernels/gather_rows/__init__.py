"""``gather_rows`` and ``gather_cache``: compaction of tokens, and of the keys, values and positions of a KV cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.dispatch import use_kernel, why_not
from tokred.kernels.gather_rows import reference
from tokred.kernels.gather_rows.registration import cache_refusals, refusals
from tokred.kernels.rows import check_index, check_range, check_shape

__all__ = ["CacheRows", "gather_cache", "gather_cache_", "gather_rows", "why_not_kernel"]

_gather_op = torch.ops.tokred.gather_rows.default
_cache_op = torch.ops.tokred.gather_cache.default
_cache_out_op = torch.ops.tokred.gather_cache_out.default
_cache_in_place_op = torch.ops.tokred.gather_cache_.default


class CacheRows(NamedTuple):
    """Rows of a KV cache: keys and values ``(B, Hk, K, D)``, positions ``(B, Hk, K)``."""

    keys: Tensor
    values: Tensor
    positions: Tensor


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``x`` by index, as one pass over the rows that are kept.

    Args:
        x: ``(B, N, C)`` tokens or ``(B, H, N, D)`` heads, any type.
        index: ``(B, K)`` int64 in ``[0, N)``; with heads also ``(B, H, K)``, one index per head.

    Returns:
        ``(B, K, C)`` or ``(B, H, K, D)``.

    Raises:
        TypeError: ``index`` is not int64.
        ValueError: a shape does not fit; with ``TOKRED_DEBUG=1`` also an index out of range.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be (B, N, C) or (B, H, N, D), got {tuple(x.shape)}")
    per_head = x.ndim == 4 and index.ndim == 3
    check_index("index", index, (*x.shape[:2], None) if per_head else (x.shape[0], None), x.device)
    check_range("index", index, 0, x.shape[-2])
    if use_kernel("gather_rows", x, lambda: refusals(x)):
        return _gather_op(x, index, False)  # type: ignore[no-any-return]
    return reference.gather_rows(x, index)


def gather_cache(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    index: Tensor,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> CacheRows:
    """Compact a KV cache: the chosen rows of keys, values and positions, in one launch.

    Args:
        keys: ``(B, Hk, N, D)``.
        values: ``(B, Hk, N, Dv)``.
        positions: ``(B, Hk, N)`` integers, the position each row has in the sequence.
        index: ``(B, Hk, K)`` int64 in ``[0, N)``, one index per head.
        out: tensors to write into, of the results' shapes and types, sharing no memory with the inputs; None: new
            ones. Not differentiable when given.

    Returns:
        Keys ``(B, Hk, K, D)``, values ``(B, Hk, K, Dv)`` and positions ``(B, Hk, K)``.

    Raises:
        TypeError: ``index`` is not int64, or ``positions`` has no integer type.
        ValueError: a shape does not fit; with ``TOKRED_DEBUG=1`` also an index out of range.
    """
    _check_cache(keys, values, positions, index)
    if out is not None:
        _check_out(keys, values, positions, index, out)
    kernel = use_kernel("gather_cache", keys, lambda: cache_refusals(keys, values))
    if out is None:
        return CacheRows(*(_cache_op if kernel else reference.gather_cache)(keys, values, positions, index))
    if kernel:
        _cache_out_op(keys, values, positions, index, *out)
    else:
        reference.gather_cache_out(keys, values, positions, index, out)
    return CacheRows(*out)


def gather_cache_(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> CacheRows:
    """Compact a KV cache in place: the chosen rows move to the front, no second cache is allocated.

    Args:
        keys: ``(B, Hk, N, D)``; changed.
        values: ``(B, Hk, N, Dv)``; changed.
        positions: ``(B, Hk, N)`` integers; changed.
        index: ``(B, Hk, K)`` int64 in ``[0, N)``, strictly ascending along K, so that rows only move to the front.

    Returns:
        Views of the first K rows of the three. The rows behind them hold what was there before or copies of it.

    Raises:
        TypeError: ``index`` is not int64, or ``positions`` has no integer type.
        ValueError: a shape does not fit; with ``TOKRED_DEBUG=1`` also an index that is out of range or does not ascend.
    """
    _check_cache(keys, values, positions, index)
    _check_ascending(index)
    if use_kernel("gather_cache_", keys, lambda: cache_refusals(keys, values, in_place=True)):
        _cache_in_place_op(keys, values, positions, index)
    else:
        reference.gather_cache_(keys, values, positions, index)
    count = index.shape[-1]
    return CacheRows(keys[:, :, :count], values[:, :, :count], positions[:, :, :count])


def why_not_kernel(x: Tensor) -> str | None:
    """The reason for which rows like ``x`` would not be gathered by the Triton kernel, or None if they would."""
    return why_not(x, lambda: refusals(x))


def _check_cache(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> None:
    if keys.ndim != 4:
        raise ValueError(f"keys must be (B, Hk, N, D), got {tuple(keys.shape)}")
    batch, heads, n, _ = keys.shape
    check_shape("values", values, (batch, heads, n, None))
    check_shape("positions", positions, (batch, heads, n))
    if positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"positions must have an integer type, got {positions.dtype}")
    check_index("index", index, (batch, heads, None), keys.device)
    check_range("index", index, 0, n)


def _check_out(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    names = ("keys", "values", "positions")
    if len(out) != 3:
        raise ValueError(f"out must hold keys, values and positions, got {len(out)} tensors")
    for name, given, like in zip(names, out, (keys, values, positions), strict=True):
        check_shape(f"out {name}", given, (*index.shape, *like.shape[3:]))
        if given.dtype != like.dtype or given.device != like.device:
            raise ValueError(f"out {name} is {given.dtype} on {given.device}, expected {like.dtype} on {like.device}")


def _check_ascending(index: Tensor) -> None:
    if dispatch.traced() or not dispatch.debug() or index.shape[-1] < 2:
        return
    if not bool((index[..., 1:] > index[..., :-1]).all()):
        raise ValueError("index must ascend strictly along its last dimension for gather_cache_")
