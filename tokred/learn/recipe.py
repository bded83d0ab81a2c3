"""Recipes: how a method is trained, as data. A TOML file each."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tokred.core.checks import check_choice, is_count
from tokred.core.registry import nearest
from tokred.learn.losses import Kind

FOLDER = Path(__file__).parent / "recipes"
# Section of the file -> which of the fields stand there; the others stand before the first section.
_SECTIONS = {
    "training": ("steps", "batch", "lr", "lr_method", "weight_decay", "warmup", "clip", "seed"),
    "losses": ("task", "logits", "tokens", "kind"),
}


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
        ValueError: a key is unknown, missing, or its value is out of range; the message names it.
    """
    if isinstance(given, Mapping):
        return _read(given, "the recipe")
    path = Path(given)
    if path.suffix != ".toml":
        path = FOLDER / f"{given}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise FileNotFoundError(f"no recipe {str(given)!r}: give the path of a .toml file, or one of {known}")
    with path.open("rb") as file:
        return _read(tomllib.load(file), str(given))


def _read(found: Mapping[str, Any], where: str) -> Recipe:
    values: dict[str, Any] = {}
    inside = {name for names in _SECTIONS.values() for name in names}
    top = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in inside)
    _check(found, (*top, *_SECTIONS), where)
    for name, value in found.items():
        if name in _SECTIONS:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} of {where} must be a section, [{name}], got {value!r}")
            _check(value, _SECTIONS[name], f"[{name}] of {where}")
            values.update(value)
        else:
            values[name] = value
    if not isinstance(values.get("method"), str):
        raise ValueError(f"{where} must name a method, got {values.get('method')!r}")
    return Recipe(**values)


def _check(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in found:
        if name not in known:
            near = nearest(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has an unknown key {name!r}{hint} Known are {', '.join(known)}")
