"""Checks of the arguments of ``column_scores`` and ``column_statistics``; every message names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.column_scores.reference import GROUPS, Options

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_query_key(q: Tensor, k: Tensor) -> None:
    """Shapes, head counts, types and devices of ``q`` ``[B, H, M, D]`` and ``k`` ``[B, Hk, N, D]``.

    Raises:
        TypeError: they are not of one floating-point type.
        ValueError: shapes or devices do not fit.
    """
    if q.dtype not in FLOATS or k.dtype != q.dtype:
        raise TypeError(f"q and k must have one floating-point type, got {q.dtype} and {k.dtype}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be [B, H, M, D] and [B, Hk, N, D], got {list(q.shape)} and {list(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k differ in batch or channels: {list(q.shape)} and {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k")
    if q.device != k.device:
        raise ValueError(f"k is on {k.device}, q on {q.device}")


def check_key_mask(key_mask: Tensor | None, b: int, n: int, device: torch.device) -> None:
    """Type, shape ``[B, N]`` and device of a key mask.

    Raises:
        TypeError: it is not bool.
        ValueError: shape or device do not fit.
    """
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool (true: visible), got {key_mask.dtype}")
    if key_mask.dim() != 2 or key_mask.shape[0] != b or key_mask.shape[1] != n:
        raise ValueError(f"key_mask must be [B, N] = [{b}, {n}], got {list(key_mask.shape)}")
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device}, q on {device}")


def check_bias(bias: Tensor | None, b: int, h: int, n: int, device: torch.device) -> None:
    """Type, shape ``[B, N]`` or ``[B, H, N]`` and device of a per-key bias.

    Raises:
        TypeError: it is not floating-point.
        ValueError: shape or device do not fit.
    """
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating-point, got {bias.dtype} (a bool mask goes into key_mask)")
    per_sample = bias.dim() == 2 and bias.shape[0] == b and bias.shape[1] == n
    per_head = bias.dim() == 3 and bias.shape[0] == b and bias.shape[1] == h and bias.shape[2] == n
    if not (per_sample or per_head):
        raise ValueError(f"bias must be [B, N] or [B, H, N] = [{b}, {h}, {n}], got {list(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"bias is on {bias.device}, q on {device}")


def _check_weight(weight: Tensor | None, q: Tensor) -> None:
    if weight is None:
        return
    b, h, m, _ = q.shape
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    wanted = {1: (m,), 2: (b, m), 3: (b, h, m)}.get(weight.dim())
    if wanted is None or any(s not in (1, w) for s, w in zip(weight.shape, wanted, strict=True)):
        raise ValueError(
            f"weight must broadcast to [M], [B, M] or [B, H, M] = [{b}, {h}, {m}], got {list(weight.shape)}"
        )
    if weight.device != q.device:
        raise ValueError(f"weight is on {weight.device}, q on {q.device}")


def _check_lse(lse: Tensor | None, q: Tensor) -> None:
    if lse is None:
        return
    if not lse.is_floating_point():
        raise TypeError(f"lse must be floating-point, got {lse.dtype}")
    if lse.dim() != 3 or any(lse.shape[i] != q.shape[i] for i in range(3)):
        raise ValueError(f"lse must be [B, H, M] = {list(q.shape[:3])}, got {list(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device}, q on {q.device}")


def check(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    group: str,
) -> Options:
    """Check everything and fill in the defaults.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    check_query_key(q, k)
    b, h, _, d = q.shape
    n = k.shape[2]
    check_bias(bias, b, h, n, q.device)
    check_key_mask(key_mask, b, n, q.device)
    _check_weight(weight, q)
    _check_lse(lse, q)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window} (None is no window)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap} (None is no softcap)")
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    return Options(d**-0.5 if scale is None else float(scale), causal, window or 0, softcap or 0.0, group)
