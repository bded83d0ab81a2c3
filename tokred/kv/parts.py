"""The independent choices of a cache policy: score, budget, fate, when; and store, in :mod:`tokred.kv.stores`.

Each is a frozen dataclass. A part is written down as ``{"part": name, ...}`` and read back from that, so that policies
made of parts can be stored like every other method.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from tokred.core.checks import check_count as check_count
from tokred.core.learned import Facts, Learned
from tokred.core.reduction import Reduction
from tokred.core.registry import parts
from tokred.core.schedules import kept
from tokred.core.settings import call
from tokred.kv.allocators import Allocator, AtOnce
from tokred.kv.repeat import Repeats
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite, Place

P = TypeVar("P", bound="Part")
Pair = tuple[Tensor, Tensor]
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


class Part(ABC):  # noqa: B024 - its kinds have abstract methods
    """Base of all choices. A subclass with a ``name`` can be given by it, see :data:`tokred.core.registry.parts`."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "part"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            parts.add(cls.name, cls)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Part.__repr__  # type: ignore[method-assign]  # which dataclass then leaves alone

    def __repr__(self) -> str:
        """The call that makes it, with what differs from the defaults."""
        return call(self, short=False)

    def to_dict(self) -> dict[str, Any]:
        """The part as plain values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        plain = {k: v.to_dict() if isinstance(v, Part) else v for k, v in values.items()}
        return {"part": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}


class Score(Part):
    """The importance of each row of a cache.

    Attributes:
        reads: what it takes from the site beyond keys and values, see :data:`tokred.core.site.READS`.
        accumulates: whether :meth:`observe` has to see every forward since the cache was empty.
        numbers: float32 numbers that it keeps for every row.
        ordered: whether it takes rows to stand in the order of their slots: neighbours, or a window of queries and the
            rows that are their own. Where it does not, steps that evict one row for each that comes move none.
        oldest: whether the oldest row goes, whatever it holds.
        why_no_chunks: why it cannot judge a chunk of a prompt before the rest has come; None: it can.
    """

    kind = "score"
    reads: ClassVar[frozenset[str]] = frozenset({"k"})
    accumulates: ClassVar[bool] = False
    numbers: ClassVar[int] = 0
    ordered: ClassVar[bool] = True
    oldest: ClassVar[bool] = False
    why_no_chunks: ClassVar[str | None] = None

    @property
    def window(self) -> int:
        """Newest queries that the score reads, which may be more than those of the last forward; 0: none."""
        return 0

    @property
    def recent(self) -> int:
        """Newest tokens that the score cannot judge, and which are therefore kept."""
        return 0

    @property
    def repeats(self) -> Repeats | None:
        """The way in which the context is fed again before the score is known; None: it is known right after a layer's
        attention."""
        return None

    @property
    def lessons(self) -> Repeats | None:
        """The way in which the context is fed again while the score's module is in training; None: it is not."""
        return None

    def module(self, facts: Facts) -> nn.Module | None:
        """A new module with the weights that the score learns, for one model; None: it has none.

        Such a score reads ``"module"``, and finds it at ``site.learned``.
        """
        return None

    def fits(self, facts: Callable[[], Facts]) -> None:
        """Refuse a model that what the score knows is not of, with a ValueError; ``facts`` asks the model."""

    returns: int | None = None  # evicted tokens that come back before each generated one; None: none is asked about

    def foresee(self, learned: Learned, x: Tensor, notes: dict[str, Any], real: Tensor | None) -> Tensor:
        """``[B, N]`` how much all tokens so far matter, before a forward of new ones ``x`` ``[B, M, C]``; see
        :mod:`tokred.kv.release`. ``notes`` are the cache's, and ``real`` ``[B, M]`` is False on padding."""
        raise NotImplementedError(f"{type(self).__name__} judges rows after the attention alone")

    @property
    def needs(self) -> frozenset[str]:
        """:attr:`reads`, and what a wrapped score reads."""
        return self.reads

    def note_bytes(self, heads: int, width: int) -> int:
        """Bytes of one sample and layer that it keeps besides: ``heads`` query heads, keys of ``width`` numbers."""
        return 0

    def observe(self, site: CacheSite) -> None:
        """Take note of a forward, in ``site.rows`` (per row) or ``site.notes``."""

    def quick(self, q: Tensor, k: Tensor, slots: Tensor, scale: float | None, rows: dict[str, Tensor]) -> Tensor | None:
        """Take note of one token after a prompt, and score, without a site; None, with nothing noted: one is needed.

        ``q`` is ``[B, H, 1, D]``; no row is padding. The slots themselves say that the oldest goes.
        """
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, rows: dict[str, Tensor]) -> Pair | None:
        """The attention itself ``[B, H, 1, Dv]``, and what :meth:`quick` says, where one product gives both."""
        return None

    @abstractmethod
    def __call__(self, site: CacheSite) -> Tensor:
        """``[B, Hk, K]`` float32, larger is kept. Values of padding and empty rows do not matter."""

    def refine(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Tensor:
        """The score once it is known how many rows each head keeps."""
        return score


class Budget(Part):
    """The number of rows that each layer and head keeps.

    Subclasses have a field ``amount``: a float in (0, 1], the share of the tokens; an integer, tokens; or a text such
    as ``"64 MiB"``, the bytes of all layers of one sample.

    Attributes:
        deferred: whether a layer's rows may be decided after its own attention, when other layers are known.
        reads: what has to be measured for it besides scores.
        headwise: whether heads of a layer may keep different numbers.
        levels: whether rows that stay are given numbers of bits, so that a store has to be able to hold them so.
        why_no_limit: why bytes do not bound what is held while a prompt comes in chunks; None: they do.
    """

    kind = "budget"
    deferred: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    headwise: ClassVar[bool] = False
    levels: ClassVar[bool] = False
    why_no_limit: ClassVar[str | None] = None
    amount: float | int | str

    @property
    def full(self) -> bool:
        """True if every row is kept, whatever the length."""
        return isinstance(self.amount, float) and self.amount == 1.0

    @property
    def tokens(self) -> int | None:
        """The amount, where it is a number of tokens."""
        return self.amount if isinstance(self.amount, int) else None

    def of(self, amount: float | int | str) -> Budget:
        """This budget with another amount."""
        return dataclasses.replace(self, amount=amount)  # type: ignore[type-var]

    def check(self, depth: int) -> None:
        """Refuse a model of ``depth`` compressed layers that the parameters do not fit.

        Raises:
            ValueError: with what does not fit.
        """

    def fits(self, facts: Callable[[], Facts], score: Score) -> None:
        """Refuse a model, or a policy's score, that what the budget knows is not of.

        Args:
            facts: asks the model; only where something is known.

        Raises:
            ValueError: naming both.
        """

    def mean(self, n: int, place: Place | None, depth: int) -> int:
        """Rows per layer and head of a sample of ``n`` tokens, before they are distributed."""
        if isinstance(self.amount, str):
            if place is None:
                return n
            free = parse_bytes(self.amount) - place.fixed - place.coming * place.heads * place.row_bytes
            return max(1, place.rows(free // depth))
        return max(1, kept(n, self.amount) if isinstance(self.amount, float) else self.amount)

    def total(self, n: int, place: Place | None, depth: int) -> int:
        """Rows of all layers together, per head, of a sample of ``n`` tokens."""
        if isinstance(self.amount, float):
            return max(depth, kept(n * depth, self.amount))
        return depth * self.mean(n, place, depth)

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """Rows that layer ``layer`` keeps of ``n`` tokens; the mean, unless a subclass distributes."""
        return self.mean(n, place, depth)

    @property
    def queries(self) -> int:
        """Newest queries that it reads, which may be more than those of the last forward; 0: none."""
        return 0

    @property
    def shares(self) -> bool:
        """True if :attr:`amount` is a share of the tokens."""
        return isinstance(self.amount, float)

    def length(self, site: CacheSite) -> tuple[int, ...]:
        """Tokens of each sample that its rows are counted from.

        A share stays what it was when the prompt, or a turn, was complete. Tokens and bytes are as many whatever has
        come, so that a prompt which was shorter than they allow goes on growing until they are reached.
        """
        return site.base if self.shares else site.lengths

    def rows(self, site: CacheSite) -> tuple[int, ...]:
        """Rows that this layer keeps of each sample, per head on average."""
        return tuple(self.share(n, site.place, site.layer, site.depth) for n in self.length(site))

    def start(self, depth: int) -> Allocator:
        """An allocator for a cache of ``depth`` layers: each layer at once, unless a subclass has another."""
        return AtOnce(self)

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """Rows of each head, ``[B, Hk]``, or one number a sample where all heads keep the same."""
        return counts


class Fate(Part):
    """Evicted or merged: the fate of rows that are not kept.

    Attributes:
        merges: whether rows are averaged into others, so that a store has to be able to.
        rewrites: whether rows that stay are given other values and weights, so that a store has to be able to.
        alpha: the attention adds ``alpha * ln(weight)`` to the logits of rows that stand for several tokens.
        merge_score: how the per-row state of merged rows is combined.
    """

    kind = "fate"
    merges: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False

    @property
    def alpha(self) -> float:
        """Factor of the log-weights in the attention."""
        return 1.0

    @property
    def merge_score(self) -> str:
        """``"max"`` or ``"sum"``."""
        return "max"

    @property
    def room(self) -> int:
        """Rows that it needs besides those that are never evicted."""
        return 0

    @abstractmethod
    def reduce(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Reduction:
        """The reduction: rows that stay, and where the others go."""


@dataclasses.dataclass(frozen=True)
class When(Part):
    """The forwards at which rows are evicted, always after the forward's own attention.

    Args:
        prefill: at the end of the prompt.
        every: after every so many generated tokens; 0: never.
        start: generated tokens before the first of those periods begins.
        turns: at the end of every later forward of several tokens: a second turn, or each chunk of a prompt.
        chunk: most tokens of a forward; a budget in bytes is then a hard limit, which has room for them, and is kept by
            every forward of several tokens and often enough in between. 0: any number, and no limit.
    """

    name: ClassVar[str] = "when"
    kind: ClassVar[str] = "when"

    prefill: bool = True
    every: int = 0
    start: int = 0
    turns: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        for field in ("every", "start", "chunk"):
            check_count(getattr(self, field), field)

    def paced(self, depth: int) -> When:
        """With a limit on ``depth`` layers: as often as the room for half a chunk asks for, which all layers share."""
        if not self.chunk:
            return self
        most = max(1, self.chunk // (2 * depth))
        return When(every=min(self.every or most, most), turns=True, chunk=self.chunk)

    def coming(self, depth: int, *, deferred: bool) -> int:
        """Rows per head, of all layers together, that a hard limit leaves free; of :meth:`paced` times.

        A layer is cut right after its attention, so only one holds a chunk; where that is ``deferred``, all do.
        """
        if not self.chunk:
            return 0
        return self.chunk * (depth if deferred else 1) + depth * (self.every - 1)

    def due(self, prompt: int, before: int, after: int, frame: bool = False) -> bool:
        """True if a forward from ``before`` to ``after`` slots, or a ``frame`` of a stream, ends with an eviction."""
        if before < prompt:
            return self.turns or (self.prefill and after >= prompt)
        if self.every and self.period(after - prompt) > self.period(before - prompt):
            return True
        return self.turns and (frame or after - before > 1)

    def period(self, generated: int) -> int:
        """Whole periods among the generated tokens."""
        return max(0, generated - self.start) // self.every if self.every else 0

    def over(self, prompt: int, after: int) -> bool:
        """True if no eviction can come any more."""
        return after >= prompt and not self.every and not self.turns


def as_part(value: object, base: type[P], argument: str) -> P:
    """A part as users write it: an object, its name, or what :meth:`Part.to_dict` wrote.

    Raises:
        TypeError: it is none of these, or a part of another kind.
        ValueError: there is no such part; the message has the nearest names.
    """
    if isinstance(value, dict) and "part" in value:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "part"}
        value = _class(value["part"], argument)(**given)
    elif isinstance(value, str):
        value = _class(value, argument)()
    if not isinstance(value, base):
        raise TypeError(f"{argument} must be a {base.kind} of tokred.kv or its name, got {value!r}")
    return value


def _class(name: str, argument: str) -> type[Part]:
    if name not in parts:
        near = difflib.get_close_matches(name, parts, n=3, cutoff=0.4)
        raise ValueError(f"{argument} is {name!r}; did you mean {' or '.join(map(repr, near or parts))}?")
    found: type[Part] = parts.get(name)
    return found


def check_amount(value: object, argument: str = "budget") -> float | int | str:
    """Refuse what is no budget: neither a share in (0, 1], nor a number of tokens, nor a text with bytes.

    Raises:
        TypeError: of another type.
        ValueError: a share outside (0, 1], no token at all, or a text that is no number of bytes.
    """
    if isinstance(value, bool) or not isinstance(value, float | int | str):
        raise TypeError(f"{argument} must be a share (0.25), tokens (1024) or bytes ('64 MiB'), got {value!r}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{argument} as a share must lie in (0, 1], got {value} (a whole number means tokens)")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{argument} must be at least one token, got {value}")
    if isinstance(value, str):
        parse_bytes(value, argument)
    return value


def parse_bytes(text: str, argument: str = "budget") -> int:
    """``"64 MiB"`` as a number of bytes.

    Raises:
        ValueError: it is no positive number with a unit of B, kB, MB, GB, KiB, MiB or GiB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ValueError(f"{argument} must be bytes such as '64 MiB' or '1.5 GB', got {text!r}")
    return int(float(found[1]) * unit)
