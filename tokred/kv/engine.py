"""``Session``: one cache on its way through prompt and generation, and what its policy does to it when.

Knows no host: a layer is anything that has keys, values and positions and can apply a reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.errors import TokredError
from tokred.kernels.dispatch import without_autocast
from tokred.kv.limit import Ledger, ledger_of
from tokred.kv.policy import CachePolicy
from tokred.kv.repeat import CONTEXT, Probe, Repeats
from tokred.kv.scores.reconstruction import REPEATED
from tokred.kv.site import CacheSite, Made

_SCORE = "score"
T = TypeVar("T")


@dataclass
class Clock:
    """Where one layer stands.

    Attributes:
        prompt: slots of the prompt; -1 until a forward has begun.
        lengths: real tokens of each sample's prompt, once it is complete.
        base: tokens that shares are taken of, for each sample.
        measured: for each sample what the budget measured of the layers when it was last decided.
        behind: slots that the first layer has seen and this one has not, since tokens left in between.
    """

    prompt: int = -1
    lengths: tuple[int, ...] = ()
    base: tuple[int, ...] = ()
    measured: tuple[tuple[float, ...], ...] = ()
    behind: int = 0

    def select(self, index: list[int]) -> Clock:
        """The clock of other samples: ``index`` of the old ones, or as many copies."""

        def pick(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(values[i] for i in index) if values else ()

        return Clock(self.prompt, pick(self.lengths), pick(self.base), pick(self.measured), self.behind)

    def copy(self) -> Clock:
        """One that is set apart from this."""
        return replace(self)

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same numbers."""
        values: tuple[tuple[Any, ...], ...] = (self.lengths, self.base, self.measured)
        return all(len(set(v)) <= 1 for v in values)


class Layer(Protocol):
    """What a session needs of a cache layer."""

    positions: Tensor | None
    ragged: bool
    weights: Tensor | None
    rows: dict[str, Tensor]
    notes: dict[str, Any]
    clock: Clock
    index: int
    nbytes: int

    def shown(self) -> tuple[Tensor | Made, Tensor | Made]:
        """Keys and values ``[B, Hk, K, D]`` as a site takes them."""

    def apply(self, step: Reduction, merge_score: str) -> None:
        """Replace the rows by what ``step`` makes of them."""


class _Pending(NamedTuple):
    layer: Layer
    site: CacheSite


class _Waiting(NamedTuple):
    layer: Layer
    site: CacheSite
    decide: bool


class Session:
    """The policy of one cache.

    Args:
        policy: what to do.
        depth: compressed layers.

    Attributes:
        prompt: slots of the prompt, where they are known before its last forward; None: the first forward's.
        steps: tokens that will be generated, where that is known.
        drafting: whether later forwards of several tokens are drafts to be verified, and no second turn.
        when: the policy's times, as this number of layers needs them.
        ledger: of the bytes held, under a hard limit; else None.
        probe: reads the attention of forwards that repeat the context; None in all other forwards.
    """

    def __init__(self, policy: CachePolicy, depth: int) -> None:
        self.policy = policy
        self.parts = policy.parts
        self.depth = depth
        self.when = self.parts.when.paced(depth)
        # Float32 numbers that stay with each row: accumulated scores, and weights and marks of merged rows.
        state = self.parts.score.numbers + 3 * (self.parts.fate.room > 0)
        if self.when.chunk:
            # Scores that wait for the end of the forward, of double precision at most.
            state += 2 * (self.parts.budget.spread != "layer")
        self._state_bytes = 4 * state if self.when.every or self.when.turns else 0
        self.ledger: Ledger | None = ledger_of(policy, self.when, depth)
        self.prompt: int | None = None
        self.steps: int | None = None
        self.drafting = False
        self.probe: Probe | None = None
        self.streams: dict[int, tuple[Tensor, Tensor]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._pending: dict[int, _Pending] = {}
        self._preferences: dict[int, list[float]] = {}

    # ------------------------------------------------------------------ what a host asks

    @property
    def idle(self) -> bool:
        """Whether everything is kept, so that nothing needs to be looked at."""
        return self.parts.budget.full

    def watches(self, clock: Clock, after: int) -> bool:
        """Whether the policy has to see the forward that ends at ``after`` slots."""
        if self.idle:
            return False
        if self.probe is not None:
            return True
        prompt = self._prompt(clock, after)
        return clock.prompt < 0 or not clock.lengths or not self.when.over(prompt, after)

    def wants_stream(self, clock: Clock, several: bool) -> bool:
        """Whether the residual stream around this layer's attention, of one token or ``several``, is to be measured."""
        later = bool(clock.lengths) and not (several and self.when.turns)
        measured = self.probe is not None or self.idle or later
        return "stream" in self.parts.budget.reads and not measured

    def ends_prompt(self, clock: Clock, before: int, after: int) -> int | None:
        """Slots of a prompt that ends inside a forward, before drafts; None where none does."""
        prompt = self._prompt(clock, after)
        return prompt if before < prompt < after and not self.idle and self.probe is None else None

    def observe(self, layer: Layer, site: CacheSite, before: int) -> None:
        """Everything that happens to a layer after its attention, in a forward that began at ``before`` slots."""
        if self.probe is not None:
            with without_autocast(site.q):
                self.probe.see(site)
            return
        clock, after, when = layer.clock, site.seen, self.when
        if clock.prompt < 0:
            clock.prompt = self._prompt(clock, after)
        several = after - before > 1 and not self.drafting
        if not clock.lengths and after >= clock.prompt:
            clock.lengths = site.lengths
        if before < clock.prompt or (when.turns and several):
            clock.base = site.lengths
        site.prompt = clock.lengths or site.lengths
        site.base = clock.base
        site.generated = max(0, after - clock.prompt)
        site.steps = self.steps
        self._claim(site)
        due = when.due(clock.prompt, before, after) and not (self.drafting and before >= clock.prompt)
        with without_autocast(site.q):
            self.parts.score.observe(site)
            if due:
                self._evict(layer, site, before < clock.prompt or (when.turns and several))
            self._remember(layer, site)
        if self.ledger is not None:
            self.ledger.write(layer.index, -(-layer.nbytes // site.shape[0]))

    def admit(self, layer: Layer, k: Tensor, v: Tensor) -> None:
        """Before rows are added to a layer: refuse what a hard limit has no room for.

        Args:
            layer: that they will be added to.
            k, v: ``[B, Hk, M, D]``.

        Raises:
            ValueError: nothing has been read yet, and the limit cannot hold a chunk and what is never evicted.
            TokredError: the limit would be passed.
        """
        if self.ledger is None:
            return
        site = CacheSite(k=k, v=v, depth=self.depth)
        self._claim(site)
        if layer.clock.prompt < 0:
            self.ledger.check(site.place)
        new = k.shape[2] * site.place.heads * site.place.row_bytes
        self.ledger.write(layer.index, -(-layer.nbytes // k.shape[0]) + new)

    def _claim(self, site: CacheSite) -> None:
        """Tell the site what budgets in bytes have to leave room for."""
        site.state_bytes = self._state_bytes
        if self.ledger is not None:
            self.ledger.claim(site)

    def begin(self) -> None:
        """The begin of a forward: nothing is left of one that broke off."""
        self._pending, self._preferences, self._waiting = {}, {}, {}

    # ------------------------------------------------------------------ scores that are known after more forwards

    @property
    def repeats(self) -> Repeats | None:
        """How the context is to be fed again; None: it need not be."""
        return None if self.idle else self.parts.score.repeats

    def records(self, clock: Clock, after: int) -> bool:
        """Whether the tokens of a forward that ended at ``after`` slots will have to be repeated."""
        return bool(self._waiting) or not self.parts.when.over(self._prompt(clock, after), after)

    @property
    def waiting(self) -> CacheSite | None:
        """One layer that waits for its score, as it was after its attention; None where none does."""
        return next((w.site for w in self._waiting.values()), None)

    def judged(self, probe: Probe) -> None:
        """The context has been repeated: score the layers that wait, and evict."""
        waiting, self._waiting = self._waiting, {}
        for i, (layer, site, decide) in sorted(waiting.items()):
            layer.rows[REPEATED] = probe.scores(i, site, layer.rows.get(REPEATED))
            site.rows, site.notes = layer.rows, layer.notes
            self._shrink(layer, site, decide)
            if self.when.over(layer.clock.prompt, site.seen):
                self._remember(layer, site)  # forgets: queries are not known any more, and have been kept before

    # ------------------------------------------------------------------ the end of a forward

    def finish(self) -> None:
        """The end of a forward: decide what could not be decided layer by layer."""
        pending, self._pending = self._pending, {}
        if self.parts.budget.spread == "together":
            self._together(pending)
            return
        if self.parts.budget.spread != "forward":
            if pending:
                self._preferences = {}
                for p in pending.values():
                    p.layer.rows.pop(_SCORE, None)
            return
        if not pending:
            return
        if len(self.streams) != self.depth:
            raise TokredError(f"{len(self.streams)} of {self.depth} layers measured their residual stream")
        # One budget for the batch, from the mean over samples.
        cosines = [float((s / n).mean()) for _, (s, n) in sorted(self.streams.items())]
        self.streams = {}
        for layer, site in pending.values():
            layer.clock.measured = (tuple(cosines),) * site.shape[0]
            now = site.at(*layer.shown(), layer.positions, layer.ragged, layer.weights)
            rows = self.parts.budget.divided(now, layer.clock.measured)
            self._apply(layer, now, layer.rows.pop(_SCORE), rows)
            if self.ledger is not None:
                self.ledger.write(layer.index, -(-layer.nbytes // site.shape[0]))

    def reset(self) -> None:
        """Forget the cache's past."""
        self.prompt = self.steps = None
        self.drafting = False
        self.streams, self._pending, self._preferences, self._waiting = {}, {}, {}, {}

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps."""
        return {"prompt": self.prompt, "steps": self.steps, "drafting": self.drafting, "streams": dict(self.streams)}

    def load(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`state` gave."""
        self.reset()
        self.__dict__.update({**state, "streams": dict(state["streams"])})

    # ------------------------------------------------------------------ inside

    def _prompt(self, clock: Clock, after: int) -> int:
        if clock.prompt >= 0:
            return clock.prompt
        return after if self.prompt is None else self.prompt - clock.behind

    def _evict(self, layer: Layer, site: CacheSite, decide: bool) -> None:
        """Score and shrink, now or when the context has been repeated.

        Args:
            layer, site: which.
            decide: the budget is decided anew, and not only kept to.
        """
        if self.parts.score.repeats is None:
            self._shrink(layer, site, decide)
            return
        if decide and self.parts.budget.spread == "cascade":
            budget: Any = self.parts.budget
            self._preferences[site.layer] = budget.preference(site)
        self._waiting[site.layer] = _Waiting(layer, site.without_queries(), decide)

    def _shrink(self, layer: Layer, site: CacheSite, decide: bool) -> None:
        budget: Any = self.parts.budget
        score = self.parts.score(site)
        if budget.spread == "layer":
            self._apply(layer, site, score, budget.rows(site))
            return
        if budget.spread == "together":
            layer.rows[_SCORE] = score
            self._pending[site.layer] = _Pending(layer, site.without_queries())
            return
        if not decide and layer.clock.measured:
            self._apply(layer, site, score, budget.divided(site, layer.clock.measured))
            return
        layer.rows[_SCORE] = score
        self._pending[site.layer] = _Pending(layer, site)
        if budget.spread == "cascade":
            if site.layer not in self._preferences:
                self._preferences[site.layer] = budget.preference(site)
            self._cascade(site)

    def _cascade(self, site: CacheSite) -> None:
        known = sorted(i for i in self._preferences if i <= site.layer)
        measured = tuple(zip(*(self._preferences[i] for i in known), strict=True))
        for i in known:
            layer, old = self._pending[i]
            layer.clock.measured = measured
            now = old if i == site.layer else old.at(*layer.shown(), layer.positions, layer.ragged, layer.weights)
            self._apply(layer, now, layer.rows[_SCORE], self.parts.budget.divided(now, measured))

    def _together(self, pending: dict[int, _Pending]) -> None:
        if not pending:
            return
        budget: Any = self.parts.budget
        order = [pending[i] for i in sorted(pending)]
        scores = [p.layer.rows.pop(_SCORE) for p in order]
        rows = [tuple(budget.mean(n, p.site.place, self.depth) for n in budget.length(p.site)) for p in order]
        rows = [self.policy.at_least(p.site, r) for p, r in zip(order, rows, strict=True)]
        guards = [self.policy.guarded(p.site, r) for p, r in zip(order, rows, strict=True)]
        counts = budget.together([p.site for p in order], scores, guards)
        if counts is None:
            return
        for p, score, each, count in zip(order, scores, rows, counts, strict=True):
            with without_autocast(score):
                step = self.policy.shrink(p.site, score, each, count)
            if not step.trivial:
                p.layer.apply(step, self.parts.fate.merge_score)

    def _apply(self, layer: Layer, site: CacheSite, score: Tensor, rows: tuple[int, ...]) -> None:
        with without_autocast(score):
            step = self.policy.shrink(site, score, rows)
        if not step.trivial:
            layer.apply(step, self.parts.fate.merge_score)

    def _remember(self, layer: Layer, site: CacheSite) -> None:
        """Keep the newest queries while a later eviction may ask for them."""
        window, when = max(self.parts.score.window, self.parts.budget.queries), self.when
        if when.over(layer.clock.prompt, site.seen):
            for name in [n for n in layer.notes if n != CONTEXT]:
                layer.notes.pop(name)
            for name in [n for n in layer.rows if n != _SCORE]:
                layer.rows.pop(name)
        elif (window > 1 or (window and site.loose)) and (when.every or when.turns or site.seen < layer.clock.prompt):
            # One query is that of the newest token, unless its slot is padding.
            layer.notes["queries"] = site.queries(window).detach().clone(memory_format=torch.contiguous_format)
