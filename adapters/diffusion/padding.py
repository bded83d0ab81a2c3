"""Samples that keep different numbers of tokens: attention must not see the padding of the shorter ones."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Padded(TorchFunctionMode):
    """While this is entered, the host's ``scaled_dot_product_attention`` leaves padded keys out.

    Args:
        mask: ``(B, M)`` bool, True where a token of the image is real.
        text: tokens of text in the same sequence.
        first: the text stands before the image, not after it.

    Attributes:
        seen: attentions over the whole sequence that ran. None ran: the processor uses another kernel.
    """

    def __init__(self, mask: Tensor, text: int = 0, first: bool = False) -> None:
        super().__init__()
        sides = (text, 0) if first else (0, text)
        self.mask = F.pad(mask, sides, value=True)[:, None, None]
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        if given["key"].shape[-2] != self.mask.shape[-1]:
            return func(*args, **kwargs)
        self.seen += 1
        own, mask = given.get("attn_mask"), self.mask
        if own is not None:
            mask = own & mask if own.dtype == mask.dtype else own.masked_fill(~mask, float("-inf"))
        return func(**{**given, "attn_mask": mask})
