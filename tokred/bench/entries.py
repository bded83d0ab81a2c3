"""Entries of a benchmark: the methods that the user names, a row each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from tokred import api
from tokred.bench.arms import BASE
from tokred.core.checks import check_choice
from tokred.core.method import Method
from tokred.core.origin import Origin
from tokred.core.settings import parse_setting
from tokred.core.site import STAGES
from tokred.core.versions import TOKRED

HOW = ("expose", "windows")  # options of tokred.apply that a setting may have
Cost = dict[str, Any]  # fields of a record: tokens, multiply-adds, bytes
RANDOM = ("random", "random_prune", "random_evict", "random_visual", "random_latent_prune")


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

    @property
    def stage(self) -> str:
        """The stages in their order, with ``+`` between; empty for the model as it is."""
        return "+".join(stage for stage in STAGES if stage in self.stages)

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

    In a text, ``expose=`` and ``windows=`` are those of :func:`tokred.apply`: ``"tome r=300 expose=last"``.

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
        how: dict[str, Any] = {key: parameters.pop(key) for key in HOW if key in parameters}
        made = _how(api.make(name, **parameters), how)
        setting = " ".join(given.split()[1:])
    else:
        made = api.make(given)
        setting = written(made)
    name = made.name or type(made).__name__
    return Entry(name, setting, tuple(made.members), name in RANDOM)


def _how(made: Method, how: dict[str, Any]) -> Method:
    """A new method that is applied with some of ``tokred.apply``'s own options, as a saved setting would be."""
    for name, allowed in (("expose", get_args(api.Expose)), ("windows", get_args(api.Windows))):
        check_choice(how.get(name, "auto"), name, allowed)
    for member in made.members if how else ():
        object.__setattr__(member, "origin", Origin(TOKRED, **how))
    return made


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
    """The share of the unpatched model's multiply-adds, or bytes of the cache, or the product of both."""
    found = [float(cost["gmacs_share"])] if "gmacs_share" in cost else []
    if cost.get("dense_bytes"):
        found.append(cost["bytes"] / cost["dense_bytes"])
    return math.prod(found) if found else None
