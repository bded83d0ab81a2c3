"""The settings that a search may try: a method, the shape of its schedule over the depth, and how much it removes.

A :class:`Base` is a method as the user names it, without its amount. A :class:`Plan` is a base with a shape: how what
is removed is spread over the blocks, or what is kept over the layers of a cache. Only a plan *at a step* is a method
that can be applied; more steps remove more. So every plan can be brought to the same speed, and what a search compares
are shapes that cost the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tokred import api
from tokred.bench.arms import knob
from tokred.bench.entries import written
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.core.schedules import PerLayer
from tokred.core.settings import parse_setting
from tokred.encoder.method import Scheduled
from tokred.kv.policy import CachePolicy
from tokred.kv.preset import KVPreset
from tokred.methods.kv.kv import KVPolicy

SHARES = 200  # steps of a share
HEADS = ("even", "adaptive", "global")
KNOTS = 4  # of a cache's weights over the depth, between which they are interpolated
Options = tuple[tuple[str, Any], ...]


class Dice(Protocol):
    """Whatever draws a shape: Optuna's trial, or plain chance."""

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number of ``low..high``, both included."""

    def number(self, name: str, low: float, high: float) -> float:
        """A number between."""

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of the options."""


def setting_of(method: Method) -> str:
    """The parameters of a method that are not its defaults, as they are typed: ``r=[8,4,0]``."""
    r = getattr(method, "r", None)
    text = written(method)
    if not isinstance(r, PerLayer):
        return text
    rest = [part for part in text.split(" ") if not part.startswith(("r=", "values="))]
    return " ".join([f"r=[{','.join(str(v) for v in r.values)}]", *rest])


@dataclass(frozen=True)
class Base:
    """A method as the user names it, without its amount.

    Attributes:
        text: as it was named, ``"tome metric=x"``.
        name: of the method.
        fixed: parameters that the user chose.
        knob: the parameter that decides how much is removed.
        kind: ``"listed"`` (one amount a block), ``"cache"`` (a budget, by layers), or ``"share"`` and ``"count"`` (one
            number for all).
        depth: blocks, or layers of the cache.
        free: tokens that may be removed; 0 where they are not counted.
        rising: whether a larger number removes more.
    """

    text: str
    name: str
    fixed: Options
    knob: str
    kind: str
    depth: int
    free: int = 0
    rising: bool = True

    def has(self, field: str) -> bool:
        """True if the method has a parameter that the user left free."""
        known = {f.name for f in dataclasses.fields(registered.get(self.name))}  # type: ignore[arg-type]
        return field in known and field not in dict(self.fixed)

    @property
    def constant(self) -> Plan:
        """The plan with the same amount everywhere, as the method comes."""
        return Plan(self)

    # ------------------------------------------------------------------ shapes

    def known(self) -> Iterator[Plan]:
        """A few shapes that have done well elsewhere, to begin with."""
        d = self.depth
        if self.kind == "listed" and d > 2:
            yield spaced(self, 0, d, d, -1.0)
            yield spaced(self, 0, max(1, d // 3), max(1, d // 3), 0.0)
            yield spaced(self, d // 6, d, 3, 0.0)
            yield spaced(self, 0, d // 2, max(2, d // 4), 0.0)
            yield spaced(self, 0, d, d, 1.0)
        elif self.kind == "cache" and d > 1:
            yield self.heads("global")
            yield self.heads("adaptive")
            for knots in ((1.0, 0.3, -0.3, -1.0), (-1.0, -0.3, 0.3, 1.0), (0.7, -0.5, -0.5, 0.7)):
                yield bent(self, knots, "adaptive" if self._by_heads else "even")
        elif self.has("blocks") and d > 3:
            for start, count in ((0, 1), (1, 2), (d // 4, 2), (1, 4)):
                yield Plan(self, None, (("blocks", _blocks(start, d, count)),))
        elif self.has("block") and d > 1:
            yield Plan(self, None, (("block", 1),))
        elif self.has("start") and self.has("stop"):
            yield Plan(self, None, (("stop", d // 2),))
            yield Plan(self, None, (("start", d // 4),))

    @property
    def _by_heads(self) -> bool:
        return issubclass(registered.get(self.name), KVPreset | KVPolicy)

    def heads(self, kind: str) -> Plan:
        """A cache's plan whose heads share rows."""
        return Plan(self, None, (("heads", kind),))

    def draw(self, dice: Dice) -> Plan:
        """A shape by chance, or by what a sampler has learned."""
        d, own = self.depth, self.text
        if self.kind == "listed":
            start = dice.integer(f"{own} start", 0, max(0, d - 2))
            span = dice.integer(f"{own} span", 1, d)
            count = dice.integer(f"{own} count", 1, d)
            return spaced(self, start, min(d, start + span), count, dice.number(f"{own} slope", -1.0, 1.0))
        if self.kind == "cache":
            heads = dice.choice(f"{own} heads", HEADS) if self._by_heads else "even"
            if heads == "global":
                return self.heads(heads)
            knots = tuple(dice.number(f"{own} knot {i}", -1.5, 1.5) for i in range(KNOTS))
            return bent(self, knots, heads)
        options: dict[str, Any] = {}
        if self.has("blocks"):
            start, count = dice.integer(f"{own} start", 0, max(0, d - 2)), dice.integer(f"{own} count", 1, min(d, 6))
            options["blocks"] = _blocks(start, dice.integer(f"{own} stop", start + 1, d), count)
        if self.has("block"):
            options["block"] = dice.integer(f"{own} block", 0, max(0, d // 2))
        if self.has("start") and self.has("stop"):
            options["start"] = dice.integer(f"{own} start", 0, max(0, d - 2))
            options["stop"] = dice.integer(f"{own} stop", options["start"] + 1, d)
        return Plan(self, None, tuple(options.items()))


def spaced(base: Base, start: int, stop: int, count: int, slope: float) -> Plan:
    """``count`` blocks, evenly between ``start`` and ``stop``, with amounts that rise (or fall) along the depth."""
    chosen = _blocks(start, stop, count)
    weights = [0.0] * base.depth
    for i, block in enumerate(chosen):
        along = 2 * i / (len(chosen) - 1) - 1 if len(chosen) > 1 else 0.0
        weights[block] = 1 + slope * along + 1e-6
    return Plan(base, normed(weights))


def bent(base: Base, knots: tuple[float, ...], heads: str) -> Plan:
    """Weights of a cache's layers: the logarithm is a line through some knots over the depth."""
    weights = []
    for layer in range(base.depth):
        at = layer / max(1, base.depth - 1) * (len(knots) - 1)
        i = min(int(at), len(knots) - 2)
        weights.append(math.exp(knots[i] + (at - i) * (knots[i + 1] - knots[i])))
    return Plan(base, normed(weights), (("heads", heads),))


def _blocks(start: int, stop: int, count: int) -> tuple[int, ...]:
    """At most ``count`` blocks, evenly between ``start`` and ``stop``."""
    span = max(1, stop - start)
    count = min(count, span)
    return tuple(sorted({start + round(i * (span - 1) / max(1, count - 1)) for i in range(count)}))


def normed(weights: list[float]) -> tuple[float, ...]:
    """Weights that add up to 1."""
    total = sum(weights)
    return tuple(w / total for w in weights)


@dataclass(frozen=True)
class Plan:
    """A base with a shape.

    Attributes:
        base: the method.
        weights: shares of what is removed by block, or kept by layer of a cache; None: the same everywhere.
        options: other parameters that shape it.
    """

    base: Base
    weights: tuple[float, ...] | None = None
    options: Options = ()

    @property
    def constant(self) -> bool:
        """True if it is the method as it comes, with one amount for all layers."""
        return self.weights is None and not self.options

    @property
    def steps(self) -> int:
        """The strongest step; 0 removes nothing."""
        if self.base.kind == "listed":
            return max(1, self.base.free // 2 if self.weights is None else self.base.free - 1)
        return max(1, self.base.free // 2) if self.base.kind == "count" else SHARES - 1

    def at(self, step: int) -> Method:
        """The method that removes so much.

        Raises:
            TypeError, ValueError: the shape does not fit the method.
        """
        base = self.base
        if base.kind == "cache":
            return self._policy(1 - step / SHARES)
        parameters = {**dict(base.fixed), **dict(self.options)}
        if base.kind == "listed" and self.weights is not None:
            parameters[base.knob] = amounts(self.weights, step, base.free)
        elif base.kind == "share":
            parameters[base.knob] = (step if base.rising else SHARES - step) / SHARES
        else:
            parameters[base.knob] = step if base.rising else self.steps + 1 - step
        return api.make(base.name, **parameters)

    def _policy(self, share: float) -> Method:
        """The policy whose cache holds a share."""
        from tokred.kv.budgets import Adaptive, Global, Layered

        heads = dict(self.options).get("heads", "even")
        budget: Any = share if self.weights is None else Layered(share, self.weights)
        if heads == "global":
            budget = Global(share)
        elif heads == "adaptive":
            budget = Adaptive(share) if self.weights is None else Adaptive(share, layers=budget)
        return api.make(self.base.name, **{**dict(self.base.fixed), self.base.knob: budget})

    def earlier(self) -> Iterator[Plan]:
        """The plan bent towards the first blocks, more and more: it is faster, since more blocks have fewer tokens."""
        if self.base.kind == "listed" and self.weights is not None:
            for decay in (0.15, 0.3, 0.6, 1.2):
                bent = [w * math.exp(-decay * i) for i, w in enumerate(self.weights)]
                first = next(i for i, w in enumerate(bent) if w > 0)
                for to in dict.fromkeys((first, 0)):
                    moved = [0.0] * len(bent)
                    moved[: len(bent) - (first - to)] = bent[first - to :]
                    yield Plan(self.base, normed(moved), self.options)

    def moves(self, step: int) -> Iterator[Plan]:
        """The plans beside this one at a step: a layer's part moved to another, halved, doubled or taken away."""
        base, d = self.base, self.base.depth
        if base.kind == "cache":
            if dict(self.options).get("heads") == "global":
                return
            weights = self.weights or normed([1.0] * d)
            for width in (max(1, d // 6), max(1, d // 15)):
                for start in range(0, d, width):
                    for factor in (1.6, 1 / 1.6):
                        changed = [w * factor if start <= i < start + width else w for i, w in enumerate(weights)]
                        yield Plan(base, normed(changed), self.options)
            return
        if base.kind == "listed":
            # What a block cannot remove makes a constant schedule one of its own shape.
            real = amounts(self.weights, step, base.free) if self.weights else constant_amounts(step, d, base.free)
            yield from self._shifted(normed([float(r) for r in real]))
            return
        for name, value in self.options:
            near: list[Any] = []
            if name == "blocks":
                near = [value[:i] + value[i + 1 :] for i in range(len(value)) if len(value) > 1]
                near += [
                    tuple(sorted({*value[:i], b + by, *value[i + 1 :]})) for i, b in enumerate(value) for by in (-1, 1)
                ]
                near = [v for v in near if all(0 <= b < d for b in v)]
            else:
                near = [v for v in (value - 1, value + 1) if 0 <= v <= d]
            for other in near:
                options = {**dict(self.options), name: other}
                if not options.get("start", 0) >= options.get("stop", d):
                    yield Plan(base, None, tuple(options.items()))

    def _shifted(self, weights: tuple[float, ...]) -> Iterator[Plan]:
        for i, w in enumerate(weights):
            for factor in (0.0, 0.5, 2.0) if w > 0 else ():
                yield self._with(weights, {i: w * factor})
            for j in (i - 1, i + 1):
                # Two blocks that reduce cost two matchings: what one removes may as well go with the next.
                if w > 0 and 0 <= j < len(weights):
                    yield self._with(weights, {i: 0.0, j: weights[j] + w})
                    yield self._with(weights, {i: w / 2, j: weights[j] + w / 2})
            if w == 0:
                yield self._with(weights, {i: 0.5 / len(weights)})

    def _with(self, weights: tuple[float, ...], changes: dict[int, float]) -> Plan:
        changed = [changes.get(i, w) for i, w in enumerate(weights)]
        return Plan(self.base, normed(changed) if sum(changed) > 0 else weights, self.options)


def amounts(weights: tuple[float, ...], total: int, free: int) -> list[int]:
    """Tokens that each block removes, ``total`` in all: in proportion to the weights, and never more than half.

    Args:
        weights: of the blocks, which add up to 1.
        total: tokens to remove.
        free: tokens that may be removed at the first block. What a block cannot remove is left to the next.
    """
    found, wanted, done = [], 0.0, 0
    for weight in weights:
        wanted += weight * total
        # A block without weight removes nothing, even where others could not remove their part.
        r = min(max(0, round(wanted) - done), (free - done) // 2) if weight > 0 else 0
        found.append(r)
        done += r
    return found


def constant_amounts(r: int, depth: int, free: int) -> list[int]:
    """Tokens that each block removes where each should remove ``r``, and none can remove more than half."""
    found = []
    for _ in range(depth):
        found.append(min(r, free // 2))
        free -= found[-1]
    return found


class Rejected(ValueError):
    """A base that the model cannot run, or that has nothing to vary."""


def base_of(text: str, depth: int, free: int) -> Base:
    """The base that the user names: a method, with any parameters but the one that says how much.

    Args:
        text: ``"tome"``, ``"tome metric=x"``.
        depth: of the model.
        free: tokens that may be removed.

    Raises:
        Rejected: the amount is given, which the search has to choose, or the method has none.
        UnknownMethodError, TypeError, ValueError: there is no such method, or a parameter does not fit.
    """
    name, fixed = parse_setting(text)
    cls = registered.get(name)
    if issubclass(cls, CachePolicy):
        parameter, kind = "budget", "cache"
        if parameter not in {f.name for f in dataclasses.fields(cls)}:
            raise Rejected(f"{name!r} has no budget to vary")
    elif issubclass(cls, Scheduled):
        parameter, kind = "r", "listed"
    else:
        try:
            parameter, share = knob(name)
        except ValueError as error:
            raise Rejected(str(error)) from error
        kind = "share" if share else "count"
    if parameter in fixed:
        raise Rejected(f"{text!r} sets {parameter}, which is what tune has to find: leave it out")
    api.make(name, **fixed)  # whatever does not fit is said before anything is measured
    # A share that keeps things removes nothing at 1, one that removes things at 0; a method that says neither is known
    # by the parameter's name.
    nothing = (cls.nothing or {}).get(parameter)
    rising = nothing == 0 if nothing is not None else parameter not in ("kappa", "keep", "budget")
    if kind == "count" and isinstance(nothing, float):  # tokens or a share, of which the share fits every input
        kind = "share"
    return Base(text, name, tuple(fixed.items()), parameter, kind, depth, free, rising)
