"""``CacheSite``: what a policy sees of one layer's cache, right after the layer has attended with its newest tokens.

Two lengths are told apart everywhere. A *slot* is a logical place in the sequence, padding counted: 0 to ``seen - 1``.
A *row* is a physical place in the cache: 0 to ``K - 1``. ``positions`` says which slot each row holds; empty rows,
which exist where heads or samples hold different numbers, have ``SENTINEL``. A *token* is a slot counted without
padding, so that a sample's answers do not depend on how far it was padded.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.learned import Learned
from tokred.core.site import Site
from tokred.errors import MissingInputError
from tokred.kernels.column_scores import ColumnStatistics
from tokred.kernels.decode_attention import visible_positions
from tokred.kv import newest
from tokred.kv.described import POSITION, Made, Padding, Place, Priced, Rope, like, plain_bytes

__all__ = ["CacheSite", "Made", "Padding", "Place", "Priced", "Rope"]


class CacheSite(Site):
    """One layer's cache, and the queries of the newest tokens.

    Args:
        q: ``[B, H, M, D]`` queries of the ``M`` newest tokens, as the attention used them.
        k: ``[B, Hk, K, D]`` keys, the newest ``M`` rows those of the newest tokens; also :class:`Made`.
        v: ``[B, Hk, K, Dv]`` values; also :class:`Made`.
        positions: ``[B, Hk, K]`` int32 slots of the rows, ``SENTINEL`` in empty ones; None: row ``i`` is slot ``i``.
        seen: slots so far; None: ``K``.
        padding: which of them are real; None: all.
        ragged: whether ``positions`` may have empty rows.
        weights: ``[B, Hk, K]`` float32, how many tokens each row stands for; None: one each.
        alpha, scale, softcap: of the attention's logits, to which it adds ``alpha * ln(weights)``.
        sinks: ``[H]`` logits that take part in the softmax of every query and belong to no row; None: there are none.
        rows: state that a score keeps for every row, ``[B, Hk, K]`` each; travels with the rows.
        notes: state of another shape, by sample first.
        prompt: real tokens of each sample's prompt; None: all so far.
        base: tokens that shares are taken of, for each sample; None: all so far.
        generated: slots after the prompt.
        steps: tokens that will be generated, where that is known.
        projection: gives the matrix ``[C, H * Dv]`` of the attention's output projection.
        rope: the rotary embedding.
        hidden: ``[B, M, C]`` what the attention was given, of which its queries, keys and values are made.
        learned: the policy's module, where it has one, and losses that it takes from it.
        layer, depth: which of the layers that are compressed this is.
    """

    crosses = False  # whether queries are those of another sequence, each of which sees every row

    def __init__(
        self,
        *,
        q: Tensor | None = None,
        k: Tensor | Made,
        v: Tensor | Made,
        positions: Tensor | None = None,
        seen: int | None = None,
        padding: Padding | None = None,
        ragged: bool = False,
        weights: Tensor | None = None,
        alpha: float = 1.0,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rows: dict[str, Tensor] | None = None,
        notes: dict[str, Any] | None = None,
        prompt: tuple[int, ...] | None = None,
        base: tuple[int, ...] | None = None,
        generated: int = 0,
        steps: int | None = None,
        projection: Callable[[], Tensor] | None = None,
        rope: Rope | None = None,
        hidden: Tensor | None = None,
        learned: Learned | None = None,
        layer: int = 0,
        depth: int = 1,
    ) -> None:
        like = k.like if isinstance(k, Made) else k
        scale = like.shape[-1] ** -0.5 if scale is None else scale
        super().__init__(q=q, scale=scale, layer=layer, depth=depth, learned=learned)
        self._values["hidden"] = hidden
        self._hold(k, v)
        self.slots = positions
        self.seen = like.shape[2] if seen is None else seen
        self.padding = padding
        self.ragged = ragged
        self.weights = weights
        self.alpha = alpha
        self.softcap = softcap
        self.sinks = sinks
        self.rows = {} if rows is None else rows
        self.notes = {} if notes is None else notes
        self.prompt = self.lengths if prompt is None else prompt
        self.base = self.lengths if base is None else base
        self.generated = generated
        self.steps = steps
        # As the engine says: slots of a prompt, or of all turns, that has just been read to its end; 0: of none.
        self.read = self.seen
        # As the engine says: bytes of state of one row of one head; see Place for the others.
        self.state_bytes = self.fixed_bytes = self.coming = 0
        # Of a row as it is held in the end, and as it comes; and of the first rows, see Place.
        self.row_bytes = self.fresh_bytes = sum(plain_bytes(x) for x in self._like) + POSITION
        self.whole: tuple[tuple[int, int], ...] = ()
        self._projection = projection
        self._rope = rope
        self._measured: dict[tuple[int | None, str], ColumnStatistics] = {}

    # ------------------------------------------------------------------ shapes

    def _hold(self, k: Tensor | Made, v: Tensor | Made) -> None:
        self._like = tuple(x.like if isinstance(x, Made) else x for x in (k, v))
        made = {name: x.make if isinstance(x, Made) else x for name, x in (("k", k), ("v", v))}
        self._values = {**self._values, **made}

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, K)``."""
        b, _, n = self.extent
        return (b, n)

    @property
    def extent(self) -> tuple[int, int, int]:
        """``(B, Hk, K)``, the shape of scores; asking does not make keys that nobody reads."""
        b, heads, n, _ = self._like[0].shape
        return (b, heads, n)

    @property
    def device(self) -> torch.device:
        """Device of keys and values."""
        return self._like[0].device

    @property
    def heads(self) -> int:
        """Key/value heads ``Hk``."""
        return self.extent[1]

    @property
    def width(self) -> int:
        """Numbers of a key."""
        return self._like[0].shape[3]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens that each sample has seen, evicted ones included."""
        if self.padding is not None:
            return self.padding.lengths
        return (self.seen,) * self.extent[0]

    @property
    def since(self) -> tuple[int, ...]:
        """Real tokens of each sample after its prompt."""
        return tuple(max(0, n - p) for n, p in zip(self.lengths, self.prompt, strict=True))

    @property
    def held(self) -> tuple[int, ...]:
        """Rows that each sample holds at most, padding aside where it is known."""
        b, _, n = self.extent
        return self.lengths if self.slots is None else (n,) * b

    @property
    def place(self) -> Place:
        """Heads, and the bytes of one row of one head: key, value, position, and what the policy keeps for it."""
        return Place(self.heads, self.row_bytes + self.state_bytes, self.fixed_bytes, self.coming, self.whole)

    def price(self, store: Priced, *, uneven: bool = False, shapes: tuple[Tensor, ...] = ()) -> None:
        """Count rows, of ``shapes`` or as they are, at what a store takes; ``uneven``: heads differ."""
        rows = shapes or self._like
        self.row_bytes, self.fresh_bytes = store.row_bytes(*rows), store.fresh_bytes(*rows)
        self.whole = store.whole_rows(*rows)
        self.fixed_bytes = self.depth * store.note_bytes(self.heads, self.width, uneven=uneven)

    @property
    def key_bytes(self) -> int:
        """Bytes of one key, and one query, as it comes."""
        return plain_bytes(self._like[0])

    @functools.cached_property
    def real(self) -> Tensor | None:
        """``[B, 1 or Hk, K]`` bool, False on padding and empty rows; None: all real."""
        mask = None if self.padding is None else self.padding.mask
        if self.slots is None:
            return None if mask is None else mask[:, None, :]
        if mask is None and not self.ragged:
            return None
        return visible_positions(self.slots, None, mask)

    @functools.cached_property
    def token(self) -> Tensor:
        """``[B or 1, Hk or 1, K]`` int64: how many real tokens stand before each row's; empty rows hold anything."""
        if self.slots is None:
            if self.padding is not None:
                return self.padding.token[:, None, :]
            return torch.arange(self.extent[2], device=self.device)[None, None]
        slots = self.slots.long()
        if self.padding is None:
            return slots
        flat = slots.clamp(max=self.seen - 1).flatten(1)
        return self.padding.token.gather(1, flat).view(slots.shape)

    def column(self, values: tuple[int, ...]) -> Tensor | int:
        """A number for each sample as something that compares with :attr:`token`: ``[B, 1, 1]``, or one number."""
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, device=self.device).view(-1, 1, 1)

    def stands_behind(self, count: int | tuple[int, ...]) -> Tensor:
        """``[B or 1, Hk or 1, K]`` bool: whether fewer than ``count`` real tokens of the sample are newer."""
        counts = (count,) * len(self.lengths) if isinstance(count, int) else count
        return self.token >= self.column(tuple(n - c for n, c in zip(self.lengths, counts, strict=True)))

    # ------------------------------------------------------------------ attention

    @property
    def loose(self) -> bool:
        """True if padding stands between tokens or behind them, so that the newest slots are not the newest tokens."""
        return self.padding is not None and not self.padding.aligned

    @functools.cached_property
    def order(self) -> Tensor | None:
        """``[B, 1 or Hk, K]`` int64: rows in an order in which all real ones stand together at the end.

        They do already where it is None.
        """
        real = self.real
        if real is None or not (self.ragged or self.loose):
            return None
        return real.byte().sort(dim=-1, stable=True).indices

    def queries(self, last: int | None = None) -> Tensor:
        """``[B, H, M, D]`` queries: those of this forward, or of the ``last`` tokens of each sample, in order.

        Where a sample has fewer, rows that mean nothing stand before them.
        """
        return self.q if last is None else newest.queries(self, last)[0]

    def behind(self, count: int) -> Tensor:
        """``[B or 1, count]`` int64: how many tokens are newer than that of each of the newest ``count`` slots."""
        if self.padding is None:
            return torch.arange(count - 1, -1, -1, device=self.device)[None]
        total = self.padding.mask.sum(1, keepdim=True)
        return (total - 1 - self.padding.token[:, -count:]).clamp(min=0)

    def arrived(self, count: int) -> Tensor | int:
        """Tokens among the newest ``count`` slots: one number, or for each sample ``[B, 1, 1]``."""
        return count if self.padding is None else self.padding.mask[:, -count:].sum(1).view(-1, 1, 1)

    def columns(
        self,
        last: int | None = None,
        *,
        weight: Tensor | None = None,
        candidates: Tensor | None = None,
        causal: bool = True,
        group: str = "mean",
    ) -> Tensor:
        """How much attention every row received: a sum over queries, see :meth:`Attention.columns`.

        Args:
            last: newest tokens of each sample whose queries vote; None: those of this forward.
            weight: ``[M]`` or ``[B, M]`` of each query.
            candidates: ``[B, 1 or Hk, K]`` bool, the rows among which the attention is shared out; None: all.
            causal: whether the newest ``M`` rows are the queries' own, in order.
            group: over the query heads of a key/value head: "mean", "sum", "max" or "none".

        Returns:
            ``[B, Hk, K]`` float32 (``[B, H, K]`` for "none"); zero on padding and empty rows.
        """
        attention, order = self._attend(last, candidates, causal)
        return newest.as_they_stand(self._of_rows(attention.columns(weight, group=group)), order)

    def statistics(self, last: int | None = None, *, group: str = "none") -> ColumnStatistics:
        """Sum, sum of squares, maximum and entropy of what every row received from the ``last`` queries."""
        if (last, group) not in self._measured:  # a score and a budget may ask for the same
            attention, order = self._attend(last)
            found = attention.statistics(group=group)
            self._measured[last, group] = ColumnStatistics(
                *(newest.as_they_stand(self._of_rows(x), order) for x in found)
            )
        return self._measured[last, group]

    @property
    def attention(self) -> Attention:
        """Attention of this forward's queries to the sinks, if any, and all rows; padding neither votes nor is seen."""
        return self._attend(None)[0]

    def _attend(
        self, last: int | None, candidates: Tensor | None = None, causal: bool = True
    ) -> tuple[Attention, Tensor | None]:
        """Attention as :meth:`columns` has it, and the order in which it has the rows; None: as they stand."""
        q, votes = newest.voters(self, last)
        order = newest.row_order(self, q, last) if causal else None
        real, weights = self.real, self.weights
        if candidates is not None:
            real = candidates if real is None else real & candidates
        real, weights = (None if x is None else newest.ordered(x, order) for x in (real, weights))
        bias = None if weights is None else self.alpha * weights.log()
        k, cap = newest.ordered(self.k, order), self.softcap
        if self.sinks is not None:
            assert self.scale is not None  # since it was made
            q, k, real, bias = newest.with_sink(q, k, self.sinks, self.scale, real, bias)
        made = Attention(q, k, bias=bias, scale=self.scale, mask=real, votes=votes, softcap=cap, causal=causal)
        return made, order

    def _of_rows(self, found: Tensor) -> Tensor:
        """``[B, Hk or H, K]``, without what the sinks received."""
        return found if self.sinks is None else found[..., 1:]

    # ------------------------------------------------------------------ the rest

    @property
    def projection(self) -> Tensor:
        """``[C, H * Dv]`` matrix of the attention's output projection, without its bias.

        Raises:
            MissingInputError: the host does not supply it.
        """
        if self._projection is None:
            raise MissingInputError("this site does not supply 'projection', the attention's output projection")
        return self._projection()

    @property
    def hidden(self) -> Tensor:
        """``[B, M, C]`` what the attention was given in this forward, after the layer's norm."""
        return self._get("hidden")

    @property
    def rope(self) -> Rope:
        """The rotary embedding.

        Raises:
            MissingInputError: the host does not supply it.
        """
        if self._rope is None:
            raise MissingInputError("this site does not supply 'rope', the layer's rotary embedding")
        return self._rope

    def alone(self, score: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``score`` of the real rows of each sample, as if nothing else were in the batch.

        Args:
            score: takes the tensors at real rows only, ``[1 or B, heads, n, ...]``, and gives ``[1 or B, heads, n]``.
            tensors: ``[B, Hk, K, ...]``.

        Returns:
            ``[B, Hk, K]`` float32, zero on padding and empty rows.
        """
        if (real := self.real) is None:
            return score(*tensors)
        b, heads, n = self.extent
        out = torch.zeros(b, heads, n, device=self.device)
        together = real.shape[1] == 1
        for i in range(b):
            for h in range(1 if together else heads):
                some = slice(None) if together else slice(h, h + 1)
                index = real[i, h].nonzero().view(-1)
                if len(index):
                    found = score(*(t[i : i + 1, some].index_select(2, index) for t in tensors))
                    out[i : i + 1, some, index] = found.float()
        return out

    def without_queries(self) -> CacheSite:
        """A copy that holds no queries: for choices that come later."""
        other = copy.copy(self)
        # What a module in training learns from waits with it.
        hidden = self._values["hidden"] if self.learned.training else None
        other._values = {**self._values, "q": None, "hidden": hidden}
        return other

    def without_tensors(self) -> CacheSite:
        """A copy that holds neither queries nor rows, until :meth:`at` says which rows there are."""
        other = self.without_queries()
        other._values = {**other._values, "k": None, "v": None, "hidden": None}
        other._like = tuple(like(x, tuple(x.shape)) for x in self._like)
        other._measured = {}
        for name in ("real", "token", "order"):
            other.__dict__.pop(name, None)
        other.slots = other.weights = None
        return other

    def at(
        self, k: Tensor | Made, v: Tensor | Made, positions: Tensor | None, ragged: bool, weights: Tensor | None
    ) -> CacheSite:
        """The layer after its rows have changed; for choices that need no queries any more."""
        other = copy.copy(self)
        for name in ("real", "token", "order"):
            other.__dict__.pop(name, None)
        other._measured = {}
        other._hold(k, v)
        other.slots, other.ragged, other.weights = positions, ragged, weights
        return other
