"""The oracle of the laws: the host as it is, keeping all tokens, with something added to the logits of some keys.

A token that has left is a key that no query wants; one that stands for three others is a key with the log of four. The
host's own attention runs, whichever function it calls, so that nothing here names a part of any host.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# For keys that have left: their weight is zero beside any other, and a row that sees nothing else stays finite.
LEFT = -1e9
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MHA = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Weighed(TorchFunctionMode):
    """While it is entered and ``bias`` is set, attention adds that to the logits of its keys.

    Attributes:
        bias: ``(B, N)`` or ``(B, Hk, N)`` float, for the first ``N`` keys (the last, where ``last``); None: nothing.
        last: other tokens stand before those that the bias is for.
        calls: attentions that it was added in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None
        self.last = False
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.bias is not None:
            if func is F.scaled_dot_product_attention:
                return self._fused(func, {**dict(zip(_SDPA, args, strict=False)), **kwargs})
            if func is F.multi_head_attention_forward:
                return self._module(func, {**dict(zip(_MHA, args, strict=False)), **kwargs})
            if func in _SOFTMAX and args and args[0].ndim in (3, 4) and args[0].shape[-1] >= self.bias.shape[-1]:
                return func(args[0] + self._row(args[0].shape, args[0].dtype), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _row(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The term that is added to each key's logits, to be broadcast.

        Args:
            shape: of the logits: ``(B, H, Q, K)``, or with the heads side by side ``(B * H, Q, K)``.
            dtype: of the logits.
        """
        assert self.bias is not None  # asked for where there is one
        self.calls += 1
        bias = self.bias if self.bias.ndim == 3 else self.bias.unsqueeze(1)
        more = shape[-1] - bias.shape[-1]
        row = F.pad(bias, (more, 0) if self.last else (0, more)).unsqueeze(2).to(dtype)
        heads = shape[1] if len(shape) == 4 else shape[0] // len(row)
        if len(shape) == 3 or row.shape[1] not in (1, heads):
            row = row.repeat_interleave(heads // row.shape[1], 1)
        return row if len(shape) == 4 else row.flatten(0, 1)

    def _fused(self, func: Any, call: dict[str, Any]) -> Any:
        q, k, mask = call["query"], call["key"], call.get("attn_mask")
        row = self._row((*q.shape[:-1], k.shape[-2]), q.dtype)
        if call.pop("is_causal", False):
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        call["attn_mask"] = row if mask is None else mask + row
        return func(**call)

    def _module(self, func: Any, call: dict[str, Any]) -> Any:
        query = call["query"]  # (N, B, C)
        row = self._row((query.shape[1], 1, 1, call["key"].shape[0]), query.dtype)[:, 0, 0]
        before = call.get("key_padding_mask")
        call["key_padding_mask"] = row if before is None else before + row
        return func(**call)


class _Begin:
    """Forward pre-hook: from here on keys are weighed."""

    def __init__(self, mode: Weighed, bias: Tensor, last: bool) -> None:
        self.mode, self.bias, self.last = mode, bias, last

    def __call__(self, module: Any, args: Any) -> None:
        self.mode.bias, self.mode.last = self.bias, self.last


class _End:
    """Forward hook: and here no longer."""

    def __init__(self, mode: Weighed) -> None:
        self.mode = mode

    def __call__(self, module: Any, args: Any, out: Any) -> None:
        self.mode.bias = None


@contextlib.contextmanager
def weighed(parts: Sequence[tuple[nn.Module, Tensor, bool]]) -> Iterator[Weighed]:
    """Inside, attention in each of these modules adds a bias to its keys.

    Args:
        parts: a module, its bias, and whether that is for the last keys.
    """
    mode = Weighed()
    handles: list[Any] = []
    for module, bias, last in parts:
        handles += [module.register_forward_pre_hook(_Begin(mode, bias, last))]
        handles += [module.register_forward_hook(_End(mode))]
    try:
        with mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()
