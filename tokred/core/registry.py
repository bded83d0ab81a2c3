"""Names for methods and their parts: a typed registry with lazy targets and entry points for outside packages."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tokred.errors import PluginWarning, UnknownMethodError

if TYPE_CHECKING:
    from tokred.core.method import Method
    from tokred.core.site import Stage

M = TypeVar("M", bound="type[Method]")
C = TypeVar("C")


class Registry(Generic[C]):
    """Classes of one kind by name. A target may be ``"module:Class"``, imported when it is first asked for.

    Packages add methods by the entry-point group ``tokred.methods`` (``name = "package.module:Class"``), and parts of
    cache policies by ``tokred.parts``. A plug-in that cannot be used is left out with a
    :class:`tokred.errors.PluginWarning` that names it; all others stay.

    Args:
        group: of entry points.
        noun: what the classes are called, in messages.
        base: ``"module:Class"`` that they derive from.
    """

    def __init__(self, group: str, noun: str = "method", base: str = "tokred.core.method:Method") -> None:
        self._group = group
        self._noun = noun
        self._base = base
        self._targets: dict[str, str | type[C]] = {}
        self._discovered = False
        self._plugins: dict[str, str] = {}  # those of entry points that were not imported yet, and whose they are
        self._refused: dict[str, str] = {}  # those that cannot be used, and why

    def add(self, name: str, target: str | type[C]) -> None:
        """Register ``target`` under ``name``.

        Raises:
            ValueError: the name is taken by something else, or is not lower-case letters, digits and underscores.
        """
        if not name.replace("_", "").isalnum() or name != name.lower():
            raise ValueError(f"a {self._noun}'s name is lower-case letters, digits and underscores, got {name!r}")
        known = self._targets.get(name)
        if known is not None and _path(known) != _path(target):
            raise ValueError(f"the name {name!r} is taken by {_path(known)}; it cannot also mean {_path(target)}")
        self._targets[name] = target

    def get(self, name: str) -> type[C]:
        """The class registered under ``name``, or under another spelling of it as :meth:`resolve` reads them.

        Raises:
            UnknownMethodError: there is none; the message has the nearest names.
        """
        name = self.resolve(name)
        self._import_plugin(name)
        target = self._targets.get(name)
        if target is None:
            if name in self._refused:
                raise UnknownMethodError(f"no {self._noun} is named {name!r}: {self._refused[name]}")
            near = nearest(name.lower(), self._targets)
            hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(self)}"
            raise UnknownMethodError(f"no {self._noun} is named {name!r}; {hint}")
        if isinstance(target, str):
            target = self._targets[name] = _imported(target)
        return target

    def resolve(self, name: str) -> str:
        """The registered name that a spelling of papers stands for: ``"ToMe"``, ``"Zero-TPrune"``, ``"PruMerge+"``.

        Names and names of classes are compared without regard to case, hyphens and spaces. What means nothing, or more
        than one name, comes back as it is.
        """
        self._discover()
        for near in (name, name.lower()):
            if near in self._targets:
                return near
        wanted = _bare(name)
        found = {own for own in self._targets if _bare(own) == wanted}
        found = found or {own for cls, own in self.names_by_class().items() if _bare(cls) == wanted}
        return found.pop() if len(found) == 1 else name

    def names_by_class(self) -> dict[str, str]:
        """The registered name of every class, by the class's own; nothing is imported."""
        self._discover()
        return {_path(target).rpartition(":")[2]: name for name, target in self._targets.items()}

    def __iter__(self) -> Iterator[str]:
        self._discover()
        # Whoever goes through the names asks for the classes next, and one broken plug-in must not end that.
        for name in tuple(self._plugins):
            self._import_plugin(name)
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        self._discover()
        if isinstance(name, str):
            self._import_plugin(name)
        return name in self._targets

    def of(self: Registry[Method], stage: Stage) -> dict[str, type[Method]]:
        """The methods that act at a stage, with those of several stages that act there too, by name."""
        found = {name: self.get(name) for name in self}
        return {name: cls for name, cls in found.items() if any(m.stage == stage for m in cls().members)}

    def _discover(self) -> None:
        """Read the entry points once, at the first look-up rather than at import."""
        if self._discovered:
            return
        self._discovered = True
        for entry in metadata.entry_points(group=self._group):
            owner = f"the plug-in {entry.name!r} ({entry.value}{f' of {entry.dist.name}' if entry.dist else ''})"
            try:
                fresh = entry.name not in self._targets
                self.add(entry.name, entry.value)
            except ValueError as error:
                self._refuse(entry.name, f"{owner} is left out: {error}")
            else:
                if fresh:
                    self._plugins[entry.name] = owner

    def _import_plugin(self, name: str) -> None:
        """Import what an entry point names, once; leave it out where that fails or it is no method."""
        owner = self._plugins.pop(name, None)
        if owner is None:
            return
        target = self._targets[name]
        try:
            cls: Any = _imported(target) if isinstance(target, str) else target
            self._check_plugin(cls)
        except Exception as error:  # whatever a package raises at its import
            del self._targets[name]
            self._refuse(name, f"{owner} is left out: {type(error).__name__}: {error}")
        else:
            if "name" not in cls.__dict__:  # one derived from a class of tokred has that one's
                cls.name = name
            self._targets[name] = cls

    def _refuse(self, name: str, why: str) -> None:
        self._refused[name] = why
        # The call that first asked for a name stands at no fixed depth, and the text names the culprit.
        warnings.warn(why, PluginWarning, stacklevel=2)

    def _check_plugin(self, cls: Any) -> None:
        """Refuse what tables and reports could not ask about itself.

        Raises:
            TypeError: it is of another kind, or cannot be made without parameters.
        """
        fits = isinstance(cls, type) and issubclass(cls, _imported(self._base)) and dataclasses.is_dataclass(cls)
        if not fits:
            raise TypeError(f"a {self._noun} is a dataclass derived from a base of tokred, got {cls!r}")
        cls()


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _bare(name: str) -> str:
    """A name without what papers and code write differently."""
    return "".join(c for c in name.lower().replace("+", "plus") if c.isalnum())


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that may be meant, best first: near enough to ``name``, and not much farther than the best."""
    like = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    order = sorted(like, key=lambda other: (-like[other], other))
    return [other for other in order[:most] if like[other] >= max(0.5, like[order[0]] - 0.1)]


def _path(target: str | type) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


methods: Registry[Method] = Registry("tokred.methods")
# What cache policies are made of: scores, budgets, fates, times, stores. They stand a floor above, and are imported
# when one is asked for by name.
parts: Registry[Any] = Registry("tokred.parts", "part", "tokred.kv.parts:Part")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by ``name``, in its own file."""

    def add(cls: M) -> M:
        cls.name = name
        methods.add(name, cls)
        return cls

    return add
