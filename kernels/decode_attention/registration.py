"""``tokred::decode_attention`` and ``tokred::decode_attention_flat``: the operators behind the kernel.

Both return output, log-sum-exp and weights; without ``weights`` the third result has no elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.decode_attention.reference import decode_flat_reference, decode_reference, row_segments
from tokred.kernels.decode_attention.reference import visible_positions as visible
from tokred.kernels.decode_attention.torch_path import decode_rectangular
from tokred.kernels.dispatch import Refusal, accumulator_dtype, use_kernel

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 256
MAX_GROUP = 64
_REST = (
    "Tensor? positions, Tensor? query_position, SymInt last, Tensor? key_mask, float scale, float softcap, bool weights"
)

_library = torch.library.Library("tokred", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    f"decode_attention(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor)",
    f"decode_attention_flat(Tensor q, Tensor k, Tensor v, Tensor offsets, {_REST}) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def refusals(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> list[Refusal]:
    """Why the kernel cannot run on these tensors, besides the device; ``pairs`` is ``B * Hk``."""
    group = q.shape[0] * q.shape[1] // max(pairs, 1)
    return [
        Refusal(q.dtype not in KERNEL_DTYPES, f"the kernel takes float16, bfloat16 and float32, not {q.dtype}"),
        Refusal(q.shape[-1] > MAX_CHANNELS, f"{q.shape[-1]} channels per head; the kernel takes up to {MAX_CHANNELS}"),
        Refusal(q.shape[-1] != v.shape[-1], "the values have another number of channels than the query"),
        Refusal(group > MAX_GROUP, f"{group} query heads per key/value head; the kernel takes up to {MAX_GROUP}"),
        Refusal(q.numel() == 0 or k.numel() == 0, "an input is empty"),
    ]


def seen_rectangular(
    k: Tensor, positions: Tensor | None, query_position: Tensor | int | None, key_mask: Tensor | None
) -> Tensor | None:
    """Visible slots ``[B, 1 or Hk, K]`` of a rectangular cache, or None when all are."""
    if positions is None:
        return None if key_mask is None else key_mask[:, None]
    return visible(positions, query_position, key_mask)


def seen_flat(
    k: Tensor,
    offsets: Tensor,
    positions: Tensor | None,
    query_position: Tensor | int | None,
    key_mask: Tensor | None,
    samples: int,
) -> Tensor | None:
    """Visible rows ``[T]`` of a flattened cache, or None when all are."""
    if positions is None:
        return None
    several = (isinstance(query_position, Tensor) and query_position.numel() > 1) or key_mask is not None
    if not several:
        return visible(positions[None], query_position, None)[0]
    sample = row_segments(offsets, k.shape[0]) // ((offsets.shape[0] - 1) // samples)
    if isinstance(query_position, Tensor) and query_position.numel() > 1:
        query_position = query_position[sample]
    seen = visible(positions[:, None], query_position, None)[:, 0]
    if key_mask is None or key_mask.shape[1] == 0:
        return seen
    length = key_mask.shape[1]
    index = sample * length + positions.clamp(0, length - 1)
    return seen & (key_mask.reshape(-1)[index] | (positions >= length))


def _decode(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, query_position: Tensor | None, last: int,
    key_mask: Tensor | None, scale: float, softcap: float, weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if use_kernel("decode_attention", q, lambda: refusals(q, k, v, k.shape[0] * k.shape[1])):
        from tokred.kernels.decode_attention.launch import launch_rectangular

        return launch_rectangular(q, k, v, positions, query_position, last, key_mask, scale, softcap, weights)
    seen = seen_rectangular(k, positions, last if query_position is None else query_position, key_mask)
    path = decode_rectangular if k.numel() else decode_reference
    out, lse, p = path(q, k, v, seen, scale, softcap)
    return out, lse, p if weights else p.new_empty(0)


def _decode_flat(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, positions: Tensor | None, query_position: Tensor | None,
    last: int, key_mask: Tensor | None, scale: float, softcap: float, weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if use_kernel("decode_attention_flat", q, lambda: refusals(q, k, v, offsets.shape[0] - 1)):
        from tokred.kernels.decode_attention.launch import launch_flat

        return launch_flat(q, k, v, offsets, positions, query_position, last, key_mask, scale, softcap, weights)
    seen = seen_flat(k, offsets, positions, last if query_position is None else query_position, key_mask, q.shape[0])
    out, lse, p = decode_flat_reference(q, k, v, offsets, seen, scale, softcap)
    return out, lse, p if weights else p.new_empty(0)


def _empty(q: Tensor, v: Tensor, weights: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(q.dtype)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    return out, q.new_empty(q.shape[:2], dtype=dtype), q.new_empty(weights, dtype=dtype)


def _fake_rectangular(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, v, (q.shape[0], q.shape[1], k.shape[2]) if rest[-1] else (0,))


def _fake_flat(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[0] * q.shape[1] // (offsets.shape[0] - 1)
    return _empty(q, v, (group, k.shape[0]) if rest[-1] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors)
    ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...], flat: bool) -> tuple[Tensor | None, ...]:
    """Gradients through the definition, evaluated again."""
    saved = ctx.saved_tensors
    *_, last, _mask, scale, softcap, weights = ctx.others
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    *cache, positions, query_position, _last, key_mask = saved[3:8] if flat else saved[3:7]
    limit = last if query_position is None else query_position
    with torch.enable_grad():
        q, k, v = leaves = [x.detach().requires_grad_() for x in saved[:3]]
        if flat:
            seen = seen_flat(k, cache[0], positions, limit, key_mask, q.shape[0])
            outputs = decode_flat_reference(q, k, v, cache[0], seen, scale, softcap)
        else:
            outputs = decode_reference(q, k, v, seen_rectangular(k, positions, limit, key_mask), scale, softcap)
    live = [i for i, g in enumerate(grads) if g is not None and (i < 2 or weights)]
    found = torch.autograd.grad(
        [outputs[i] for i in live], [leaves[i] for i in wanted], [grads[i] for i in live], allow_unused=True
    )
    parts = dict(zip(wanted, found, strict=True))
    return tuple(parts.get(i) for i in range(len(saved)))


def _backward_rectangular(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grads, False)


def _backward_flat(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grads, True)


for _name, _function, _fake, _gradient in (
    ("decode_attention", _decode, _fake_rectangular, _backward_rectangular),
    ("decode_attention_flat", _decode_flat, _fake_flat, _backward_flat),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tokred::{_name}", _fake)
    torch.library.register_autograd(f"tokred::{_name}", _gradient, setup_context=_save)
