"""Checks of the arguments of decode attention; every message names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.column_scores.checks import FLOATS


def _check_query(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one floating-point type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dim() not in (3, 4) or (q.dim() == 4 and q.shape[2] != 1):
        raise ValueError(f"q must be one query per head, [B, H, 1, D] or [B, H, D], got {list(q.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has {k.shape[-1]} channels, q has {q.shape[-1]}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _check_slots(
    positions: Tensor | None, query_position: Tensor | int | None, key_mask: Tensor | None, q: Tensor
) -> None:
    if positions is not None:
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions must be int32 or int64, got {positions.dtype}")
        if positions.device != q.device:
            raise ValueError(f"positions is on {positions.device}, q on {q.device}")
    if query_position is not None and positions is None:
        raise ValueError("query_position needs positions")
    if isinstance(query_position, Tensor):
        if query_position.is_floating_point() or query_position.dtype == torch.bool:
            raise TypeError(f"query_position must be an integer or an integer tensor, got {query_position.dtype}")
        if query_position.dim() > 1 or query_position.numel() not in (1, q.shape[0]):
            raise ValueError(f"query_position must be one number or [B] = [{q.shape[0]}], got {query_position.shape}")
        if query_position.device != q.device:
            raise ValueError(f"query_position is on {query_position.device}, q on {q.device}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (true: visible), got {key_mask.dtype}")
        if key_mask.dim() != 2 or key_mask.shape[0] != q.shape[0]:
            raise ValueError(f"key_mask must be [B, L] with B = {q.shape[0]}, got {list(key_mask.shape)}")
        if key_mask.device != q.device:
            raise ValueError(f"key_mask is on {key_mask.device}, q on {q.device}")


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap} (None is no softcap)")


def check_rectangular(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    query_position: Tensor | int | None,
    key_mask: Tensor | None,
    softcap: float | None,
) -> None:
    """Check the arguments of ``decode_attention``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    if k.dim() != 4 or v.dim() != 4 or any(v.shape[i] != k.shape[i] for i in range(3)):
        raise ValueError(f"k and v must be [B, Hk, K, D] and [B, Hk, K, E], got {list(k.shape)} and {list(v.shape)}")
    _check_query(q, k, v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has a batch of {k.shape[0]}, q of {q.shape[0]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k")
    if positions is not None and (positions.dim() != 3 or any(positions.shape[i] != k.shape[i] for i in range(3))):
        raise ValueError(f"positions must be [B, Hk, K] = {list(k.shape[:3])}, got {list(positions.shape)}")
    _check_slots(positions, query_position, key_mask, q)
    if positions is None and key_mask is not None and key_mask.shape[1] != k.shape[2]:
        raise ValueError(f"without positions, key_mask must be [B, K] = [*, {k.shape[2]}], got {list(key_mask.shape)}")
    _check_softcap(softcap)


def check_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    positions: Tensor | None,
    query_position: Tensor | int | None,
    key_mask: Tensor | None,
    softcap: float | None,
) -> None:
    """Check the arguments of ``decode_attention_flat``; the values of ``offsets`` are not read.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    if k.dim() != 2 or v.dim() != 2 or v.shape[0] != k.shape[0]:
        raise ValueError(f"k and v must be [T, D] and [T, E], got {list(k.shape)} and {list(v.shape)}")
    _check_query(q, k, v)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    pairs = offsets.shape[0] - 1 if offsets.dim() == 1 else 0
    if pairs < 1 or pairs % q.shape[0] != 0 or q.shape[1] % (pairs // q.shape[0]) != 0:
        raise ValueError(
            f"offsets must be [B * Hk + 1] with B = {q.shape[0]} and Hk a divisor of {q.shape[1]}, "
            f"got {list(offsets.shape)}"
        )
    if offsets.device != q.device:
        raise ValueError(f"offsets is on {offsets.device}, q on {q.device}")
    if positions is not None and (positions.dim() != 1 or positions.shape[0] != k.shape[0]):
        raise ValueError(f"positions must be [T] = [{k.shape[0]}], got {list(positions.shape)}")
    _check_slots(positions, query_position, key_mask, q)
    if positions is None and key_mask is not None:
        raise ValueError("key_mask needs positions in the flattened layout")
    _check_softcap(softcap)
