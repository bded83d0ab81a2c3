"""Attention with a per-key bias through torch's own fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokred.kernels.attention.bias import attention_mask, channel_form
from tokred.kernels.attention.reference import attention_reference
from tokred.kernels.column_scores import row_lse
from tokred.kernels.column_scores.blocked import fast_bfloat16
from tokred.kernels.column_scores.reference import MASKED
from tokred.kernels.dispatch import traced

FORMS = ("auto", "mask", "channel")
# From this many keys on, copying q, k and v once costs less than leaving the flash kernel; an estimate by traffic.
_CHANNEL_KEYS = 512
_FLASH_CHANNELS = 256
# Elements of a block of weights in the bfloat16 path: 4 MiB.
_BLOCK_ELEMENTS = 1 << 21


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    form: str,
) -> Tensor:
    """Attention output ``[B, H, M, E]``; arguments as in ``attention_reference``, and the form of the bias."""
    gqa = q.shape[1] != k.shape[1]
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if (bias is not None or key_mask is not None) and _use_channel(q, k, bias, scale, causal, form):
        return _channel_attention(q, k, v, bias, key_mask, scale, causal)
    mask, is_causal = attention_mask(q, k, bias, key_mask, causal)
    if mask is not None and form == "auto" and not gqa and _plain_is_faster(q, v, mask):
        return _bfloat16_attention(q, k, v, mask, scale)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )
    # On the CPU rows without a visible key come out as zero by themselves.
    return out if mask is None or not q.is_cuda else out.masked_fill(_dead_rows(mask)[..., None], 0.0)


def fused_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp from the fused kernels that return both, else from one that does not and ``row_lse``.

    The CPU's fused kernel gives it for every mask, CUDA's flash kernel where there is none. The log-sum-exp carries no
    gradient.
    """
    if q.numel() == 0 or k.numel() == 0:  # the CPU's kernel divides by the lengths
        out, lse = attention_reference(q, k, v, bias, key_mask, scale, causal)
        return out, lse.detach()
    mask, is_causal = attention_mask(q, k, bias, key_mask, causal)
    differentiable_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if q.device.type == "cpu" and q.shape[3] == v.shape[3] and not differentiable_mask:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        # The kernel returns 0 for rows that see nothing.
        lse = lse if mask is None else lse.masked_fill(_dead_rows(mask), -torch.inf)
        return out, lse.detach()
    if mask is None and _flash_fits(q, k, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
        return out, lse[..., : q.shape[2]].detach()
    out = fused_attention(q, k, v, bias, key_mask, scale, causal, "auto")
    with torch.no_grad():
        return out, row_lse(q, k, scale=scale, bias=bias, key_mask=key_mask, causal=causal)


def _dead_rows(mask: Tensor) -> Tensor:
    """Rows ``[B or 1, H or 1, M or 1]`` of an additive mask that see no key."""
    return ~(mask > MASKED).any(-1)


def _flash_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    # The raw operator wants a head size in multiples of 8; the public function would pad for us.
    widths = q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and q.shape[3] <= _FLASH_CHANNELS
    return q.is_cuda and torch.version.cuda is not None and half and widths and q.shape[1] == k.shape[1]


def _use_channel(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool, form: str) -> bool:
    possible = scale > 0 and (not causal or q.shape[2] in (1, k.shape[2]))
    if form != "auto":
        if form == "channel" and not possible:
            raise ValueError("form 'channel' needs a positive scale, and with causal as many queries as keys, or one")
        return form == "channel"
    # Two more channels must fit; a differentiable bias would lose digits in two half-precision parts.
    room = q.shape[3] + 2 <= _FLASH_CHANNELS and not (bias is not None and bias.requires_grad)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and possible and room and k.shape[2] >= _CHANNEL_KEYS


def _channel_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    b, h, m, _ = q.shape
    if bias is None:
        bias = torch.zeros(b, k.shape[2], device=q.device)
    gqa = h != k.shape[1]
    if gqa and bias.dim() == 3:
        k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
        gqa = False
    q2, k2, v2 = channel_form(q, k, v, bias, key_mask, scale)
    out = functional.scaled_dot_product_attention(q2, k2, v2, is_causal=causal and m > 1, scale=scale, enable_gqa=gqa)[
        ..., : v.shape[3]
    ]
    visible = (
        (bias > MASKED) if key_mask is None else (bias > MASKED) & (key_mask if bias.dim() == 2 else key_mask[:, None])
    )
    visible = visible[:, None] if visible.dim() == 2 else visible
    visible = visible.cummax(-1).values if causal and m > 1 else visible.any(-1, keepdim=True)
    return out.masked_fill(~visible[..., None], 0.0)


def _plain_is_faster(q: Tensor, v: Tensor, mask: Tensor) -> bool:
    """On a CPU that multiplies bfloat16, hand-written attention takes two thirds of the fused kernel's time."""
    if traced() or q.device.type != "cpu" or q.dtype != torch.bfloat16 or not fast_bfloat16():
        return False
    tracked = any(t.requires_grad for t in (q, v, mask)) and torch.is_grad_enabled()
    return not tracked and mask.shape[2] == 1 and q.shape[1] * q.shape[2] * mask.shape[3] <= _BLOCK_ELEMENTS


@torch.no_grad()
def _bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax by hand, some samples at a time so that their weights stay in the cache."""
    b, h, m, _ = q.shape
    n, e = v.shape[2], v.shape[3]
    dead = _dead_rows(mask)[..., None]
    # Finite, so that rows that see nothing are no NaN; they are set to zero below.
    mask = mask.clamp(min=MASKED).expand(b, h, 1, n)
    # Heads inside rows: the caller's usual transpose and reshape is then free.
    out = q.new_empty(b, m, h, e)
    step = max(1, _BLOCK_ELEMENTS // (h * m * n))
    for i in range(0, b, step):
        part = slice(i, i + step)
        s = torch.baddbmm(
            mask[part].flatten(0, 1), q[part].flatten(0, 1), k[part].flatten(0, 1).transpose(1, 2), alpha=scale
        )
        p = torch.softmax(s, -1)
        out[part] = torch.bmm(p, v[part].flatten(0, 1)).view(-1, h, m, e).transpose(1, 2)
    return out.transpose(1, 2).masked_fill_(dead, 0.0)
