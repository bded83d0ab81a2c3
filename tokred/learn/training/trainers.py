"""Parts that callbacks for other trainers share: schedules, and weights that those trainers do not see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

import tokred
from tokred.learn.recipe import Ramp


def check_schedule(schedule: Mapping[str, Ramp] | None) -> dict[str, Ramp]:
    """A copy of the schedule.

    Raises:
        TypeError: a value is no ramp.
    """
    found = dict(schedule or {})
    for name, ramp in found.items():
        if not isinstance(ramp, Ramp):
            raise TypeError(f"schedule[{name!r}] must be a tokred.learn.Ramp, got {ramp!r}")
    return found


def change_at(model: nn.Module, schedule: Mapping[str, Ramp], step: int, steps: int) -> None:
    """Set the parameters of step ``step``, counted from 0, of so many."""
    if schedule:
        tokred.change(model, **{name: ramp.at(step, steps) for name, ramp in schedule.items()})


def all_known(weights: Iterable[nn.Parameter], optimisers: Iterable[Any]) -> bool:
    """True if every one of these weights that learns is in an optimiser."""
    known = {id(p) for one in optimisers for group in one.param_groups for p in group["params"]}
    return all(id(p) in known for p in weights if p.requires_grad)


def several() -> bool:
    """True in one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """The mean over all processes, in place, where there are several."""
    if not several():
        return
    for p in weights:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad.div_(dist.get_world_size())
