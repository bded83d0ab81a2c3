"""``TokenButler``: all rows stay, and each head of a query attends to those that a trained network foretells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_count, check_flags, check_number, check_share, is_count
from tokred.core.learned import Facts
from tokred.core.schedules import kept_ceil
from tokred.errors import TokredError
from tokred.kernels.dispatch import without_autocast
from tokred.kv.foresight import Foresight, distance
from tokred.kv.select import kept_mask, rows_of
from tokred.kv.site import CacheSite
from tokred.kv.stores.grown import Grown
from tokred.kv.stores.store import Query, Shelf, Store

Rows = tuple[Tensor, Tensor]
SHARES = ("query", "kv_group")
# Rows of room that held ones grow into.
_ROOM = 128
# Numbers of foretold logits at a time, where several tokens choose.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TokenButler(Store):
    """Nothing is forgotten; a network foretells, from what the first layer reads, what later layers will attend to.

    Layers whose input a network reads attend to all rows. Several tokens at once, such as a prompt, attend to all rows
    too unless ``several`` says otherwise.

    Args:
        keep: share of the tokens so far that a query attends to, or how many.
        sinks: first tokens, attended to besides.
        rf: by which factor the network's attention is narrower than the model; the nearest that fits its heads.
        size: channels of foretold queries and keys, even.
        hidden: channels inside of what makes them.
        producer_every: layers from one network to the next, at least 2; 0: there is one.
        share: "query", each query head chooses for itself; "kv_group", those of a key/value head together, by the mean
            of what they foretell.
        several: whether each of several tokens at once chooses too.

    Source: Akhauri et al., TokenButler, 2025 (arXiv 2503.07518).
    """

    name: ClassVar[str] = "tokenbutler"
    can: ClassVar[frozenset[str]] = frozenset({"crop", "attend"})
    # Queries and keys are what its network learns from.
    reads: ClassVar[frozenset[str]] = frozenset({"hidden", "module", "q"})
    searches: ClassVar[bool] = True

    keep: float | int = 0.5
    sinks: int = 4
    rf: float = 8
    size: int = 16
    hidden: int = 1024
    producer_every: int = 0
    share: str = "query"
    several: bool = False

    def __post_init__(self) -> None:
        if not is_count(self.keep, 1):
            check_share(self.keep, "keep, where it is no whole number of tokens,")
        check_count(self.sinks, "sinks")
        if check_number(self.rf, "rf") <= 0:
            raise ValueError(f"rf must be above 0, got {self.rf!r}")
        check_count(self.size, "size", 2)
        if self.size % 2:
            raise ValueError(f"size must be even, since channels turn in pairs, got {self.size}")
        check_count(self.hidden, "hidden", 1)
        check_count(self.producer_every, "producer_every")
        if self.producer_every == 1:
            raise ValueError(
                "producer_every must be at least 2, or 0 for one network: layers that have one choose no rows"
            )
        check_choice(self.share, "share", SHARES)
        check_flags(several=self.several)

    @property
    def full(self) -> bool:
        """True if every row is attended to, whatever the length."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def module(self, facts: Facts) -> nn.Module:
        """New networks, the same for the same sizes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Foresight(facts, every=self.producer_every, factor=self.rf, size=self.size, hidden=self.hidden)

    def fits(self, facts: Callable[[], Facts]) -> None:
        known = facts()
        if known.depth < 2:
            raise ValueError(
                f"tokenbutler foretells what later layers attend to, and {known.model} has {known.depth} whose rows it "
                "could choose from: take 'tokenselect'"
            )

    def open(self) -> ButlerShelf:
        return self.shelves(1)[0]

    def shelves(self, depth: int) -> list[ButlerShelf]:  # type: ignore[override]
        desk = Desk()
        return [ButlerShelf(self, desk, i) for i in range(depth)]

    def count(self, tokens: int) -> int:
        """Tokens that a query attends to, beside the first ones, of as many as there are with its own."""
        return min(tokens, self.keep) if isinstance(self.keep, int) else min(tokens, kept_ceil(tokens, self.keep))

    def counts(self, tokens: Tensor) -> Tensor:
        """:meth:`count` for each of ``tokens``, int64."""
        if isinstance(self.keep, int):
            return tokens.clamp(max=self.keep)
        known = torch.tensor([self.count(n) for n in range(int(tokens.max()) + 1)], device=tokens.device)
        return known[tokens]

    def chosen(self, foretold: Tensor, visible: Tensor, token: Tensor, heads: int) -> Tensor:
        """``[B, H or Hk, M, N]`` bool: the rows that each query attends to.

        Args:
            foretold: ``[B, H, M, N]`` float32.
            visible: ``[B or 1, M, N]`` bool: real, and not ahead of the query.
            token: ``[B or 1, N]`` int64, how many tokens stand before each.
            heads: key/value heads ``Hk``.
        """
        visible = visible[:, None]
        if self.share == "kv_group":
            weights = foretold.masked_fill(~visible, -torch.inf).softmax(-1)
            foretold = weights.view(len(weights), heads, -1, *weights.shape[2:]).mean(2).nan_to_num(0.0)
        b, h, m, n = foretold.shape
        counts = self.counts(visible.sum(-1)).expand(b, h, m)
        flat = visible.expand(b, h, m, n).flatten(1, 2)
        best = kept_mask(foretold.flatten(1, 2), flat, None, counts.flatten(1)).view(b, h, m, n)
        return best | (visible & (token < self.sinks)[:, None, None])


class Note(NamedTuple):
    """One layer's part of what was foretold in the forward that is running.

    Attributes:
        queries: ``[B, H, M, d]`` float32, with their gradients; None: nobody chooses.
        keys: ``[B, H, M, d]`` float32, with their gradients.
        learning: whether the network is in training, so that all rows are attended to.
        layers: that are foretold, by all networks.
    """

    queries: Tensor | None
    keys: Tensor
    learning: bool
    layers: int


class Desk:
    """A place where the shelves of one cache find what the network has foretold for them."""

    of_empty = True  # a file of a cache does not hold it

    def __init__(self) -> None:
        self.notes: dict[int, Note] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Desk:
        """An empty one: between two forwards nothing lies there."""
        memo[id(self)] = other = Desk()
        return other


class ButlerShelf(Shelf):
    """Rows of a layer as they came, and foretold keys beside them; or what a network needs to go on.

    Args:
        store: what it belongs to.
        desk: of the cache.
        layer: which.
    """

    def __init__(self, store: TokenButler, desk: Desk, layer: int) -> None:
        self.store = store
        self.desk = desk
        self.layer = layer
        self._rows: tuple[Grown, Grown] | None = None
        self._foretold: Grown | None = None  # [B, H, n, d] keys, in the model's type
        self._past: tuple[Grown, Grown] | None = None  # of the network that reads this layer

    @property
    def several(self) -> bool:  # type: ignore[override]
        """True where each of several tokens chooses."""
        return self.store.several

    sunk: ClassVar[bool] = True

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return None if self._rows is None else self._rows[0].rows

    @property
    def values(self) -> Tensor | None:
        return None if self._rows is None else self._rows[1].rows

    @property
    def newest(self) -> Rows:
        assert self._rows is not None  # asked for after an update
        return self._rows[0].rows, self._rows[1].rows

    @property
    def complete(self) -> bool:
        return self._foretold is None or self.store.full

    @property
    def width(self) -> int:
        return 0 if self._rows is None else self._rows[0].count

    @property
    def samples(self) -> int:
        return self.newest[0].shape[0]

    @property
    def moved(self) -> bool:
        return False

    def positions(self, seen: int) -> Tensor | None:
        return None

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        note = self.desk.notes.get(self.layer)
        if note is not None:
            if note.keys.shape[2] != keys.shape[2] or note.keys.shape[0] != keys.shape[0]:
                raise TokredError(_UNREAD)
            new = note.keys.detach().to(keys.dtype)
            self._foretold = Grown.of(new) if self._foretold is None else self._foretold.append(new, _ROOM)
        elif self._foretold is not None:
            raise TokredError(_UNREAD)
        # Where everything is attended to rows lie as the model's own would.
        room = 0 if self.store.full else _ROOM
        if self._rows is None:
            self._rows = Grown.of(keys.contiguous()), Grown.of(values.contiguous())
        else:
            self._rows = self._rows[0].append(keys, room), self._rows[1].append(values, room)

    def settle(self, site: CacheSite | None) -> None:
        note = self.desk.notes.pop(self.layer, None)
        if site is None:
            raise TokredError(_UNREAD)
        if note is not None and note.learning:
            self._compare(site, note)
        if note is None:
            self._foretell(site)

    def _foretell(self, site: CacheSite) -> None:
        """Leave for later layers what this one's network foretells, if it has one."""
        found, learning = site.learned.module, site.learned.training
        assert isinstance(found, Foresight)  # the host supplies what is read
        idle = self.store.full and not learning
        if not idle and any(self.layer in later for later in found.later.values()):
            raise TokredError(_UNREAD)
        for later in found.later.get(self.layer, ()):
            self.desk.notes.pop(later, None)  # of a forward that broke off
        if idle or self.layer not in found.later:
            return
        x, new = site.hidden, site.hidden.shape[1]
        past = None if self._past is None else (self._past[0].rows, self._past[1].rows)
        if (0 if past is None else past[0].shape[2]) + new != self.width:
            raise TokredError(_UNREAD)
        real = None if site.padding is None else site.padding.mask
        at = site.token[:, 0, -new:]
        ask = learning or (not self.store.full and (new == 1 or self.store.several))
        with torch.set_grad_enabled(learning), without_autocast(x):
            made = found.networks[str(self.layer)](x.detach(), at, past, real, ask=ask)
        held = [t.detach() for t in made.past]
        old = self._past
        pair = [Grown.of(t) if old is None else old[i].append(t, _ROOM) for i, t in enumerate(held)]
        self._past = pair[0], pair[1]
        for i, later in enumerate(found.later[self.layer]):
            queries = None if made.queries is None else made.queries[:, i]
            self.desk.notes[later] = Note(queries, made.keys[:, i], learning, found.count)

    def _compare(self, site: CacheSite, note: Note) -> None:
        """Leave as a loss how far foretold logits are from those of the model."""
        assert note.queries is not None  # a network in training is asked for both
        assert self._foretold is not None
        assert site.scale is not None  # since it was made
        before = self._foretold.first(self._foretold.count - note.keys.shape[2]).rows.float()
        real = None if site.padding is None else site.padding.mask
        with torch.enable_grad(), without_autocast(site.q):
            keys = torch.cat([before, note.keys], 2)
            asked = note.queries * self.store.size**-0.5
            apart = distance(asked, keys, site.q.float() * site.scale, site.k, real)
            site.learned.losses["distance"] = apart / note.layers

    def crop(self, count: int) -> None:
        if count == 0:
            return
        left = self.width - count
        cut = [None if g is None else g.first(left) for g in self._grown()]
        self._put(cut)

    def detach(self, count: int) -> Rows:
        raise NotImplementedError("rows of tokenbutler are not attended to in parts")

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        self._put([None if g is None else g.select(index) for g in self._grown()])

    def _grown(self) -> tuple[Grown | None, ...]:
        return (*(self._rows or (None, None)), *(self._past or (None, None)), self._foretold)

    def _put(self, held: list[Grown | None]) -> None:
        keys, values, first, second, self._foretold = held
        self._rows = None if keys is None or values is None else (keys, values)
        self._past = None if first is None or second is None else (first, second)

    # ------------------------------------------------------------------ queries

    def attend(self, query: Query) -> Tensor | None:
        note, store = self.desk.notes.get(self.layer), self.store
        if note is None or note.queries is None or note.learning or self._foretold is None:
            return None
        m, n = query.q.shape[2], self.width
        padding = query.padding(n)
        if padding is None and store.count(n - m + 1) == n - m + 1 and store.count(n) == n:
            return None
        if note.queries.shape[1] != query.q.shape[1]:
            raise TokredError(
                f"the network foretells {note.queries.shape[1]} heads, and layer {self.layer} has {query.q.shape[1]}: "
                "tokenbutler needs as many in all layers"
            )
        at = torch.arange(n, device=query.q.device)
        token = at[None] if padding is None else padding.long().cumsum(1) - padding.long()
        with without_autocast(query.q):
            step = max(1, _BLOCK // (query.q.shape[0] * query.q.shape[1] * n))
            parts = []
            for start in range(0, m, step):
                some = slice(start, min(start + step, m))
                visible = (at <= at[n - m + start : n - m + some.stop, None])[None]
                visible = visible if padding is None else visible & padding[:, None]
                foretold = note.queries[:, :, some] @ self._foretold.rows.float().mT * store.size**-0.5
                kept = store.chosen(foretold, visible, token, self.newest[0].shape[1])
                parts.append(_attended(query, query.q[:, :, some], *self.newest, kept))
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


_UNREAD = (
    "tokenbutler has not read all tokens of this cache: rows that come without a forward of the whole model, as in a "
    "blend or after one that broke off, have nothing foretold; begin an empty cache"
)


def _attended(query: Query, q: Tensor, keys: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """``[B, H, M, Dv]``: attention of some queries to the rows that each keeps.

    Args:
        query: what is asked.
        q: ``[B, H, M, D]`` of it.
        keys, values: ``[B, Hk, N, D]``.
        kept: ``[B, H or Hk, M, N]`` bool.
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    b, h, m, d = q.shape
    hk, n = keys.shape[1], keys.shape[2]
    scale = d**-0.5 if query.scale is None else query.scale
    choosers = kept.shape[1]
    if m == 1:
        most = int(kept.sum(-1).max())
        if most * choosers < n * hk:  # fewer rows are brought together than there are
            index, kept = rows_of(kept[:, :, 0], most)
            index = index.view(b, hk, -1, 1)
            keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
            keys, values = (x.view(b, choosers, most, -1) for x in (keys, values))
            kept = kept[:, :, None]
    held = keys.shape[1]
    grouped = q.to(kind).view(b, held, h // held, m, d) * scale
    logits = grouped @ keys.to(kind)[:, :, None].mT
    if query.softcap is not None:
        logits = torch.tanh(logits / query.softcap) * query.softcap
    hidden = ~kept.view(b, held, -1, m, kept.shape[3])
    logits = logits.masked_fill(hidden, -torch.inf)
    if query.sinks is not None:
        sinks = query.sinks.to(kind).view(1, held, h // held, 1, 1).expand(b, -1, -1, m, 1)
        logits = torch.cat([logits, sinks], -1)
    # A query of padding sees nothing at all.
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return (weights @ values.to(kind)[:, :, None]).flatten(1, 2).to(q.dtype)
