"""Modules that are held by a model: itself, the components of a pipeline, or the attributes of a callable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tokred import adapters
from tokred.errors import UnsupportedModelError


def modules(model: Any) -> list[nn.Module]:
    """The modules of a model, which together hold all weights.

    Raises:
        TypeError: there is none, or the model cannot be called.
    """
    if isinstance(model, nn.Module):
        return [model]
    parts = getattr(model, "components", None)
    values = parts.values() if isinstance(parts, dict) else getattr(model, "__dict__", {}).values()
    found = list({id(one): one for one in values if isinstance(one, nn.Module)}.values())
    if not found or not callable(model):
        raise TypeError(
            "model must be a torch.nn.Module, a pipeline of diffusers, or a callable that holds modules as "
            f"attributes, got {type(model).__name__}"
        )
    return found


def target(model: Any, stages: Iterable[str]) -> Any:
    """The module that methods are applied to: of a pipeline its denoiser, of a callable the one that they know."""
    found = adapters.module_of(model)
    if isinstance(found, nn.Module):
        return found
    for one in modules(model):
        for stage in stages:
            try:
                adapters.find(one, stage)
            except UnsupportedModelError:
                continue
            return one
    return modules(model)[0]  # what it is refused for says why
