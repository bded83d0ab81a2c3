"""``SharedShelf``: rows that all samples have in common, held once, and behind them each sample's own.

Source: Zhu et al., RelayAttention, ACL 2024 (arXiv 2402.14808).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.kernels.attention import attention_with_lse
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.described import Made
from tokred.kv.stores.rectangle import RectangleShelf, newest_slots
from tokred.kv.stores.store import Query, Shelf


def fused(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over several segments of rows, of the attentions over each.

    Args:
        outputs: ``[..., D]`` of each segment.
        lses: ``[...]`` log-sum-exp of the logits of each; -inf where a segment has nothing to see, whose output is any.

    Returns:
        Output ``[..., D]`` and log-sum-exp ``[...]`` in float32 (float64 for float64); zero and -inf where no segment
        has anything.
    """
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    every = torch.stack([x.to(dtype) for x in lses])
    total = every.logsumexp(0)
    weights = (every - total).exp().nan_to_num(0.0)
    parts = [
        torch.where(w[..., None] > 0, w[..., None] * out.to(dtype), 0.0)
        for w, out in zip(weights, outputs, strict=True)
    ]
    return torch.stack(parts).sum(0), total


class SharedShelf(Shelf):
    """Rows in common, of one sample, and a rectangle of rows of any number of samples.

    Args:
        common: rows of one sample, in any form; they stay as they are.
        seen: slots that they stand for.
    """

    several = True

    def __init__(self, common: Shelf, seen: int) -> None:
        self.common = common
        self.seen = seen
        self.own = RectangleShelf()

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._both(self.common.keys, self.own.keys)

    @property
    def values(self) -> Tensor | None:
        return self._both(self.common.values, self.own.values)

    def _both(self, common: Tensor | None, own: Tensor | None) -> Tensor:
        assert common is not None  # a prefix has tokens
        if own is None:
            return common
        return torch.cat([common.expand(own.shape[0], -1, -1, -1), own], 2)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        return self.common.newest if self.own.keys is None else self.own.newest

    @property
    def complete(self) -> bool:
        return False

    @property
    def width(self) -> int:
        return self.common.width + self.own.width

    @property
    def mean_width(self) -> int:
        return self.common.mean_width + self.own.width

    @property
    def samples(self) -> int:
        return 1 if self.own.keys is None else self.own.samples

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self.own.keys is None:
            return self.common.show()

        def made(rows: Tensor, make: Callable[[], Tensor | None]) -> Made:
            return Made.of(rows, self.width, lambda: self._both(make(), rows))

        keys, values = self.own.newest
        return made(keys, lambda: self.common.keys), made(values, lambda: self.common.values)

    @property
    def moved(self) -> bool:
        return self.common.moved

    def positions(self, seen: int) -> Tensor | None:
        common = self.common.positions(self.seen)
        count = self.own.width
        if common is None or not count:
            return common
        common = common.expand(self.samples, -1, -1)
        new = newest_slots(seen, count, common.device).expand(*common.shape[:2], count)
        return torch.cat([common, new], 2)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.own.append(keys, values)

    def attend(self, query: Query) -> Tensor | None:
        """``[B, H, M, D]``, the attention of the newest ``M`` rows' queries: over the rows in common, which are read
        once for all samples, and over each sample's own; joined by their log-sum-exp."""
        q = query.q
        if query.softcap is not None or self.own.keys is None:
            return None
        b, h, m, d = q.shape
        keys, values = self.common.keys, self.common.values
        assert keys is not None  # a prefix has tokens
        assert values is not None
        heads = keys.shape[1]
        group = h // heads
        # All samples, and all heads that share keys, ask as one: every query stands behind every row.
        folded = q.reshape(b, heads, group, m, d).movedim(0, 2).reshape(1, heads, group * b * m, d)
        positions = self.common.positions(self.seen)
        empty = None if positions is None else positions == SENTINEL
        bias = None if empty is None else torch.zeros_like(empty, dtype=torch.float32).masked_fill(empty, -torch.inf)
        first = attention_with_lse(folded, keys, values, bias=bias, scale=query.scale)

        def unfolded(x: Tensor) -> Tensor:
            rest = x.shape[3:]
            return x.reshape(heads, group, b, m, *rest).movedim(2, 0).reshape(b, h, m, *rest)

        own = self.own.newest
        mask = query.padding(own[0].shape[2])
        second = attention_with_lse(q, *own, key_mask=mask, causal=m > 1, scale=query.scale)
        out, _ = fused([unfolded(first.output), second.output], [unfolded(first.lse), second.lse])
        return out.to(q.dtype)

    def crop(self, count: int) -> None:
        self.own.crop(count)

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        return self.own.detach(count)

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        self.own.select(index, listed)

    # ------------------------------------------------------------------ memory

    def snapshot(self) -> dict[str, Any]:
        return {"own": self.own.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        self.own.restore(state["own"])
