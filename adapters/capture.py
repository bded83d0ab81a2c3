"""See and bias a host's fused attention without copying a line of it.

While a block's attention runs, one thread-local torch-function mode watches for ``scaled_dot_product_attention``: it notes
queries, keys and values exactly as the host uses them (after norms, rotary embedding and whatever a later version adds),
adds the tokens' size bias to the mask, and reduces masks and relative position biases of the original length to the rows
that are left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokred.errors import UnsupportedModelError

_SDPA = F.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Capture(TorchFunctionMode):
    """Watches one block's attention.

    Args:
        bias: ``(B, 1, 1, M)`` float to add to every key's logit, or None.
        length: original number of tokens; a mask of this length is reduced to the rows left.
        representative: ``(B, M)`` original positions of the rows, or None while nothing has moved.
    """

    def __init__(self, bias: Tensor | None, length: int, representative: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.length = length
        self.representative = representative
        self.calls = 0
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.mask: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
        q, k, v = call.pop("query"), call.pop("key"), call.pop("value")
        mask = call.get("attn_mask")
        if self.representative is not None and mask is not None:
            mask = reduce_mask(mask, self.length, self.representative)
        if self.bias is not None:
            if call.get("is_causal"):
                raise UnsupportedModelError("causal attention cannot carry merged tokens: their order is not kept")
            mask = add_bias(mask, self.bias, q.dtype)
        call["attn_mask"] = mask
        if self.calls == 0:
            self.q, self.k, self.v, self.mask = q, k, v, mask
        self.calls += 1
        return func(q, k, v, **call)

    def key_bias(self) -> Tensor | None:
        """``(B, H, N)`` or ``(B, N)``: what the first query's logits had added per key."""
        if self.mask is None:
            return None
        row = as_float(self.mask, torch.float32)[..., 0, :]  # (B|1, H|1, N)
        while row.ndim < 3:
            row = row.unsqueeze(0)
        q = self.q
        assert q is not None  # set together with the mask
        return row.expand(q.shape[0], q.shape[1], -1)


def as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: visible) as 0 and -inf; a float one in ``dtype``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


def add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The size bias, added to whatever mask there is."""
    bias = bias.to(dtype)
    return bias if mask is None else as_float(mask, dtype) + bias


def reduce_mask(mask: Tensor, length: int, representative: Tensor) -> Tensor:
    """A mask over the original tokens, at the rows that are left: ``(..., N|1, N)`` to ``(B, ..., M|1, M)``.

    A mask whose last dimension is not the original length has been reduced already and is returned as it is.
    """
    if mask.shape[-1] != length or representative.shape[1] == length:
        return mask
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    b, m = representative.shape
    mask = mask.expand(b, *mask.shape[1:])
    columns = representative[:, None, None, :].expand(b, mask.shape[1], mask.shape[2], m)
    mask = mask.gather(3, columns)
    if mask.shape[2] == length:
        mask = mask.gather(2, representative[:, None, :, None].expand(b, mask.shape[1], m, m))
    return mask
