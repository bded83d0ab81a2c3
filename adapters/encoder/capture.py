"""See and bias a host's fused attention without copying a line of it.

While a block's attention runs, one thread-local torch-function mode watches for ``scaled_dot_product_attention``: it
notes queries, keys and values exactly as the host uses them (after norms, rotary embedding and whatever a later version
adds), adds the tokens' size bias to the mask, and reduces masks and relative position biases of the original length to
the rows that are left. ``nn.MultiheadAttention`` hides its SDPA from modes; there the bias goes in one call higher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokred.adapters.contract import words
from tokred.core.attention import Attention
from tokred.core.reduction import Reduction
from tokred.errors import UnsupportedModelError
from tokred.learn.gates import gated_attention

_SDPA = F.scaled_dot_product_attention


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
        self.hidden: Tensor | None = None  # (B, M) bool, rows that the host's mask hides
        self.calls = 0
        self.causal = False
        self.heads: tuple[Tensor, Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        self.scale: float | None = None
        self.transform: Any = None
        self.decide: Callable[[], Reduction] | None = None
        self.size: Tensor | None = None
        self.step: Reduction | None = None
        self.watch_answers = False
        self.answers: Tensor | None = None
        self.gate: Tensor | None = None  # (B, M) how far each key is seen, while a method learns
        self.left: Tensor | None = None  # (B, H) bool, heads that have not been left out

    @property
    def q(self) -> Tensor | None:
        """``(B, H, M, D)`` queries, as the attention used them."""
        return self.part(0)

    @property
    def k(self) -> Tensor | None:
        """``(B, Hk, M, D)`` keys."""
        return self.part(1)

    @property
    def v(self) -> Tensor | None:
        """``(B, Hk, M, D)`` values."""
        return self.part(2)

    def release(self) -> None:
        """Let go of queries, keys and values, so that their memory serves the MLP that follows."""
        self.heads = self.answers = self.hidden = None
        self.transform = self.decide = self.size = None

    def part(self, i: int) -> Tensor | None:
        """Queries, keys or values; None before any attention ran."""
        return None if self.heads is None else self.heads[i]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(words.SDPA, args, strict=False)), **(kwargs or {})}
        q, k, v = call.pop("query"), call.pop("key"), call.pop("value")
        mask = call.get(words.SDPA_MASK)
        if self.representative is not None and mask is not None:
            mask = reduce_mask(mask, self.length, self.representative)
        if self.bias is not None:
            if call.get(words.SDPA_CAUSAL):
                raise UnsupportedModelError("causal attention cannot carry merged tokens: their order is not kept")
            mask = add_bias(mask, self.bias, q.dtype)
        call[words.SDPA_MASK] = mask
        if self.calls == 0:
            self.heads, self.mask, self.causal = (q, k, v), mask, bool(call.get(words.SDPA_CAUSAL))
            self.scale = call.get(words.SDPA_SCALE)
        self.calls += 1
        # Queries and keys are known from here on and not used yet: the only moment at which queries can be left out.
        if self.decide is not None and self.calls == 1:
            self.step = self.decide()
            if not self.step.trivial:
                return self._fewer_queries(func, self.step, q, k, v, call)
        if self.gate is not None:
            y: Tensor = self._gated(q, k, v, call)
        else:
            y = func(q, k, v, **call)
        # Heads that were left out answer zero and keep their channels, which the output projection counts on.
        if self.left is not None:
            y = y * self.left[:, :, None, None].to(y.dtype)
        if self.watch_answers and self.calls == 1:
            self.answers = y
        return y

    def _gated(self, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]) -> Tensor:
        """The attention that sees keys as far as their gates are open."""
        assert self.gate is not None  # asked for only then
        if call.get(words.SDPA_CAUSAL):
            raise UnsupportedModelError("causal attention cannot carry soft decisions: it hides pairs of tokens")
        dropout = float(call.get("dropout_p") or 0.0)
        return gated_attention(
            q, k, v, self.gate, mask=call[words.SDPA_MASK], scale=call.get(words.SDPA_SCALE), dropout=dropout
        )

    def _fewer_queries(
        self, func: Any, step: Reduction, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        """Attention of the reduced queries over all keys: a slot asks with the mean of its members, however their
        features are combined. Hosts reshape the answer to the number of tokens that went in, so it is handed back at
        that length; only the rows of the representatives are read."""
        b, h, n, d = q.shape
        mean = step.merge(q.transpose(1, 2).reshape(b, n, h * d), self.size, "mean")
        fewer = mean.view(b, step.slots, h, d).transpose(1, 2)
        mask = call[words.SDPA_MASK]
        if mask is not None and mask.shape[-2] == n:
            rows = step.representative[:, None, :, None]
            mask = mask.expand(b, -1, -1, -1)
            call[words.SDPA_MASK] = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        y: Tensor = func(fewer, k, v, **call)
        answer = y.transpose(1, 2).flatten(2)
        placed = Reduction.keep(step.representative, n, step.mask).unmerge(answer)
        return placed.view(b, n, h, y.shape[-1]).transpose(1, 2)

    def attention(self, real: Tensor | None) -> Attention | None:
        """The attention as the layer runs it, rows that are not ``real`` ``(B, M)`` left out; None: it was not seen."""
        # A method may be shown keys as they are before rotary embedding; these are the ones that are used.
        q, k = self.q, self.k
        if q is None or k is None:
            return None
        return Attention(q, k, bias=self.key_bias(), scale=self.scale, mask=real, votes=real)

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


_MHA = F.multi_head_attention_forward
_MHA_NAMES = tuple(inspect.signature(_MHA).parameters)


class MhaCapture(Capture):
    """Watches one ``nn.MultiheadAttention``.

    A mode sees ``F.multi_head_attention_forward``, not the SDPA inside it: the bias goes in as a float key padding
    mask, which is added to the logits, and queries, keys and values are projected again where a method asks for them.
    While a mode is active, torch does not take the fused encoder path that would pass this function by.
    """

    def __init__(self, bias: Tensor | None, length: int, representative: Tensor | None) -> None:
        super().__init__(bias, length, representative)
        self.call: dict[str, Any] = {}
        self.parts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _MHA:
            return super().__torch_function__(func, types, args, kwargs)
        call = {**dict(zip(_MHA_NAMES, args, strict=False)), **(kwargs or {})}
        if call["in_proj_weight"] is None or call["bias_k"] is not None or call["add_zero_attn"]:
            raise UnsupportedModelError(
                "nn.MultiheadAttention with separate projections or extra keys cannot carry sizes"
            )
        query, heads, mask = call["query"], call[words.MHA_HEADS], call.get(words.SDPA_MASK)
        b = query.shape[1]
        if self.representative is not None and mask is not None:
            # Masks of each head come as (B * H, N, N) here, and have to go back like that.
            if mask.ndim == 3:
                mask = mask.reshape(b, heads, *mask.shape[1:])
            mask = reduce_mask(mask, self.length, self.representative)
            call[words.SDPA_MASK] = mask.expand(b, heads, -1, -1).flatten(0, 1)
        if self.bias is not None:
            if call.get(words.SDPA_CAUSAL):
                raise UnsupportedModelError("causal attention cannot carry merged tokens: their order is not kept")
            # As padding the bias is one row a sample; in attn_mask it would be written out for all heads and queries.
            padding = self.bias[:, 0, 0].to(query.dtype)
            before = call.get("key_padding_mask")
            call["key_padding_mask"] = padding if before is None else before + padding
            mask = add_bias(mask, self.bias, query.dtype)
        if self.calls == 0:
            self.call, self.mask, self.causal = call, mask, bool(call.get(words.SDPA_CAUSAL))
        self.calls += 1
        return func(**call)

    def part(self, i: int) -> Tensor | None:
        """Queries, keys or values ``(B, H, M, D)``, projected when first asked for."""
        if not self.call:
            return None
        if i not in self.parts:
            weight, bias = self.call["in_proj_weight"], self.call["in_proj_bias"]
            x = self.call[("query", "key", "value")[i]]
            y = F.linear(x, weight.chunk(3)[i], None if bias is None else bias.chunk(3)[i])
            # The function takes (M, B, C).
            self.parts[i] = y.reshape(*y.shape[:2], self.call[words.MHA_HEADS], -1).permute(1, 2, 0, 3)
        return self.parts[i]


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
    if mask.shape[-1] != length:
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
