"""Recipes: how a method is trained, as data. A TOML file each."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tokred.core.checks import check_choice, check_flags, check_number, check_share, is_count
from tokred.core.registry import nearest
from tokred.learn.losses import Kind

FOLDER = Path(__file__).parent / "recipes"
# Section of the file -> which of the fields stand there; the others stand before the first section.
_SECTIONS = {
    "training": ("steps", "batch", "lr", "lr_method", "weight_decay", "warmup", "clip", "seed"),
    "losses": ("task", "logits", "tokens", "kind", "tokens_of"),
}


@dataclass(frozen=True)
class Ramp:
    """A parameter of a method that goes from one value to another while it learns.

    Attributes:
        start: in the first step.
        end: from the last step of the ramp on.
        until: share of all steps that the ramp takes, in (0, 1].
        geometric: equal factors from step to step, rather than equal differences; both ends above 0.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    start: float
    end: float
    until: float = 1.0
    geometric: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(getattr(self, name), name)
        check_share(self.until, "until")
        check_flags(geometric=self.geometric)
        if self.geometric and not (self.start > 0 and self.end > 0):
            raise ValueError(f"a geometric ramp needs start and end above 0, got {self.start!r} and {self.end!r}")

    def at(self, step: int, steps: int) -> float:
        """The value in a step, counted from 0, of so many; between two whole numbers it is whole, cut off."""
        last = max(1, round(self.until * steps)) - 1
        done = 1.0 if step >= last else step / last
        if self.geometric:
            value: float = self.start * (self.end / self.start) ** done
            return value
        value = self.start + (self.end - self.start) * done
        whole = isinstance(self.start, int) and isinstance(self.end, int)
        return int(value + 1e-9) if whole else value


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        method: its name.
        parameters: of the method.
        steps: of the optimiser.
        batch: samples a step.
        lr: highest learning rate of the model's own weights; 0: they stay as they are.
        lr_method: that of the method's weights; None: the same.
        weight_decay: of matrices; vectors, and everything that the method learns, have none.
        warmup: steps in which rates rise linearly; then they fall by a cosine to nought.
        clip: largest norm of all gradients; 0: any.
        seed: of the draws.
        task: weight of the task's own loss.
        logits: weight of the distance of the classes from a dense teacher's.
        tokens: weight of the distance of the final tokens from its.
        kind: how that is measured, ``"mse"`` or ``"kl"``.
        tokens_of: name of the sub-module that puts out the final tokens, where they count; such as ``"norm"``.
        schedule: parameters of the method that change while it learns, by name: a :class:`Ramp` each.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 100
    batch: int = 64
    lr: float = 1e-4
    lr_method: float | None = None
    weight_decay: float = 0.05
    warmup: int = 0
    clip: float = 1.0
    seed: int = 0
    task: float = 1.0
    logits: float = 0.0
    tokens: float = 0.0
    kind: Kind = "mse"
    tokens_of: str = ""
    schedule: Mapping[str, Ramp] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if not is_count(value, least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("lr", "lr_method", "weight_decay", "clip", "task", "logits", "tokens"):
            value = getattr(self, name)
            if value is None and name == "lr_method":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        check_choice(self.kind, "kind", get_args(Kind))
        if not isinstance(self.tokens_of, str):
            raise ValueError(f"tokens_of must be the name of a sub-module, got {self.tokens_of!r}")
        if not isinstance(self.schedule, Mapping) or not all(isinstance(r, Ramp) for r in self.schedule.values()):
            raise ValueError(f"schedule must be a Ramp for each of some parameters, got {self.schedule!r}")

    @property
    def distils(self) -> bool:
        """True if a term of the loss comes from a dense teacher."""
        return self.logits > 0 or self.tokens > 0

    def at(self, step: int) -> dict[str, float]:
        """Parameters of the method in step ``step``, counted from 0, that follow a schedule."""
        return {name: ramp.at(step, self.steps) for name, ramp in self.schedule.items()}

    def rate(self, step: int) -> float:
        """Factor of the learning rates in step ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        left = max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / left))


def recipe(given: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe of tokred by its name, one from a TOML file, or from what such a file holds.

    Raises:
        FileNotFoundError: there is no such file, nor a recipe of this name.
        ValueError: the file is no TOML; or a key is unknown, missing, or its value is out of range; the message names
            it.
    """
    if isinstance(given, Mapping):
        return _read(given, "the recipe")
    path = Path(given)
    if path.suffix != ".toml":
        path = FOLDER / f"{given}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise FileNotFoundError(f"no recipe {str(given)!r}: give the path of a .toml file, or one of {known}")
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    return _read(found, str(given))


def _read(found: Mapping[str, Any], where: str) -> Recipe:
    values: dict[str, Any] = {}
    ramps = tuple(f.name for f in dataclasses.fields(Ramp))
    inside = {name for names in _SECTIONS.values() for name in names}
    top = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in {*inside, "schedule"})
    _check(found, (*top, *_SECTIONS, "schedule"), where)
    for name, value in found.items():
        if name in _SECTIONS:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} of {where} must be a section, [{name}], got {value!r}")
            _check(value, _SECTIONS[name], f"[{name}] of {where}")
            values.update(value)
        elif name == "schedule":
            if not isinstance(value, Mapping):
                raise ValueError(f"schedule of {where} must be sections, such as [schedule.r], got {value!r}")
            values[name] = {key: _ramp(one, ramps, f"[schedule.{key}] of {where}") for key, one in value.items()}
        else:
            values[name] = value
    if not isinstance(values.get("method"), str):
        raise ValueError(f"{where} must name a method, got {values.get('method')!r}")
    return Recipe(**values)


def _ramp(found: Any, known: tuple[str, ...], where: str) -> Ramp:
    if isinstance(found, Ramp):
        return found
    if not isinstance(found, Mapping) or not {"start", "end"} <= set(found):
        raise ValueError(f"{where} must have a start and an end, got {found!r}")
    _check(found, known, where)
    try:
        return Ramp(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in found:
        if name not in known:
            near = nearest(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where} has an unknown key {name!r}{hint} Known are {', '.join(known)}")
