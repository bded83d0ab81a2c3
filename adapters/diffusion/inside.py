"""Fewer queries, or fewer keys and values, in a host's fused attention: as it uses them, after rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokred.adapters.contract import words
from tokred.adapters.diffusion.passing import passed
from tokred.core.reduction import Reduction


class Halves(NamedTuple):
    """Reductions of the two sides of an attention, of batch ``(B,)``, or ``(B, H)`` for plans by head.

    Attributes:
        queries: fewer queries; what comes out is restored. None: all of them.
        keys: fewer keys and values. None: all of them.
        proportional: add the log of each key's size to its scores.
    """

    queries: Reduction | None = None
    keys: Reduction | None = None
    proportional: bool = False


class Inside(TorchFunctionMode):
    """While this is entered, the host's ``scaled_dot_product_attention`` runs on fewer queries or keys.

    Args:
        decide: from queries, keys and values ``(B, H, N, D)`` of the image's tokens; called once an attention.
        tokens: ``N`` of the image.
        text: tokens of text in the same sequence.
        first: the text stands before the image, not after it.
        samples: of the batch, where a processor may be at some of them alone; 0: it is not known.

    Attributes:
        seen: attentions over the whole sequence that ran. None ran: the processor uses another kernel.
    """

    def __init__(
        self,
        decide: Callable[[Tensor, Tensor, Tensor], Halves],
        tokens: int,
        text: int = 0,
        first: bool = False,
        samples: int = 0,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.decide, self.tokens, self.text = decide, tokens, text
        self.start = text if first else 0
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return passed(func, args, kwargs)
        given = {**dict(zip(words.SDPA, args, strict=False)), **kwargs}
        q, k, v = (given[name] for name in words.SDPA[:3])
        # Image prompts have keys of their own, which are few.
        if not q.shape[-2] == k.shape[-2] == self.tokens + self.text:
            return func(*args, **kwargs)
        self.seen += 1
        if self.samples not in (0, len(q)) and given.get(words.SDPA_MASK) is not None:
            return func(*args, **kwargs)  # perturbed: every token looks at itself, which is no attention over others
        rows = slice(self.start, self.start + self.tokens)
        halves = self.decide(q[:, :, rows], k[:, :, rows], v[:, :, rows])
        mask = given.get(words.SDPA_MASK)
        if halves.keys is not None:
            given["key"], given["value"] = self._merged(k, halves.keys), self._merged(v, halves.keys)
            mask = self._at(mask, halves.keys.representative, -1)
            if halves.proportional:
                mask = self._weighed(mask, halves.keys, q.dtype)
        if halves.queries is not None:
            given["query"] = self._merged(q, halves.queries)
            mask = self._at(mask, halves.queries.representative, -2)
        out = func(**{**given, words.SDPA_MASK: mask})
        return out if halves.queries is None else self._restored(out, halves.queries)

    def _around(self, x: Tensor, image: Tensor, length: int) -> Tensor:
        """``image`` between what stands before and after ``length`` tokens in ``x``, along the third dimension."""
        if not self.text:
            return image
        return torch.cat([x[:, :, : self.start], image, x[:, :, self.start + length :]], 2)

    def _merged(self, x: Tensor, reduction: Reduction) -> Tensor:
        """``(B, H, N + T, D)`` to ``(B, H, M + T, D)``."""
        if _same_rows(reduction):
            return self._picked(x, reduction.representative[0])
        image = x[:, :, self.start : self.start + self.tokens]
        if len(reduction.batch) == 2:
            return self._around(x, reduction.merge(image), self.tokens)
        short = reduction.merge(image.transpose(1, 2).flatten(2))
        return self._around(x, _heads(short, x), self.tokens)

    def _picked(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows that all samples and heads share, with the text's, in one copy; by whole tokens where they lie so."""
        if self.text:
            places = torch.arange(x.shape[2], device=rows.device)
            rows = torch.cat([places[: self.start], rows + self.start, places[self.start + self.tokens :]])
        if x.stride(2) > x.stride(1):
            return x.transpose(1, 2).index_select(1, rows).transpose(1, 2)
        return x.index_select(2, rows)

    def _restored(self, y: Tensor, reduction: Reduction) -> Tensor:
        """``(B, H, M + T, D)`` to ``(B, H, N + T, D)``."""
        image = y[:, :, self.start : self.start + reduction.slots]
        if len(reduction.batch) == 2:
            return self._around(y, reduction.unmerge(image), reduction.slots)
        full = reduction.unmerge(image.transpose(1, 2).flatten(2))
        return self._around(y, _heads(full, y), reduction.slots)

    def _at(self, mask: Tensor | None, rows: Tensor, dim: int) -> Tensor | None:
        return None if mask is None else masked_at(mask, rows, dim, self.tokens, self.start)

    def _weighed(self, mask: Tensor | None, keys: Reduction, dtype: torch.dtype) -> Tensor:
        """The mask with the log of every key's size; a token of text has size one."""
        sizes = keys.sizes()
        sizes = sizes if sizes.ndim == 3 else sizes.unsqueeze(1)
        bias = F.pad(sizes.log(), (self.start, self.text - self.start)).unsqueeze(2).to(dtype)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """``(B, N, H * D)`` to ``(B, H, N, D)``, with the heads of ``like``."""
    return x.view(*x.shape[:2], like.shape[1], like.shape[3]).transpose(1, 2)


def _same_rows(reduction: Reduction) -> bool:
    """True for a reduction that only keeps or drops tokens, and the same ones in every sample."""
    rows = reduction.representative
    kept = type(reduction) is Reduction and reduction.mode == "keep" and reduction.mask is None
    return kept and rows.ndim == 2 and (rows.shape[0] == 1 or rows.stride(0) == 0)


def masked_at(mask: Tensor, rows: Tensor, dim: int, tokens: int, start: int) -> Tensor:
    """A mask of attention at the tokens that are left.

    Args:
        mask: broadcasts against ``(B, H, Q, K)``.
        rows: ``(B, M)`` or ``(B, H, M)`` of the image, the tokens that are left.
        dim: -1: of keys; -2: of queries.
        tokens, start: how many tokens of the image there were, and where they begin.
    """
    if mask.shape[dim] == 1:
        return mask
    mask = mask[(None,) * (4 - mask.ndim)]
    rows = rows if rows.ndim == 3 else rows.unsqueeze(1)  # [B, H or 1, M]
    sides = [torch.arange(n, device=rows.device).expand(*rows.shape[:2], -1) for n in (start, mask.shape[dim] - tokens)]
    after = sides[1][..., start:] + tokens
    index = torch.cat([sides[0], rows + start, after], -1).unsqueeze(-1 if dim == -2 else -2)
    batch = tuple(max(sides) for sides in zip(mask.shape[:2], index.shape[:2], strict=True))
    other = mask.shape[-2 if dim == -1 else -1]
    mask = mask.expand(*batch, *mask.shape[2:])
    index = index.expand(*batch, *((other, -1) if dim == -1 else (-1, other)))
    return mask.gather(dim, index)
