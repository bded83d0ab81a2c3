"""Names for methods: a typed registry with lazy targets and entry points for outside packages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from tokred.errors import UnknownMethodError

if TYPE_CHECKING:
    from tokred.core.method import Method

M = TypeVar("M", bound="type[Method]")


class Registry:
    """Method classes by name. A target may be ``"module:Class"``, imported when it is first asked for.

    Packages add methods by the entry-point group ``tokred.methods`` (``name = "package.module:Class"``).
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._targets: dict[str, str | type[Method]] = {}
        self._discovered = False

    def add(self, name: str, target: str | type[Method]) -> None:
        """Register ``target`` under ``name``.

        Raises:
            ValueError: the name is taken by something else, or is not lower-case letters, digits and underscores.
        """
        if not name.replace("_", "").isalnum() or name != name.lower():
            raise ValueError(f"a method's name is lower-case letters, digits and underscores, got {name!r}")
        known = self._targets.get(name)
        if known is not None and _path(known) != _path(target):
            raise ValueError(f"the name {name!r} is taken by {_path(known)}; it cannot also mean {_path(target)}")
        self._targets[name] = target

    def get(self, name: str) -> type[Method]:
        """The class registered under ``name``.

        Raises:
            UnknownMethodError: there is none; the message has the nearest names.
        """
        self._discover()
        target = self._targets.get(name)
        if target is None:
            near = nearest(name.lower(), self._targets)
            hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(self)}"
            raise UnknownMethodError(f"no method is named {name!r}; {hint}")
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target

    def names_by_class(self) -> dict[str, str]:
        """The registered name of every class, by the class's own; nothing is imported."""
        self._discover()
        return {_path(target).rpartition(":")[2]: name for name, target in self._targets.items()}

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._targets

    def _discover(self) -> None:
        """Read the entry points once, at the first look-up rather than at import."""
        if self._discovered:
            return
        self._discovered = True
        for entry in metadata.entry_points(group=self._group):
            self.add(entry.name, entry.value)


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that may be meant, best first: near enough to ``name``, and not much farther than the best."""
    like = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    order = sorted(like, key=lambda other: (-like[other], other))
    return [other for other in order[:most] if like[other] >= max(0.5, like[order[0]] - 0.1)]


def _path(target: str | type[Method]) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


methods = Registry("tokred.methods")
# What cache policies are made of: scores, budgets, fates, times, stores.
parts = Registry("tokred.parts")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by ``name``, in its own file."""

    def add(cls: M) -> M:
        cls.name = name
        methods.add(name, cls)
        return cls

    return add
