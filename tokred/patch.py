"""``Patch``: what was done to one model, on the model that the user gave, under one attribute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from tokred.core.method import Method

ATTRIBUTE = "_tokred_patch"


class Part(NamedTuple):
    """One method at work.

    Attributes:
        method: that acts.
        family: of the host, for messages and reports.
        module: the part of the model that is patched for it; may be the model itself.
    """

    method: Method
    family: str
    module: nn.Module


class Patch:
    """The methods that act on a model, and where.

    Attributes:
        parts: in the order of the stages.
        modules: with weights of their own, by name, that methods bring along; not in the model's ``state_dict``.
        settings: what the hooks of several methods share, by the name of their adapter.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.modules: dict[str, nn.Module] = {}
        self.settings: dict[str, Any] = {}

    @property
    def methods(self) -> list[Method]:
        """Those that act, in the order of the stages."""
        return [part.method for part in self.parts]

    def __repr__(self) -> str:
        return f"Patch({', '.join(f'{part.method!r} on {part.family}' for part in self.parts)})"


def patches_of(model: nn.Module) -> Iterator[tuple[nn.Module, Patch]]:
    """The patches on ``model`` and on what is inside it: the module that was given to ``apply``, and its patch."""
    for module in model.modules():
        found = module.__dict__.get(ATTRIBUTE)
        if isinstance(found, Patch):
            yield module, found
