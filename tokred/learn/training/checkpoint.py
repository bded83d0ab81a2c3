"""A checkpoint of a training: weights, the optimiser and the step, in one file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokred.core.versions import TOKRED
from tokred.learn.recipe import Recipe

NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """All that training goes on from.

    Attributes:
        step: steps that were made.
        setting: the recipe, the model and the method, as plain values.
        model: ``state_dict`` of the model.
        modules: ``state_dict`` of what each method learns, by the methods' names.
        optimiser: its ``state_dict``.
        log: what every step so far gave.
    """

    step: int
    setting: dict[str, Any]
    model: dict[str, Any]
    modules: dict[str, dict[str, Any]]
    optimiser: dict[str, Any]
    log: list[dict[str, float]]

    def save(self, folder: Path) -> Path:
        """Write it at once or not at all."""
        path, part = folder / NAME, folder / f"{NAME}.part"
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        torch.save({"tokred": TOKRED, **values}, part)
        os.replace(part, path)
        return path

    @classmethod
    def load(cls, folder: Path, setting: Mapping[str, Any]) -> Checkpoint | None:
        """The checkpoint of a folder; None where there is none.

        Raises:
            ValueError: the file cannot be read, or is of another recipe or model; the message names both.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            made = cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            raise ValueError(f"{path} is no checkpoint of tokred: {type(error).__name__}: {error}") from error
        for name in sorted({*made.setting, *setting}):
            before, now = made.setting.get(name), setting.get(name)
            if before != now:
                raise ValueError(
                    f"{path} was written with {name} {before!r}, and now it is {now!r}: go on with the same, or give "
                    "another folder (resume=False begins anew in this one)"
                )
        return made


def setting_of(recipe: Recipe, model: str, method: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The plain values that have to be the same when training goes on."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    values["schedule"] = {name: dataclasses.asdict(ramp) for name, ramp in recipe.schedule.items()}
    values["parameters"] = dict(method)
    return {**values, "model": model, "processes": processes}
