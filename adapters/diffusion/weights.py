"""Keys with a weight in a host's fused attention: a merged key counts as all tokens that were merged into it.

Where a sample has fewer tokens left than others of its batch, its empty slots are keys that count as none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokred.adapters.contract import words
from tokred.adapters.diffusion.passing import passed
from tokred.adapters.diffusion.view import Batch


class Weighed(TorchFunctionMode):
    """While this is entered, the host's ``scaled_dot_product_attention`` weighs its keys.

    Args:
        mask: ``(B, M)`` bool, True where a token of the image is real; or float, added to the scores of each key.
        text: tokens of text in the same sequence.
        first: the text stands before the image, not after it.
        batch: at which samples the processor is, where it may be at some alone.

    Attributes:
        seen: attentions over the whole sequence that ran. None ran: the processor uses another kernel.
    """

    def __init__(self, mask: Tensor, text: int = 0, first: bool = False, batch: Batch | None = None) -> None:
        super().__init__()
        self.batch = batch
        sides = (text, 0) if first else (0, text)
        self.mask = F.pad(mask, sides, value=mask.dtype == torch.bool)[:, None, None]
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return passed(func, args, kwargs)
        given = {**dict(zip(words.SDPA, args, strict=False)), **kwargs}
        if given["key"].shape[-2] != self.mask.shape[-1]:
            return func(*args, **kwargs)
        self.seen += 1
        mask, samples = self.mask, len(given["query"])
        if self.batch is not None and samples != len(mask):
            mask = mask[self.batch.last_rows(samples)]
        mask = mask if mask.dtype == torch.bool else mask.to(given["query"].dtype)
        return func(**{**given, words.SDPA_MASK: _both(given.get(words.SDPA_MASK), mask)})


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    """Two masks of attention as one; a mask of booleans forbids, one of numbers is added to the scores."""
    if a is None:
        return b
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if a.dtype != torch.bool and b.dtype != torch.bool:
        return a + b
    allowed, added = (a, b) if a.dtype == torch.bool else (b, a)
    return added.masked_fill(~allowed, float("-inf"))
