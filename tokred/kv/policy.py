"""``CachePolicy``: a method of the stage ``cache``, made of a score, a budget, a fate and a time."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_share
from tokred.core.learned import Facts
from tokred.core.method import Method, Parameters
from tokred.core.reduction import Reduction
from tokred.core.schedules import kept
from tokred.core.site import Site, Stage
from tokred.kv.allocators import Judged, Measured
from tokred.kv.budgets import Uniform
from tokred.kv.fates import Evict
from tokred.kv.parts import Budget, Fate, Score, When, as_part, check_amount, check_count
from tokred.kv.select import Counts, lowest
from tokred.kv.site import CacheSite
from tokred.kv.stores import Flat, Store
from tokred.kv.stores.store import missing

# What a budget is made of: a budget of tokred.kv, a share, tokens, or bytes.
BudgetLike = Budget | float | int | str | None

# Where a policy at work has its parts, which are no field of it.
REMEMBERED = "_parts"


class Parts(NamedTuple):
    """The independent choices of a policy.

    Attributes:
        score, budget, fate, when: see :mod:`tokred.kv.parts`.
        store: see :mod:`tokred.kv.stores`.
        sinks: first tokens of each sample, never evicted.
        recent: newest tokens, never evicted; a float is a share of the rows that are kept.
    """

    score: Score
    budget: Budget
    fate: Fate = Evict()
    when: When = When()
    sinks: int = 0
    recent: int | float = 0
    store: Store = Flat()


@dataclass(frozen=True)
class CachePolicy(Method):
    """Base of all cache policies. A subclass is a frozen dataclass that answers :attr:`parts`."""

    stage: ClassVar[Stage] = "cache"
    drops: ClassVar[bool] = True
    example: ClassVar[Parameters] = {"budget": 9}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """The choices that this policy is made of."""

    def at_work(self) -> CachePolicy:
        """An equal policy that remembers its parts, for engines, which ask for them at every token of every layer."""
        made = copy.copy(self)
        made.__dict__[REMEMBERED] = self.parts
        return made

    @property
    def reads(self) -> frozenset[str]:
        """Score, budget and store say what they take from the host."""
        parts = self.parts
        return parts.score.needs | parts.budget.reads | parts.store.reads

    def module(self, facts: Facts) -> nn.Module | None:
        """The module of the score, or of the store, where one has weights."""
        parts = self.parts
        made = parts.score.module(facts)
        return parts.store.module(facts) if made is None else made

    def fits(self, facts: Callable[[], Facts]) -> None:
        """Refuse a model that what score or budget know is not of, or that the store cannot serve.

        Args:
            facts: asks the model; only where something is known.

        Raises:
            ValueError: naming both.
        """
        parts = self.parts
        parts.score.fits(facts)
        parts.budget.fits(facts, parts.score)
        parts.store.fits(facts)

    def hint(self, lacking: frozenset[str]) -> str:
        """The end of a refusal: what to do where a host does not supply ``lacking`` of :attr:`reads`."""
        if "again" in lacking:
            return (
                ": tokens whose rows have left are computed again where every layer keeps rows of all tokens, and the "
                "place of a token is one number"
            )
        return self.parts.store.hint(lacking)

    def check(self, depth: int) -> None:
        """Refuse a budget that does not fit the number of compressed layers, and a store that cannot do all it must.

        Raises:
            ValueError: with what does not fit, or what is needed and who needs it.
        """
        parts = self.parts
        parts.budget.check(depth)
        why = missing(parts.store, self.needs) or parts.store.objection(parts)
        if why:
            raise ValueError(f"{self.name or 'the policy'} cannot hold rows in the store {parts.store.name!r}: {why}")
        if parts.score.returns is not None and not (type(parts.budget) is Uniform and type(parts.fate) is Evict):
            raise ValueError(
                "tokens that have left come back to all layers and heads at once, which have to hold the same ones: "
                f"take Uniform and Evict, not {parts.budget!r} and {parts.fate!r}"
            )

    def check_places(self, count: int, depth: int) -> None:
        """Refuse to act on ``count`` of ``depth`` layers alone, where a network is of all.

        Raises:
            ValueError: with both numbers.
        """
        if "module" in self.reads and count < depth:
            raise ValueError(
                f"{self.name!r} has a network for all {depth} layers, and where= leaves {count} of them: apply it "
                "without where="
            )

    @property
    def needs(self) -> dict[str, str]:
        """Abilities that a store has to have, see :data:`tokred.kv.stores.ABILITIES`, each with who needs it."""
        parts, needs = self.parts, {}
        if not parts.budget.full:
            needs["take"] = "eviction"
        if parts.fate.merges:
            needs["merge"] = f"the fate {parts.fate.name!r}"
        if parts.fate.rewrites:
            needs["rewrite"] = f"the fate {parts.fate.name!r}"
        if parts.score.returns is not None:
            needs["return"] = "the score"
        if parts.budget.levels and not parts.budget.full:
            needs["levels"] = f"the budget {parts.budget.name!r}"
        if parts.budget.headwise and not parts.budget.full:
            needs["ragged"] = f"the budget {parts.budget.name!r}"
            if parts.when.chunk:
                needs["tight"] = f"the budget {parts.budget.name!r} under a hard limit"
        return needs

    @property
    def closes(self) -> bool:
        """True if the first rows move up behind those that have left: a field ``positions`` is ``"cache"``."""
        return getattr(self, "positions", "text") == "cache"

    @property
    def front(self) -> int:
        """First rows of each head that neither policy nor store ever lets go."""
        return max(self.parts.sinks, int(getattr(self.parts.store, "sinks", 0)))

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """Rows that ``layer`` holds after a prompt of ``n`` tokens; budgets in bytes or by content: at most ``n``."""
        parts = self.parts
        if parts.budget.full or not parts.when.prefill or isinstance(parts.budget.amount, str):
            return n
        rows = parts.budget.share(n, None, layer, depth)
        return min(n, max(rows, sum(self.guards(n, rows)) + parts.fate.room, 1))

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Unless the budget holds everything."""
        return not self.parts.budget.full

    def guards(self, n: int, rows: int) -> tuple[int, int]:
        """First and newest tokens that are never evicted, of a sample of ``n`` tokens that keeps ``rows``."""
        parts = self.parts
        recent = parts.recent if isinstance(parts.recent, int) else kept(rows, parts.recent)
        return parts.sinks, max(recent, parts.score.recent)

    # ------------------------------------------------------------------ one layer

    def reduce(self, site: Site) -> Reduction:
        """Decide for one layer alone, as at the end of a prompt whose only forward this is."""
        assert isinstance(site, CacheSite)  # the stage's only kind of site
        site.price(self.parts.store, uneven=self.parts.budget.headwise)
        parts = self.parts
        parts.score.observe(site)
        score = parts.score(site)
        if parts.budget.deferred:  # what other layers would get is not known
            return self.shrink(site, score, parts.budget.rows(site))
        grant = parts.budget.start(site.depth).after_layer(self.judged(site, score))[site.layer]
        return self.shrink(site, score, grant.rows, grant.counts)

    def judged(self, site: CacheSite, score: Tensor, measured: Measured = ()) -> Judged:
        """A layer with its scores, for an allocator."""
        return Judged(site, score, lambda rows: self.guarded(site, self.at_least(site, rows)), measured)

    def scores(self, site: CacheSite) -> Tensor:
        """``[B, Hk, K]`` float32: the scores with guarded rows above all others, and -inf where nothing is.

        For looking at; :meth:`reduce` decides.
        """
        parts = self.parts
        site.price(parts.store, uneven=parts.budget.headwise)
        parts.score.observe(site)
        rows = self.at_least(site, parts.budget.rows(site))
        score, guard = parts.score(site), self.guarded(site, rows)
        score = parts.score.refine(site, score, guard, rows)
        real = site.real
        if real is not None:
            score = score.masked_fill(~real, -torch.inf)
        guard = guard.expand_as(score)
        top = score.masked_fill(guard | (score == torch.inf), -torch.inf).amax((1, 2), keepdim=True) + 1
        return torch.where(guard & (score > -torch.inf), top.to(score.dtype), score)

    def at_least(self, site: CacheSite, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Never fewer rows than are guarded (and what a merge needs besides), never more than there are."""
        found, room = [], self.parts.fate.room
        for n, r in zip(site.lengths, rows, strict=True):
            found.append(min(n, max(r, sum(self.guards(n, r)) + room, 1)))
        return tuple(found)

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        """``[B or 1, Hk or 1, K]`` bool: first and newest tokens."""
        both = [self.guards(n, r) for n, r in zip(site.lengths, rows, strict=True)]
        first, newest = tuple(one[0] for one in both), tuple(one[1] for one in both)
        behind = site.stands_behind(newest)
        return behind if not any(first) else (site.token < site.column(first)) | behind

    @property
    def swaps(self) -> bool:
        """True if a row that comes may take the place of the one that goes, so that none has to be moved.

        A limit in bytes has no room for the place that waits in between.
        """
        parts = self.parts
        score = parts.score
        free = not score.ordered and type(parts.fate) is Evict and score.repeats is None and score.returns is None
        even = not (parts.budget.headwise or parts.budget.deferred or parts.budget.queries)
        return free and even and not isinstance(parts.budget.amount, str) and not parts.when.chunk

    def worst(self, site: CacheSite, score: Tensor, rows: tuple[int, ...]) -> Tensor | None:
        """``[B, Hk, 1]`` int64: the row of each head that goes, of equal ones the newest; None: it is not just one.

        Arguments as for :meth:`shrink`, which keeps all others.
        """
        left = site.extent[2] - 1
        if site.real is not None or left == 0 or site.shape[0] == 0:
            return None
        rows = self.at_least(site, rows)
        if any(r != left for r in rows):
            return None
        return lowest(score, self.guarded(site, rows), site.slots)

    def shrink(self, site: CacheSite, score: Tensor, rows: tuple[int, ...], counts: Counts | None = None) -> Reduction:
        """The reduction to ``rows`` per head on average, given the scores; ``counts``: rows of each head, if known."""
        parts = self.parts
        rows = self.at_least(site, rows)
        guard = self.guarded(site, rows)
        counts = parts.budget.heads(site, score, guard, rows) if counts is None else counts
        if isinstance(counts, tuple) and all(c >= h for c, h in zip(counts, site.held, strict=True)):
            return Reduction.identity((site.shape[0], site.heads), site.shape[1], site.device)
        score = parts.score.refine(site, score, guard, counts)
        return parts.fate.reduce(site, score, guard, counts)


def as_budget(value: BudgetLike, default: float = 0.5) -> Budget:
    """A budget as users write it: an object, its name, a share, tokens or bytes.

    Raises:
        TypeError, ValueError: it is no budget; the message says what was given and what is allowed.
    """
    if value is None:
        return Uniform(default)
    if isinstance(value, Budget | dict) or (isinstance(value, str) and value.isidentifier()):
        return as_part(value, Budget, "budget")
    return Uniform(check_amount(value))


def check_room(policy: CachePolicy) -> None:
    """Refuse a budget in tokens that cannot hold what is never evicted, and windows that are none.

    Raises:
        ValueError: with the numbers.
    """
    parts = policy.parts
    check_count(parts.sinks, "sinks")
    if isinstance(parts.recent, float):
        check_share(parts.recent, "the recent window, as a share,", zero=True)
    else:
        check_count(parts.recent, "the recent window")
    tokens = parts.budget.tokens
    if tokens is None:
        return
    sinks, recent = policy.guards(tokens + 1, tokens)
    room = parts.fate.room
    if tokens < sinks + recent + room:
        more = f" and the {room} that others are merged into" if room else ""
        raise ValueError(
            f"a budget of {tokens} tokens cannot hold the {sinks} first and {recent} newest tokens that "
            f"{policy.name or 'this policy'} never evicts{more}"
        )


def check_positions(positions: str) -> None:
    """Refuse positions that there are none of.

    Raises:
        ValueError: with what was given and what is allowed.
    """
    check_choice(positions, "positions", ("cache", "text"))
