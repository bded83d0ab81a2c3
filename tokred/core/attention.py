"""``Attention``: the attention of one layer, and whatever a method can ask of it without its matrix of weights.

Sites hold one, or make it on demand. It can be built by hand::

    tokred.core.attention.Attention(q, k, causal=True).columns(rows=slice(30, 32))  # what the last two of 32 look at
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokred.kernels.attention import attention
from tokred.kernels.column_scores import ColumnStatistics, column_power, column_scores, column_statistics
from tokred.kernels.column_scores.reference import Options, weights_reference
from tokred.kernels.dispatch import without_autocast
from tokred.kernels.gather_rows import gather_rows


class Attention:
    """The attention of one layer: its queries, its keys, and what else shapes its weights.

    The weights ``A`` are ``softmax(softcap(q . k * scale) + bias)`` over the keys that a query sees, in float32 from
    the first operation (float64 for float64) whatever the type of queries and keys. Nothing is computed, and no tensor
    copied, before it is asked for.

    Args:
        q: ``(B, H, M, D)`` queries, or a function that makes those from ``first`` to ``end``: there are then as many as
            keys from ``offset`` on.
        k: ``(B, Hk, N, D)`` keys of the type of the queries; ``H`` is a multiple of ``Hk``.
        bias: ``(B, N)``, ``(B, Hk, N)`` or ``(B, H, N)`` float, what is added to the logits of each key (log of the
            sizes, padding); -inf hides a key.
        scale: factor of the logits; None: ``D ** -0.5``.
        mask: ``(B or 1, N)`` or ``(B or 1, 1 or Hk, N)`` bool, False on keys that no query sees; None: all are seen.
        votes: ``(B, M)`` bool or float, the say of each query, a factor on every weight; padding has none. None: one
            each.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the bias; None: they stay.
        window: a causal query sees so many keys up to its own; None: all.
        causal: whether a query sees no key behind its own. The key of query ``m`` is ``offset + m``.
        offset: keys before that of the first query of causal attention; None: the last query's is the last.

    Raises:
        ValueError: ``window`` or ``offset`` without ``causal``, or an offset at which queries have no keys.
    """

    def __init__(
        self,
        q: Tensor | Callable[[int, int], Tensor],
        k: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
        mask: Tensor | None = None,
        votes: Tensor | None = None,
        softcap: float | None = None,
        window: int | None = None,
        causal: bool = False,
        offset: int | None = None,
    ) -> None:
        if not causal and (window is not None or offset is not None):
            raise ValueError(f"window and offset need causal=True, got window={window}, offset={offset}")
        if isinstance(q, Tensor):
            count, most = q.shape[2], k.shape[2] - q.shape[2]
        else:
            count, most = k.shape[2] - (offset or 0), offset or 0
        if offset is not None and not 0 <= offset <= most:
            raise ValueError(f"offset must be 0 to {most} for {count} queries and {k.shape[2]} keys, got {offset}")
        self._q = q
        self.k = k
        self.bias = bias
        self.scale = scale
        self.mask = mask
        self.votes = votes
        self.softcap = softcap
        self.window = window
        self.causal = causal
        self.count = count
        self.offset = most if offset is None else offset

    @property
    def q(self) -> Tensor:
        """``(B, H, M, D)`` queries."""
        return self.queries(0, self.count)

    def queries(self, first: int, end: int) -> Tensor:
        """``(B, H, end - first, D)`` some of the queries; others need not be made."""
        if not isinstance(self._q, Tensor):
            return self._q(first, end)
        return self._q if first == 0 and end == self.count else self._q[:, :, first:end]

    def columns(self, weight: Tensor | None = None, rows: slice | None = None, group: str = "none") -> Tensor:
        """How much attention every key receives: ``s[n] = sum_m w[m] A[m, n]``.

        Args:
            weight: of every query (of those of ``rows``), ``(M,)``, ``(B, M)`` or ``(B, H, M)`` float; None: one each.
            rows: which queries, a slice without a step; they vote whatever ``votes`` says. None: all, by their votes.
            group: over the query heads of a key head: "none", "sum", "mean" or "max".

        Returns:
            ``(B, H, N)`` float32, or ``(B, Hk, N)`` with a group; zero on keys that none of the queries sees.
        """
        first, end = self._span(rows)
        q, k, terms = self._seen(first, end)
        return self._whole(column_scores(q, k, self._weight(weight, rows), group=group, **terms))

    def statistics(
        self, weight: Tensor | None = None, rows: slice | None = None, group: str = "none"
    ) -> ColumnStatistics:
        """Sum, sum of squares, maximum and entropy of what every key receives, see :func:`column_statistics`.

        Args:
            weight: see :meth:`columns`, as all below; maximum and entropy do not read it.
            rows: which queries.
            group: over the query heads of a key head, of each statistic.

        Returns:
            Four tensors ``(B, H, N)`` float32, or ``(B, Hk, N)`` with a group.
        """
        first, end = self._span(rows)
        q, k, terms = self._seen(first, end)
        found = column_statistics(q, k, self._weight(weight, rows), group=group, **terms)
        return ColumnStatistics(*(self._whole(one) for one in found))

    def power(self, start: Tensor, rounds: int, *, tolerance: float = 0.0) -> Tensor:
        """Column scores weighted by the scores before, again and again: page rank on this layer's attention.

        Args:
            start: scores that the tokens begin with, ``(N,)``, ``(B, N)`` or ``(B, H, N)`` float; times their votes.
            rounds: how often.
            tolerance: a head is settled once a round changes it by less, summed over the tokens; 0: never.

        Returns:
            ``(B, H, N)`` float32.

        Raises:
            ValueError: the attention is causal or has a softcap.
        """
        if self.causal or self.softcap is not None:
            raise ValueError(f"power is for attention to both sides, got causal={self.causal}, softcap={self.softcap}")
        if self.votes is not None:
            start = start * (self.votes.unsqueeze(1) if start.ndim == 3 else self.votes)
        q, k, terms = self._seen(0, self.count)
        names = ("scale", "bias", "key_mask")
        return column_power(q, k, start, rounds, tolerance=tolerance, **{name: terms[name] for name in names})

    def attend(self, values: Tensor) -> Tensor:
        """The weights after softmax, over other values than the layer's own.

        A softcap or a window, which no fused attention of torch takes, costs a matrix of all weights here.

        Args:
            values: ``(B, N, E)``, or ``(B, H, N, E)`` per head.

        Returns:
            ``(B, H, M, E)`` float32; zero for queries that see no key.
        """
        q, k, terms = self._seen(0, self.count)
        heads = q.shape[1]
        q, k = q.float(), _repeated(k.float(), heads)
        v = (values.unsqueeze(1) if values.ndim == 3 else values).float()
        v = v.expand(-1, heads, -1, -1)[:, :, : k.shape[2]]
        bias, mask, scale = terms["bias"], terms["key_mask"], self.scale
        with without_autocast(q):
            if self.softcap is None and self.window is None:
                return attention(q, k, v, bias=bias, scale=scale, key_mask=mask, causal=self.causal)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            options = Options(scale, self.causal, self.window or 0, self.softcap or 0.0, "none")
            return weights_reference(q, k, None, bias, mask, options) @ v

    def among(self, rows: Tensor, mask: Tensor | None = None) -> Attention:
        """The attention among some of the tokens alone, each of its rows renormalised over them; in their order.

        Args:
            rows: ``(B, M)`` int64, the tokens.
            mask: ``(B, M)`` bool, False on padding, which does not vote; None: all are real.

        Raises:
            ValueError: the attention is causal.
        """
        self._check_free("among")
        bias = self.bias
        if bias is not None:
            at = rows if bias.ndim == 2 else rows.unsqueeze(1).expand(-1, bias.shape[1], -1)
            bias = bias.gather(-1, at)
        terms: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "mask": mask, "votes": mask}
        return Attention(gather_rows(self.q, rows), gather_rows(self.k, rows), bias=bias, **terms)

    def sample(self, i: int, rows: Tensor) -> Attention:
        """The attention among some tokens of one sample, as if nothing else were in the batch.

        Args:
            i: which sample.
            rows: ``(M,)`` int64, its tokens; all are real.

        Raises:
            ValueError: the attention is causal.
        """
        self._check_free("sample")
        q, k = (t[i : i + 1].index_select(2, rows) for t in (self.q, self.k))
        bias = None if self.bias is None else self.bias[i : i + 1].index_select(-1, rows)
        return Attention(q, k, bias=bias, scale=self.scale, softcap=self.softcap)

    def asked(self, i: int, q: Tensor, offset: int) -> Attention:
        """The attention of one sample to other queries, each one vote.

        Args:
            i: which sample.
            q: ``(1, H, M, D)``.
            offset: keys before that of the first query, where the attention is causal.
        """

        def own(value: Tensor | None) -> Tensor | None:
            return value if value is None or len(value) == 1 else value[i : i + 1]

        terms: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "mask": own(self.mask)}
        if self.causal:
            terms |= {"causal": True, "window": self.window, "offset": offset}
        return Attention(q, self.k[i : i + 1], bias=own(self.bias), **terms)

    def _check_free(self, name: str) -> None:
        if self.causal:
            raise ValueError(f"{name} picks tokens of attention to both sides; this one is causal")

    def _span(self, rows: slice | None) -> tuple[int, int]:
        if rows is None:
            return 0, self.count
        # Not slice.indices, which the compiler cannot trace where lengths are symbols.
        first, end = rows.start or 0, self.count if rows.stop is None else min(rows.stop, self.count)
        first, end = (at + self.count if at < 0 else at for at in (first, end))
        if rows.step is not None or not 0 <= first < end:
            raise ValueError(f"rows must be some of {self.count} queries, without a step, got {rows}")
        return first, end

    def _weight(self, weight: Tensor | None, rows: slice | None) -> Tensor | None:
        votes = self.votes
        if votes is None or rows is not None:
            return weight
        if weight is None:
            return votes.float()
        return weight * (votes.unsqueeze(1) if weight.ndim == 3 else votes)

    def _seen(self, first: int, end: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Some queries, the keys that any of them can see, and the options of the operators."""
        q, k, bias, mask = self.queries(first, end), self.k, self.bias, self.mask
        if self.causal and self.offset + end < k.shape[2]:
            # Operators take the last query's key for the last of all: keys behind it are cut off, which is a view.
            seen = max(0, self.offset + end)
            k = k[:, :, :seen]
            bias, mask = (None if t is None else t[..., :seen] for t in (bias, mask))
        if mask is not None and mask.ndim == 3:
            if mask.shape[1] == 1:
                mask = mask[:, 0]
            else:
                # Operators take one mask for all heads; those of single heads go into the bias.
                if bias is None:
                    bias = torch.zeros(k.shape[:3], device=k.device)
                elif bias.ndim == 2:
                    bias = bias.unsqueeze(1).expand(k.shape[:3])
                bias, mask = bias.masked_fill(~_repeated(mask, bias.shape[1]), -torch.inf), None
        if bias is not None and bias.ndim == 3:
            bias = _repeated(bias, q.shape[1])
        return q, k, {
            "bias": bias,
            "key_mask": None if mask is None else mask.expand(k.shape[0], -1),
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.window,
            "causal": self.causal,
        }  # fmt: skip

    def _whole(self, found: Tensor) -> Tensor:
        """``(..., N)``: zero on keys behind those that were seen."""
        behind = self.k.shape[2] - found.shape[-1]
        return torch.nn.functional.pad(found, (0, behind)) if behind else found


def _repeated(x: Tensor, heads: int) -> Tensor:
    """``(B, Hk, ...)`` for each of the query heads, ``(B, H, ...)``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
