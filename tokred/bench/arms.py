"""Arms of a comparison: methods with settings, parsed from text or chosen so that they cost the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred import api
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting

BASE = "unpatched"  # the model as it is

# Parameters that decide how much a method removes, by order of preference.
KNOBS = ("r", "ratio", "kappa", "keep", "budget", "k")
STEPS = 200  # a share is set in steps of 1 / STEPS


@dataclass(frozen=True)
class Arm:
    """One variant of a comparison.

    Attributes:
        name: of the method; ``"unpatched"`` for the model as it is.
        setting: what was chosen, as text.
        method: None for the model as it is.
        tokens_in: tokens that enter the first block; 0 where they were not counted.
        tokens_out: tokens that leave the last one; likewise.
        macs: multiply-adds of one image, counted beforehand; likewise.
    """

    name: str
    setting: str
    method: Method | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    macs: int = 0

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".strip()

    def applied(self, model: nn.Module) -> AbstractContextManager[object]:
        """The model in the state of this arm."""
        return nullcontext(model) if self.method is None else api.applied(model, self.method)


def typed(text: str) -> Arm:
    """A method as it is typed, ``"tome r=13"``, or ``"unpatched"``; nothing is counted.

    Raises:
        UnknownMethodError, TypeError, ValueError: there is no such method, or a parameter does not fit.
    """
    name, parameters = parse_setting(text)
    return Arm(name, text.partition(" ")[2].strip(), None if name == BASE else api.make(name, **parameters))


def unpatched(model: nn.Module, shape: Sequence[int]) -> Arm:
    """The model as it is: the base of every comparison."""
    cost = api.flops(model, None, shape)
    return Arm(BASE, "", None, cost.tokens[0], cost.tokens[-1], cost.macs)


def arm(model: nn.Module, shape: Sequence[int], name: str, **parameters: Any) -> Arm:
    """A method with parameters on a model.

    Raises:
        UnknownMethodError, TypeError, ValueError, MissingInputError: as :func:`tokred.apply`.
    """
    method = api.make(name, **parameters)
    cost = api.flops(model, method, shape)
    setting = " ".join(f"{k}={_text(v)}" for k, v in parameters.items())
    return Arm(name, setting, method, cost.layers[0].tokens_in, cost.tokens[-1], cost.macs)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def knob(name: str) -> tuple[str, bool]:
    """The parameter that decides how much a method removes, and whether it is a share (rather than a count).

    One of :data:`KNOBS`, or else the one number that ``example`` and ``nothing`` of the method both set.

    Raises:
        UnknownMethodError: there is no such method.
        ValueError: the method has no such parameter.
    """
    cls = registered.get(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found = next((k for k in KNOBS if k in fields), None) or _number_between(cls)
    if found is None:
        raise ValueError(f"{name!r} has none of {', '.join(KNOBS)} to vary; give its settings one by one")
    return found, isinstance(fields[found].default, float)


def _number_between(cls: type[Method]) -> str | None:
    """The parameter that goes from nothing to something, where a single number does."""
    nothing = cls.nothing or {}
    both = [k for k in cls.example if all(isinstance(s.get(k), int | float) for s in (cls.example, nothing))]
    return both[0] if len(both) == 1 else None


def at_cost(model: nn.Module, shape: Sequence[int], name: str, macs: int) -> Arm:
    """The setting of a method whose multiply-adds come nearest to ``macs``."""
    parameter, share = knob(name)
    full = api.flops(model, None, shape)

    def build(step: int) -> Arm:
        return arm(model, shape, name, **{parameter: step / STEPS if share else step})

    low, high = 1, STEPS if share else max(2, full.tokens[0] // 2)
    return nearest(build, low, high, macs)


def nearest(build: Callable[[int], Arm], low: int, high: int, macs: int) -> Arm:
    """Bisection of a cost that only rises or only falls with the step."""
    first, last = build(low), build(high)
    rising = last.macs >= first.macs
    while high - low > 1:
        middle = (low + high) // 2
        found = build(middle)
        if (found.macs <= macs) == rising:
            low, first = middle, found
        else:
            high, last = middle, found
    return min(first, last, key=lambda a: abs(a.macs - macs))


def ladder(model: nn.Module, shape: Sequence[int], names: Sequence[str], targets: Sequence[int]) -> list[Arm]:
    """For every method, one setting near each target of multiply-adds; settings that coincide are kept once."""
    out: list[Arm] = []
    for name in names:
        for macs in targets:
            found = at_cost(model, shape, name, macs)
            if found not in out:
                out.append(found)
    return out
