"""Decode attention: one query per head over a cache whose heads hold different numbers of keys.

Two layouts: rectangular ``[B, Hk, K, D]`` with a position per slot, empty slots at ``SENTINEL``; and flattened
``[T, D]``, the rows of all heads one after the other, with offsets. Query heads that share a key/value head are
folded, so that no key is repeated or read twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.decode_attention.checks import check_flat, check_rectangular
from tokred.kernels.decode_attention.reference import (
    SENTINEL,
    decode_flat_reference,
    decode_reference,
    visible_positions,
)
from tokred.kernels.decode_attention.registration import refusals, seen_flat, seen_rectangular
from tokred.kernels.decode_attention.torch_path import (
    decode_flat,
    decode_flat_fused,
    decode_fused,
    decode_rectangular,
    fused_fits,
)
from tokred.kernels.dispatch import traced, use_kernel, why_not

__all__ = [
    "SENTINEL",
    "DecodeResult",
    "DecodeWeights",
    "decode_attention",
    "decode_attention_flat",
    "decode_attention_flat_with_weights",
    "decode_attention_with_weights",
    "visible_positions",
    "why_not_kernel",
]

_decode_op = torch.ops.tokred.decode_attention.default
_decode_flat_op = torch.ops.tokred.decode_attention_flat.default


class DecodeResult(NamedTuple):
    """Attention of one query per head.

    Attributes:
        output: of the shape of the query, with the channels of the values.
        lse: log-sum-exp of the logits ``[B, H]``, float32 (float64 for float64); -inf for a head that sees nothing.
    """

    output: Tensor
    lse: Tensor


class DecodeWeights(NamedTuple):
    """Attention of one query per head, with the weights that this step gave.

    Attributes:
        output: of the shape of the query, with the channels of the values; zero for a head that sees nothing.
        lse: ``[B, H]``.
        weights: ``[B, H, K]``, or ``[G, T]`` in the flattened layout: row ``g`` holds the ``g``-th query head of every
            key/value head. Float32 (float64 for float64), zero where masked.
    """

    output: Tensor
    lse: Tensor
    weights: Tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor | None = None,
    query_position: Tensor | int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> DecodeResult:
    """Attend with one query per head over a rectangular cache.

    Args:
        q: ``[B, H, 1, D]`` or ``[B, H, D]``.
        k: ``[B, Hk, K, D]``, ``H`` a multiple of ``Hk``.
        v: ``[B, Hk, K, E]``.
        positions: the position that each slot holds ``[B, Hk, K]``, int32 or int64, ``SENTINEL`` in empty slots; None:
            all slots are filled and visible.
        query_position: position of the query, one number or ``[B]``; slots with later positions are not seen. None:
            every filled slot is.
        key_mask: bool ``[B, L]`` by position (by slot where there are no positions), false for padding; positions
            from ``L`` on are visible.
        scale: factor on ``q . k``; None is ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)``.

    Returns:
        Output and log-sum-exp.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.

    Source: split over keys as in Flash-Decoding, Dao et al., 2023.
    """
    out, lse, _ = _rectangular(q, k, v, positions, query_position, key_mask, scale, softcap, False)
    return DecodeResult(out, lse)


def decode_attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor | None = None,
    query_position: Tensor | int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> DecodeWeights:
    """``decode_attention`` with this step's weights, which policies such as H2O accumulate.

    Args:
        q: ``[B, H, 1, D]`` or ``[B, H, D]``; this and all others as in ``decode_attention``.
        k: ``[B, Hk, K, D]``.
        v: ``[B, Hk, K, E]``.
        positions: ``[B, Hk, K]``.
        query_position: one number or ``[B]``.
        key_mask: ``[B, L]``.
        scale: factor on ``q . k``.
        softcap: cap of the logits.

    Returns:
        Output, log-sum-exp and weights ``[B, H, K]``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    return DecodeWeights(*_rectangular(q, k, v, positions, query_position, key_mask, scale, softcap, True))


def decode_attention_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    query_position: Tensor | int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> DecodeResult:
    """Attend with one query per head over a flattened cache.

    Args:
        q: ``[B, H, 1, D]`` or ``[B, H, D]``.
        k: ``[T, D]``: the rows of sample 0 and key/value head 0, then those of head 1, and so on.
        v: ``[T, E]``.
        offsets: int32 or int64 ``[B * Hk + 1]``, ascending; pair ``i`` owns the rows ``offsets[i]`` up to
            ``offsets[i + 1]``. Rows outside belong to nobody.
        positions: ``[T]``, ``SENTINEL`` in slack rows; see ``decode_attention``, as everything below.
        query_position: one number or ``[B]``.
        key_mask: bool ``[B, L]`` by position; needs positions.
        scale: factor on ``q . k``.
        softcap: cap of the logits.

    Returns:
        Output and log-sum-exp.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    out, lse, _ = _flat(q, k, v, offsets, positions, query_position, key_mask, scale, softcap, False)
    return DecodeResult(out, lse)


def decode_attention_flat_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    query_position: Tensor | int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> DecodeWeights:
    """``decode_attention_flat`` with this step's weights.

    Args:
        q: ``[B, H, 1, D]`` or ``[B, H, D]``; this and all others as in ``decode_attention_flat``.
        k: ``[T, D]``.
        v: ``[T, E]``.
        offsets: ``[B * Hk + 1]``.
        positions: ``[T]``.
        query_position: one number or ``[B]``.
        key_mask: ``[B, L]``.
        scale: factor on ``q . k``.
        softcap: cap of the logits.

    Returns:
        Output, log-sum-exp and weights ``[G, T]``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    return DecodeWeights(*_flat(q, k, v, offsets, positions, query_position, key_mask, scale, softcap, True))


def why_not_kernel(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The reason for which a rectangular cache would not reach the Triton kernel, or None if it would."""
    return why_not(q, lambda: refusals(q, k, v, k.shape[0] * k.shape[1]))


def _rectangular(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, query_position: Tensor | int | None,
    key_mask: Tensor | None, scale: float | None, softcap: float | None, weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_rectangular(q, k, v, positions, query_position, key_mask, softcap)
    scale, cap = q.shape[-1] ** -0.5 if scale is None else float(scale), softcap or 0.0
    row = q.squeeze(2) if q.dim() == 4 else q
    if use_kernel("decode_attention", q, lambda: refusals(q, k, v, k.shape[0] * k.shape[1])):
        tensor, last = _split(query_position)
        out, lse, p = _decode_op(row, k, v, positions, tensor, last, key_mask, scale, cap, weights)
    else:
        seen = seen_rectangular(k, positions, query_position, key_mask)
        if _plain(q, k, v):
            out, lse, p = decode_reference(row, k, v, seen, scale, cap)
        elif not weights and fused_fits(row, v, cap, k.shape[2]):
            (out, lse), p = decode_fused(row, k, v, seen, scale), row
        else:
            out, lse, p = decode_rectangular(row, k, v, seen, scale, cap)
    return out.unsqueeze(2) if q.dim() == 4 else out, lse, p


def _flat(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, positions: Tensor | None, query_position: Tensor | int | None,
    key_mask: Tensor | None, scale: float | None, softcap: float | None, weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_flat(q, k, v, offsets, positions, query_position, key_mask, softcap)
    scale, cap = q.shape[-1] ** -0.5 if scale is None else float(scale), softcap or 0.0
    row = q.squeeze(2) if q.dim() == 4 else q
    if use_kernel("decode_attention_flat", q, lambda: refusals(q, k, v, offsets.shape[0] - 1)):
        tensor, last = _split(query_position)
        out, lse, p = _decode_flat_op(row, k, v, offsets, positions, tensor, last, key_mask, scale, cap, weights)
    else:
        seen = seen_flat(k, offsets, positions, query_position, key_mask, q.shape[0])
        # Off the CPU, reading the offsets would wait for the device.
        if _plain(q, k, v) or q.device.type != "cpu":
            out, lse, p = decode_flat_reference(row, k, v, offsets, seen, scale, cap)
        elif not weights and seen is None and fused_fits(row, v, cap, k.shape[0] // max(1, offsets.shape[0] - 1)):
            (out, lse), p = decode_flat_fused(row, k, v, offsets, scale), row
        else:
            out, lse, p = decode_flat(row, k, v, offsets, seen, scale, cap)
    return out.unsqueeze(2) if q.dim() == 4 else out, lse, p


def _split(query_position: Tensor | int | None) -> tuple[Tensor | None, int]:
    """The two forms of a query position that the operators take."""
    if isinstance(query_position, Tensor):
        return query_position, SENTINEL - 1
    return None, SENTINEL - 1 if query_position is None else min(query_position, SENTINEL - 1)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True where the compiler or autograd must see plain operations, or there is nothing to attend to."""
    if traced() or q.numel() == 0 or k.numel() == 0:
        return True
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
