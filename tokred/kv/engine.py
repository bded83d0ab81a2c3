"""``Engine``: one cache on its way through prompt and generation, and what its policy does to it when.

Knows no host: a layer is anything that has keys, values and positions and can apply a reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import without_autocast
from tokred.kv.allocators import Grant
from tokred.kv.fitting import FITTED, FITTED_KEYS, REFERENCE
from tokred.kv.limit import Ledger, ledger_of
from tokred.kv.policy import CachePolicy
from tokred.kv.queue import queue_of
from tokred.kv.repeat import CONTEXT, REPEATED, Probe, Repeats
from tokred.kv.site import CacheSite, Made

_SCORE = "score"
T = TypeVar("T")


@dataclass
class Clock:
    """The time of one layer: how far it has come in prompt and generation.

    Attributes:
        prompt: slots of the prompt; -1 until a forward has begun.
        lengths: real tokens of each sample's prompt, once it is complete.
        base: tokens that shares are taken of, for each sample.
        measured: for each sample what the budget measured of the layers when it was last decided.
        behind: how many slots fewer this layer has seen than the first one, where a method of the language model's
            layers has removed tokens between the two.
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
        """A clock of the same time, that goes on by itself."""
        return replace(self)

    @property
    def uniform(self) -> bool:
        """True if all samples have the same numbers."""
        values: tuple[tuple[Any, ...], ...] = (self.lengths, self.base, self.measured)
        return all(len(set(v)) <= 1 for v in values)


class Layer(Protocol):
    """A cache layer, as far as an engine needs one."""

    slots: Tensor | None
    swaps: bool
    turned: int
    ragged: bool
    width: int
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

    def swap(self, gone: Tensor) -> None:
        """Free the rows ``gone`` ``[B, Hk, 1]``, whose places the newest take; asked for only while ``swaps``."""

    def turn(self, first: int) -> bool:
        """Free the oldest row of each head behind the ``first`` slots, while ``swaps``; False if nothing was done."""

    def sort(self) -> Tensor | None:
        """Put rows in the order of their slots; returns it, ``[B, Hk, K]``, or None where they stand so."""

    def rewrite(self, values: Tensor, weights: Tensor | None, keys: Tensor | None) -> None:
        """Give rows other values ``[B, Hk, K, Dv]``, weights ``[B, Hk, K]`` (None: one each), and keys (None: theirs);
        :meth:`apply` follows."""

    def settle(self, site: CacheSite | None) -> None:
        """Rows that came with this forward may take their lasting form."""


class _Pending(NamedTuple):
    """A layer that may be cut (again) before the forward ends.

    Attributes:
        layer: it.
        site: of the time when it was judged, without tensors, which would keep rows alive that have been cut since.
        granted: whether it has been cut once.
    """

    layer: Layer
    site: CacheSite
    granted: bool

    @property
    def now(self) -> CacheSite:
        """The site with the rows that the layer holds now."""
        layer = self.layer
        return self.site.at(*layer.shown(), layer.slots, layer.ragged, layer.weights)


class _Waiting(NamedTuple):
    layer: Layer
    site: CacheSite
    decide: bool


class Engine:
    """The policy of one cache, at work.

    Args:
        policy: what to do.
        depth: compressed layers.

    Attributes:
        prompt: slots of the prompt, where they are known before its last forward; None: the first forward's.
        steps: tokens that will be generated, where that is known.
        drafting: whether later forwards of several tokens are drafts to be verified, and no second turn.
        frames: whether every forward is a frame of a stream, and so a turn, also one of a single token.
        when: the policy's times, as this number of layers needs them.
        front: first rows whose keys are held a second time, since they move.
        ledger: of the bytes held, under a hard limit; else None.
        probe: reads the attention of forwards that repeat the context; None in all other forwards.
        queue: takes steps without a site, where it can; None: it never can.
        learning: whether the score's module was in training in the last forward.
        idle: whether every row is kept, so that nothing needs to be looked at.
    """

    def __init__(self, policy: CachePolicy, depth: int) -> None:
        self.policy = policy.at_work()
        self.parts, self.idle = policy.parts, policy.parts.budget.full
        self.depth, self.when = depth, self.parts.when.paced(depth)
        # Float32 numbers that stay with each row: accumulated scores, and weights and marks of merged rows.
        state = self.parts.score.numbers + 3 * (self.parts.fate.room > 0) + self.parts.fate.rewrites
        # Scores that wait for the end of the forward, of double precision at most.
        state += 2 * self.parts.budget.deferred * bool(self.when.chunk)
        self._swaps, self.queue = policy.swaps, queue_of(self.policy, depth)
        self._state_bytes = 4 * state if self.when.every or self.when.turns else 0
        self.ledger: Ledger | None = ledger_of(policy, self.when, depth)
        self.front = self.policy.front if self.policy.closes else 0
        self.prompt: int | None = None
        self.steps: int | None = None
        self.drafting = self.learning = self.frames = False
        self.probe: Probe | None = None
        self.streams: dict[int, tuple[Tensor, Tensor]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._pending: dict[int, _Pending] = {}
        self.allocator = self.parts.budget.start(depth)

    # ------------------------------------------------------------------ what a host asks

    def watches(self, clock: Clock, after: int) -> bool:
        """True if the policy has to see the forward that ends at ``after`` slots."""
        if self.idle or self.probe is not None:
            return not self.idle
        prompt = self._prompt(clock, after)
        return clock.prompt < 0 or not clock.lengths or not self.when.over(prompt, after)

    def wants_stream(self, clock: Clock, several: bool) -> bool:
        """True if the residual stream around this layer's attention is to be measured, in a forward of one token or
        ``several``."""
        later = bool(clock.lengths) and not ((several or self.frames) and self.when.turns)
        measured = self.probe is not None or self.idle or later
        return "stream" in self.parts.budget.reads and not measured

    def ends_prompt(self, clock: Clock, before: int, after: int) -> int | None:
        """Slots of a prompt that ends inside a forward, before drafts; None where none does."""
        prompt = self._prompt(clock, after)
        return prompt if before < prompt < after and not self.idle and self.probe is None else None

    def read(self, clock: Clock, before: int, after: int) -> int:
        """Slots of the prompt, or of all turns so far, if a forward from ``before`` to ``after`` slots ends it; else 0.

        Drafts are no part of it.
        """
        prompt = None if self.prompt is None else self.prompt - clock.behind
        if prompt is not None and before < prompt:
            return prompt if after >= prompt else 0
        return after if (before == 0 or after - before > 1 or self.frames) and not self.drafting else 0

    def observe(self, layer: Layer, site: CacheSite, before: int) -> None:
        """Act on a layer after its attention, in a forward that began at ``before`` slots: note, score, evict."""
        if self.probe is not None:
            with without_autocast(site.q):
                self.probe.see(site)
            layer.settle(site)
            return
        clock, after, when = layer.clock, site.seen, self.when
        self.learning = site.learned.training
        if clock.prompt < 0:
            clock.prompt = self._prompt(clock, after)
        several = (after - before > 1 or self.frames) and not self.drafting
        if not clock.lengths and after >= clock.prompt:
            clock.lengths = site.lengths
        if before < clock.prompt or (when.turns and several):
            clock.base = site.lengths
        site.prompt = clock.lengths or site.lengths
        site.base = clock.base
        site.generated = max(0, after - clock.prompt)
        site.steps = self.steps
        self._claim(site)
        due = when.due(clock.prompt, before, after, self.frames) and not (self.drafting and before >= clock.prompt)
        with without_autocast(site.q):
            self.parts.score.observe(site)
            if due:
                self._evict(layer, site, before < clock.prompt or (when.turns and several))
            layer.settle(site)  # which may read what the policy has left for it
            self._remember(layer, site)
        self._write(layer, site)

    def admit(self, layer: Layer, k: Tensor, v: Tensor) -> None:
        """Refuse rows that a hard limit has no room for, before they are added to a layer.

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
        fresh = site.place.row_bytes - self.parts.store.row_bytes(k, v) + self.parts.store.fresh_bytes(k, v)
        new = k.shape[2] * site.place.heads * fresh
        self.ledger.write(layer.index, -(-layer.nbytes // k.shape[0]) + new)

    def _claim(self, site: CacheSite) -> None:
        """Tell the site what rows cost, and what budgets in bytes have to leave room for."""
        site.price(self.parts.store, uneven=self.parts.budget.headwise)
        site.whole += ((self.front, site.key_bytes),) if self.front else ()
        site.state_bytes = self._state_bytes
        if self.ledger is not None:
            self.ledger.claim(site)

    def begin(self) -> None:
        """Begin a forward: forget layers that have been waiting since one that broke off."""
        self._pending, self._waiting = {}, {}
        self.allocator.begin()

    # ------------------------------------------------------------------ scores that are known after more forwards

    @property
    def repeats(self) -> Repeats | None:
        """The way in which the context is to be fed again; None: it need not be."""
        score = self.parts.score
        return None if self.idle else score.lessons if self.learning else score.repeats

    def records(self, clock: Clock, after: int) -> bool:
        """True if the tokens of a forward that ended at ``after`` slots will have to be repeated."""
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
            if i in probe.queries:
                layer.notes.update(zip(REFERENCE, probe.reference(i), strict=True))
            site.rows, site.notes = layer.rows, layer.notes
            self._shrink(layer, site, decide)
            if self.when.over(layer.clock.prompt, site.seen):
                self._remember(layer, site)  # forgets: queries are not known any more, and have been kept before

    # ------------------------------------------------------------------ the end of a forward

    def finish(self) -> None:
        """End a forward: decide what could not be decided layer by layer."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        scores = {i: p.layer.rows.pop(_SCORE) for i, p in pending.items()}
        # Rows that were cut already have scores of their own length, and grants that stand.
        open_ones = [i for i in sorted(pending) if not pending[i].granted]
        if open_ones:
            judged = {i: self.policy.judged(pending[i].now, scores[i]) for i in open_ones}
            grants = self.allocator.after_forward(tuple(judged.values()), self.streams)
            self.streams = {}
            for i in open_ones:
                if i in grants:
                    self._apply(pending[i].layer, judged[i].site, scores[i], grants[i])
                    self._write(pending[i].layer, judged[i].site)
        self.allocator.begin()

    def reset(self) -> None:
        """Forget the cache's past."""
        self.prompt = self.steps = None
        self.drafting = self.learning = self.frames = False
        self.streams, self._pending, self._waiting = {}, {}, {}
        self.allocator.begin()

    def state(self) -> dict[str, Any]:
        """Values of the cache as a whole that a snapshot keeps."""
        kept = {name: getattr(self, name) for name in ("prompt", "steps", "drafting", "frames")}
        return {**kept, "streams": dict(self.streams)}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to values that :meth:`state` gave."""
        self.reset()
        self.__dict__.update({**state, "streams": dict(state["streams"])})

    # ------------------------------------------------------------------ inside

    def _prompt(self, clock: Clock, after: int) -> int:
        if clock.prompt >= 0:
            return clock.prompt
        return after if self.prompt is None else self.prompt - clock.behind

    def _evict(self, layer: Layer, site: CacheSite, decide: bool) -> None:
        """Score and shrink, now or when the context has been repeated; ``decide``: the budget is decided anew, and not
        only kept to."""
        if self.repeats is None:
            self._shrink(layer, site, decide)
            return
        if decide:
            self.allocator.measure(site)
        self._waiting[site.layer] = _Waiting(layer, site.without_queries(), decide)

    def _shrink(self, layer: Layer, site: CacheSite, decide: bool) -> None:
        """Score a layer, and cut those that the allocator grants rows."""
        score = self.parts.score(site)
        grants = self.allocator.after_layer(self.policy.judged(site, score, () if decide else layer.clock.measured))
        own = grants.get(site.layer)
        if own is None or not own.final:
            # Scores travel with the rows, so that the layer can be cut (again) when more is known.
            layer.rows[_SCORE] = score
            self._pending[site.layer] = _Pending(layer, site.without_tensors(), own is not None)
        for i, grant in grants.items():
            if i == site.layer:
                self._apply(layer, site, score, grant)
            else:
                other = self._pending[i]
                self._apply(other.layer, other.now, other.layer.rows[_SCORE], grant)

    def _apply(self, layer: Layer, site: CacheSite, score: Tensor, grant: Grant) -> None:
        if grant.measured:
            layer.clock.measured = grant.measured
        if self._swaps and layer.swaps:
            gone = self.policy.worst(site, score, grant.rows)
            if gone is not None:
                layer.swap(gone)
                return
        order = layer.sort() if self._swaps else None
        if order is not None:  # of equal rows the older stays, which a choice of several takes to stand first
            score, site = score.gather(2, order), site.at(*layer.shown(), layer.slots, layer.ragged, layer.weights)
        with without_autocast(score):
            step = self.policy.shrink(site, score, grant.rows, grant.counts)
        values, weights, keys = (layer.notes.pop(name, None) for name in (*FITTED, FITTED_KEYS))
        if not step.trivial:
            if values is not None:
                layer.rewrite(values, weights, keys)
            layer.apply(step, self.parts.fate.merge_score)

    def _write(self, layer: Layer, site: CacheSite) -> None:
        """Note the bytes that a layer holds, under a hard limit."""
        if self.ledger is not None:
            self.ledger.write(layer.index, -(-layer.nbytes // site.shape[0]))

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
