"""Entries of a benchmark: the methods that the user names, and the baselines that cost as much."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred import api
from tokred.bench.arms import BASE, STEPS, Arm, knob, nearest
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting

Cost = dict[str, Any]  # fields of a record: tokens, multiply-adds, bytes
Probe = Callable[[Method], Cost]
SAME = 0.02  # settings whose work differs by less share their baselines


@dataclass(frozen=True)
class Entry:
    """One row to be measured.

    Attributes:
        name: of the method, of several with ``+`` between; ``"unpatched"`` for the model as it is.
        setting: its parameters, as they are typed.
        methods: what is applied; empty for the model as it is.
        baseline: True for those that no choice of tokens goes into.
    """

    name: str
    setting: str
    methods: tuple[Method, ...] = ()
    baseline: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".strip()

    @property
    def stages(self) -> set[str]:
        return {m.stage for m in self.methods}

    def applied(self, model: nn.Module) -> AbstractContextManager[object]:
        """The model in the state of this row."""
        return api.applied(model, list(self.methods)) if self.methods else nullcontext(model)


def written(method: Method) -> str:
    """The parameters of a method that are not its defaults, as they are typed."""
    found = []
    for f in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        plain = f.default is not dataclasses.MISSING and value == f.default
        if f.init and not plain and not (f.default_factory is not dataclasses.MISSING and value == f.default_factory()):
            shown = _typed(method, f.name, value)
            found.append(f"{f.name}={f'{shown:g}' if isinstance(shown, float) else str(shown).replace(' ', '')}")
    return " ".join(found)


def _typed(method: Method, name: str, value: Any) -> Any:
    """The value that a user gives: ``r=13`` becomes a schedule of one number in the method, which is shown as 13."""
    if dataclasses.is_dataclass(value) and len(inside := dataclasses.fields(value)) == 1:
        raw = getattr(value, inside[0].name)
        with contextlib.suppress(TypeError, ValueError):
            if dataclasses.replace(method, **{name: raw}) == method:  # type: ignore[type-var]
                return raw
    return value


def entry(given: Any) -> Entry:
    """A row of what the user names: a setting as text, a method object, or a list of these that act together.

    Raises:
        UnknownMethodError, TypeError, ValueError: there is no such method, or a parameter does not fit.
    """
    if isinstance(given, list | tuple):
        parts = [entry(one) for one in given]
        if not parts:
            raise ValueError("methods holds an empty list")
        joined = tuple(m for part in parts for m in part.methods)
        settings = [part.setting or "-" for part in parts]
        return Entry("+".join(p.name for p in parts), " + ".join(settings) if len(parts) > 1 else parts[0].setting,
                     joined, parts[0].baseline and len(parts) == 1)  # fmt: skip
    if isinstance(given, str):
        name, parameters = parse_setting(given)
        if name == BASE:
            return Entry(BASE, "")
        made = api.make(name, **parameters)
        setting = " ".join(given.split()[1:])
    else:
        made = api.make(given)
        setting = written(made)
    name = made.name or type(made).__name__
    return Entry(name, setting, tuple(made.members), name in ("random", "random_prune", "random_evict"))


def entries(methods: Any) -> list[Entry]:
    """The rows that the user asks for, each once.

    Raises:
        UnknownMethodError, TypeError, ValueError: as :func:`entry`, or there is none.
    """
    given = [methods] if isinstance(methods, str | Method) else list(methods)
    # By their labels: a method may hold a list, which has no hash.
    found = [one for one in {one.label: one for one in map(entry, given)}.values() if one.name != BASE]
    if not found:
        raise ValueError("methods is empty: name at least one, such as 'tome r=13'")
    return found


def work(cost: Cost) -> float | None:
    """The share of the unpatched model's multiply-adds, or bytes of the cache."""
    if "gmacs_share" in cost:
        return float(cost["gmacs_share"])
    return cost["bytes"] / cost["dense_bytes"] if cost.get("dense_bytes") else None


def of_equal_work(stage: str, found: Sequence[tuple[Entry, Cost]], probe: Probe) -> list[Entry]:
    """For each amount of work among the entries, the baselines of the stage whose work comes nearest.

    Args:
        stage: of the benchmark.
        found: entries that run, with their costs.
        probe: the cost of a method, measured on the first batch.
    """
    made: dict[str, Entry] = {}
    done: list[tuple[str, float]] = []
    met: set[tuple[str, float]] = set()
    for one, cost in found:
        share = work(cost)
        if one.baseline or share is None or share >= 1:
            continue
        drops = any(getattr(m, "drops", False) for m in one.methods)
        names = ("random_prune" if drops else "random", "downsample")
        for name in names if stage == "block" else ("random_evict", "streaming_llm"):
            if any(name == other and abs(share - at) < SAME for other, at in done):
                continue
            done.append((name, share))
            chosen, at = _matched(name, cost, probe) if stage == "block" else _budget(name, share, probe)
            if (name, at) in met:  # a coarse grid has few sizes: one may be the nearest to several amounts of work
                continue
            met.add((name, at))
            made[chosen.label] = chosen
    present = {one.label for one, _ in found}
    return [one for label, one in made.items() if label not in present]


def _budget(name: str, share: float, probe: Probe) -> tuple[Entry, float]:
    """The budget at which a policy's cache has this share of the bytes, and that share."""
    method = api.make(name, budget=_rounded(share))
    held = work(probe(method)) or 0.0
    if abs(held - share) > SAME / 2 and held < 1 and share < 1:
        # Layers of a sliding window hold what they hold, whatever the budget: the rest goes in proportion.
        method = api.make(name, budget=_rounded(1 - (1 - share) * (1 - share) / (1 - held)))
        held = work(probe(method)) or 0.0
    return Entry(name, written(method), (method,), True), held


def _rounded(share: float) -> float:
    return min(1.0, max(0.001, round(share, 3)))


def _matched(name: str, target: Cost, probe: Probe) -> tuple[Entry, float]:
    """The setting of a baseline whose measured work comes nearest, and that work."""
    parameter, share = knob(name)
    macs = round(1e9 * target["gmacs"])

    def build(step: int) -> Arm:
        method = api.make(name, **{parameter: step / STEPS if share else step})
        return Arm(name, "", method, macs=round(1e9 * probe(method)["gmacs"]))

    try:
        found = nearest(build, 1, STEPS - 1 if share else max(2, int(target["tokens_in"]) // 2), macs)
        method, at = found.method, float(found.macs)
    except Exception:
        # No grid, say: it does not fit the model, and its row, which will fail like this one, says why.
        method, at = api.make(name, **registered.get(name).example), 0.0
    assert method is not None
    return Entry(name, written(method), (method,), True), at
