"""``TokenSelect``: all rows stay, and a query attends to the first, the newest, and those that its heads vote for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_flags
from tokred.kernels.decode_attention import decode_attention
from tokred.kv.described import Made
from tokred.kv.select import kept_mask, largest, rows_of
from tokred.kv.site import CacheSite
from tokred.kv.stores.grown import Grown
from tokred.kv.stores.pairs import Rows, appended, counted, selected
from tokred.kv.stores.store import Query, Store, WholeShelf
from tokred.kv.turning import turned

VOTES = ("soft", "raw", "hard")
POSITIONS = ("compact", "true")
# Rows of room that held ones grow into.
_ROOM = 128
# Tokens, so that no position is so early.
_FAR = 1 << 40


@dataclass(frozen=True)
class TokenSelect(Store):
    """Nothing is forgotten; at each token all heads of a layer vote for the rows that they attend to together.

    Several tokens at once, such as a prompt, attend to all rows.

    Args:
        budget: tokens that are chosen, beside the first and newest ones.
        sinks: first tokens, always attended to.
        recent: newest tokens, always attended to.
        theta: a query whose fingerprint has at least this cosine with that of the last choice takes its list over;
            above 1: every query chooses.
        vote: "soft", the sum of the heads' softmax; "raw", of their logits; "hard", of how many have a token among
            their best.
        pool: width of a maximum over neighbours of the votes, odd; 0: none.
        positions: "compact", tokens that are attended to are numbered anew, so that no distance is longer than they
            are many; "true", they stay where they stood.
        scaled: whether logits of the vote are scaled as the attention's are.

    Source: Wu et al., TokenSelect, EMNLP 2025 (arXiv 2411.02886).
    """

    name: ClassVar[str] = "tokenselect"
    can: ClassVar[frozenset[str]] = frozenset({"crop", "attend"})
    searches: ClassVar[bool] = True

    budget: int = 2048
    sinks: int = 128
    recent: int = 512
    theta: float = 0.9
    vote: str = "soft"
    pool: int = 0
    positions: str = "compact"
    scaled: bool = True

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("sinks", 0), ("recent", 1), ("pool", 0)):
            check_count(getattr(self, name), name, least)
        if self.pool and self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, or 0 for none, got {self.pool}")
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or not self.theta >= -1:
            raise ValueError(
                f"theta must be a number of at least -1 (above 1: every query chooses), got {self.theta!r}"
            )
        check_choice(self.vote, "vote", VOTES)
        check_choice(self.positions, "positions", POSITIONS)
        check_flags(scaled=self.scaled)

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """Numbering anew takes keys as they were before they turned."""
        return frozenset({"rotation"} if self.positions == "compact" else ())

    @property
    def all(self) -> int:
        """Tokens that a query attends to; no more than these are not searched."""
        return self.sinks + self.budget + self.recent

    def open(self) -> SelectShelf:
        return SelectShelf(self)

    def votes(self, logits: Tensor, candidates: Tensor) -> Tensor:
        """``[B, N]`` float32: what heads give to tokens, -inf to others than ``candidates``.

        Args:
            logits: ``[B, H, N]`` float32.
            candidates: ``[B, N]`` bool.
        """
        among = candidates[:, None]
        if self.vote == "soft":
            score = logits.masked_fill(~among, -torch.inf).softmax(-1).nan_to_num(0.0).sum(1)
        elif self.vote == "raw":
            score = logits.sum(1)
        else:
            counts = (self.budget,) * len(logits)
            score = kept_mask(logits, among, None, counts).sum(1).to(logits.dtype)
        score = score.masked_fill(~candidates, -torch.inf)
        if self.pool:
            score = F.max_pool1d(score[:, None], self.pool, 1, self.pool // 2)[:, 0].masked_fill(
                ~candidates, -torch.inf
            )
        return score


class Chosen(NamedTuple):
    """A list, and what it was chosen for.

    Attributes:
        fingerprint: ``[B, H * D]`` of the query.
        tokens: ``[B, n]`` bool, which of the first rows are on the list.
        border: ``[B, 1]`` int64, the first token that was not a candidate, being among the newest.
    """

    fingerprint: Tensor
    tokens: Tensor
    border: Tensor


class SelectShelf(WholeShelf):
    """Rows of a layer: settled ones, in order, and behind them those of this forward.

    Args:
        store: what it belongs to.
    """

    def __init__(self, store: TokenSelect) -> None:
        self.store = store
        self._held: tuple[Grown, Grown] | None = None  # keys, before they turned where they are numbered anew; values
        self._fresh: Rows | None = None
        self._at: Tensor | None = None  # [B or 1, n], by how many positions the held keys were turned back
        self._angle: Tensor | None = None  # where held keys are turned back
        self._chosen: Chosen | None = None

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._all(0) if self.width else None

    @property
    def values(self) -> Tensor | None:
        return self._all(1) if self.width else None

    def _all(self, which: int) -> Tensor:
        """``[B, Hk, K, D]``, keys or values."""
        return self.newest[which] if self._held is None else self._making(which)()

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self._held is None:
            return super().show()
        # A step that nobody looks at puts none of them together.
        keys, values = (Made.of(self._held[i].rows, self.width, self._making(i)) for i in (0, 1))
        return keys, values

    def _making(self, which: int) -> Callable[[], Tensor]:
        """Gives keys or values as they are now, whenever it is called."""
        assert self._held is not None  # else there is nothing to put together
        held, fresh = self._held[which].rows, None if self._fresh is None else self._fresh[which]
        turns = None if which or self._at is None or self._angle is None else (self._at, self._angle)
        return partial(_restored, held, turns, fresh)

    @property
    def newest(self) -> Rows:
        if self._fresh is not None:
            return self._fresh
        assert self._held is not None  # rows are asked for where there are some
        return self._held[0].rows[:, :, :0], self._held[1].rows[:, :, :0]

    @property
    def complete(self) -> bool:
        return self._held is None

    @property
    def width(self) -> int:
        return (0 if self._held is None else self._held[0].count) + counted(self._fresh)

    @property
    def samples(self) -> int:
        return self.newest[0].shape[0]

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._fresh = appended(self._fresh, keys, values)

    def settle(self, site: CacheSite | None) -> None:
        if self._fresh is None or self.width < self.store.all:
            return  # the next token attends to everything
        keys, values = self._fresh
        if self.store.positions == "compact":
            if site is None:
                return  # nobody says where they stand
            at = site.token[:, 0, -keys.shape[2] :]
            self._angle = site.rope.turns()[0] if self._angle is None else self._angle
            keys = turned(keys, at, self._angle, back=True).to(keys.dtype)
            self._at = at if self._at is None else torch.cat([self._at.expand(len(at), -1), at], 1)
        self._fresh = None
        if self._held is None:
            self._held = Grown.of(keys), Grown.of(values)
        else:
            self._held = self._held[0].append(keys, _ROOM), self._held[1].append(values, _ROOM)

    def crop(self, count: int) -> None:
        if count == 0:
            return
        if self._fresh is not None:
            left = self._fresh[0].shape[2] - count
            self._fresh = self._fresh[0][:, :, : max(left, 0)], self._fresh[1][:, :, : max(left, 0)]
            count = max(-left, 0)
        if self._held is not None and count:
            left = self._held[0].count - count
            self._held = self._held[0].first(left), self._held[1].first(left)
            self._at = None if self._at is None else self._at[:, :left]
        self._chosen = None

    def detach(self, count: int) -> Rows:
        assert self._fresh is not None  # they have come in this forward
        keys, values = self._fresh
        self._fresh = keys[:, :, :-count], values[:, :, :-count]
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        if self._held is not None:
            self._held = self._held[0].select(index), self._held[1].select(index)
        self._fresh = selected(self._fresh, index)
        if self._at is not None and len(self._at) > 1:
            self._at = self._at.index_select(0, index)
        if self._chosen is not None:
            self._chosen = Chosen(*(x.index_select(0, index) for x in self._chosen))

    # ------------------------------------------------------------------ one query

    def attend(self, query: Query) -> Tensor | None:
        store, q, new = self.store, query.q, self._fresh
        if self._held is None or new is None or new[0].shape[2] != 1:
            return None
        n = self._held[0].count
        padding = query.padding(n + 1)
        if padding is None:
            if store.all > n:
                return None
            token, count = torch.arange(n + 1, device=q.device)[None], torch.tensor([[n + 1]], device=q.device)
            real = torch.ones_like(token, dtype=torch.bool)
        else:
            token, real = padding.long().cumsum(1) - padding.long(), padding
            count = padding.sum(1, keepdim=True)
        key, angle = new[0], self._angle
        if angle is not None:
            # Before they turned, so that they can be put anywhere.
            q, key = (turned(x, token[:, n:], angle, back=True) for x in (q, key))
        tokens = self._list(q, query, token[:, :n].expand(len(q), n), real[:, :n].expand(len(q), n), count)
        index, meant = (x[:, 0] for x in rows_of(tokens[:, None], largest(tokens.sum(-1))))
        held = (x.rows for x in self._held)
        # Not index_select, which first copies all rows of a buffer that has room behind them.
        keys, values = (torch.stack([x[i][:, at] for i, at in enumerate(index)]) for x in held)
        if angle is not None:
            own = meant.sum(-1, keepdim=True)
            keys = turned(keys, torch.arange(index.shape[1], device=q.device)[None], angle)
            q, key = (turned(x, own, angle) for x in (q, key))
        visible = torch.cat([meant, real[:, n:].expand(len(q), 1)], 1)
        kind = torch.promote_types(query.q.dtype, torch.float32)
        keys, values = (torch.cat([x.to(kind), one.to(kind)], 2) for x, one in ((keys, key), (values, new[1])))
        found = decode_attention(q.to(kind), keys, values, key_mask=visible, scale=query.scale, softcap=query.softcap)
        return found.output.to(query.q.dtype)

    def _list(self, q: Tensor, query: Query, token: Tensor, real: Tensor, count: Tensor) -> Tensor:
        """``[B, n]`` bool: which of the held rows a query attends to.

        Args:
            q: ``[B, H, 1, D]``, as it scores: before it turned, where tokens are numbered anew.
            query: what is asked.
            token, real: ``[B, n]``, of the held rows.
            count: ``[B or 1, 1]``, tokens of each sample, the query's own among them.
        """
        store, last = self.store, self._chosen
        begin = count - store.recent
        if self._angle is not None:
            q = turned(q, torch.full((1, 1), store.recent, device=q.device), self._angle)
        fingerprint = q.flatten(1).to(torch.promote_types(q.dtype, torch.float32))
        again = torch.zeros(len(q), 1, dtype=torch.bool, device=q.device)
        if last is not None and last.fingerprint.shape == fingerprint.shape:
            near = F.cosine_similarity(fingerprint, last.fingerprint, -1, 1e-12)[:, None] >= store.theta
            # Tokens that have left the newest ones since are attended to as if they had not, for a while.
            again = near & (begin - last.border <= store.recent // 2)
        # Where nothing has to be chosen all is attended to, and no later query takes that over.
        listed, border = torch.zeros_like(real), begin.masked_fill(count <= store.all, -_FAR).expand(len(q), 1)
        if last is not None:
            listed[:, : last.tokens.shape[1]] = last.tokens & again
            border = torch.where(again, last.border, border)
        if last is None or not bool(again.all()):
            candidates = real & (token >= store.sinks) & (token < begin)
            score = store.votes(self._logits(fingerprint.view(len(q), q.shape[1], -1), query), candidates)
            new = kept_mask(score[:, None], candidates[:, None], None, (store.budget,) * len(q))[:, 0]
            listed = torch.where(again, listed, new)
            fingerprint = fingerprint if last is None else torch.where(again, last.fingerprint, fingerprint)
            self._chosen = Chosen(fingerprint, listed, border)
        return real & (listed | (token < store.sinks) | (token >= border))

    def _logits(self, q: Tensor, query: Query) -> Tensor:
        """``[B, H, n]``: products of queries ``[B, H, D]`` with all held keys."""
        assert self._held is not None  # asked before
        keys, (b, h, d) = self._held[0].rows, q.shape
        grouped = q.view(b, keys.shape[1], h // keys.shape[1], d)
        if self.store.scaled:
            grouped = grouped * (d**-0.5 if query.scale is None else query.scale)
        return (grouped @ keys.to(q.dtype).mT).flatten(1, 2)


def _restored(held: Tensor, turns: tuple[Tensor, Tensor] | None, fresh: Tensor | None) -> Tensor:
    """``[B, Hk, K, D]``: held rows, turned where ``turns`` tells their positions and the angle, and fresh ones."""
    rows = held if turns is None else turned(held, *turns).to(held.dtype)
    return rows if fresh is None else torch.cat([rows, fresh], 2)
