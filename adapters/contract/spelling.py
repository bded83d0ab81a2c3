"""Spellings of hosts' names: what a role is called, by whom, since when and until when, and where that can be seen."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

_MISSING = object()


class Spelling(NamedTuple):
    """One spelling of a host's name.

    Attributes:
        name: as the host writes it.
        library: that writes it.
        since, until: first and last version that do; empty: all that are supported.
        where: ``module:object`` of the host whose code spells it, for the doctor to look at; a module alone: it is
            one of the things that the module holds.
    """

    name: str
    library: str
    since: str = ""
    until: str = ""
    where: str = ""


@dataclass(frozen=True)
class Word:
    """One public name of hosts (of an argument, a field, an attribute), by its role.

    Everything here is a look at names that are known: no signature is inspected, so that a forward may ask.

    Attributes:
        role: in our words.
        spellings: that hosts have for it, the newest first.
        names: the same, as they are written.
    """

    role: str
    spellings: tuple[Spelling, ...]
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Newest spelling, where nobody can be asked which one counts."""
        return self.names[0]

    def of(self, given: Mapping[str, Any], default: Any = None) -> Any:
        """Value among arguments or fields by name: the first that is not None; ``default`` where there is none."""
        found = default
        for name in self.names:
            if name in given:
                found = given[name]
                if found is not None:
                    return found
        return found

    def at(self, given: Mapping[str, Any]) -> Any:
        """Value among arguments that are known to have it.

        Raises:
            KeyError: they have not, with the names that were looked for.
        """
        for name in self.names:
            if name in given:
                return given[name]
        raise KeyError(f"{' or '.join(self.names)} ({self.role})")

    def key(self, given: Container[str], taken: Container[str] = ()) -> str:
        """Spelling in use among ``given``, else the one that the forward with the arguments ``taken`` has."""
        for names in (given, taken):
            for name in self.names:
                if name in names:
                    return name
        return self.names[0]

    def put(self, given: MutableMapping[str, Any], value: Any, taken: Container[str] = ()) -> None:
        """Set the value among arguments, under the spelling that :meth:`key` finds."""
        given[self.key(given, taken)] = value

    def pop(self, given: MutableMapping[str, Any]) -> Any:
        """Value among arguments, taken out in every spelling; None where there is none."""
        found = self.of(given)
        for name in self.names:
            given.pop(name, None)
        return found

    def part(self, owner: Any, default: Any = None) -> Any:
        """Attribute of a module, a configuration or an output; ``default`` where it has none of a known name."""
        for name in self.names:
            found = getattr(owner, name, _MISSING)
            if found is not _MISSING:
                return found
        return default

    def need(self, owner: Any) -> Any:
        """Attribute of an object that is known to have it.

        Raises:
            AttributeError: it is not, with the names that were looked for.
        """
        found = self.part(owner, _MISSING)
        if found is _MISSING:
            raise AttributeError(f"{type(owner).__name__} has no {' or '.join(self.names)} ({self.role})")
        return found

    def spelled(self, owner: Any) -> str:
        """Spelling of the attribute that an object has; the newest where it has none."""
        return next((name for name in self.names if getattr(owner, name, _MISSING) is not _MISSING), self.names[0])

    def set(self, owner: Any, value: Any) -> None:
        """Set the attribute, under the spelling that the object has."""
        setattr(owner, self.spelled(owner), value)

    def among(self, names: Container[str]) -> bool:
        """True if some names (of arguments) have one of these."""
        return any(name in names for name in self.names)

    def on(self, owner: Any) -> bool:
        """True if an object has the attribute."""
        return self.part(owner, _MISSING) is not _MISSING


def arguments(function: Callable[..., Any], given: Mapping[Word, Any]) -> dict[str, Any]:
    """Arguments for a host's function, each under the name that its signature has."""
    taken = parameters(getattr(function, "__func__", function))
    return {word.key((), taken): value for word, value in given.items()}


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's parameters, looked up once."""
    return tuple(inspect.signature(function).parameters)


def look(path: str) -> Any:
    """Object at ``module:attribute`` (``()`` behind it: what that makes), or the module; None: nothing does."""
    module, _, attribute = path.removesuffix("()").partition(":")
    try:
        found = importlib.import_module(module)
        if attribute:
            found = functools.reduce(getattr, attribute.split("."), found)
    except (ImportError, AttributeError):
        return None
    return found() if path.endswith("()") else found  # type: ignore[operator]


def spells(path: str, name: str) -> bool:
    """True if the code of a host's class or function (its parameters, attributes, fields, strings), or a collection of
    strings, spells a name."""
    found = look(path)
    return found is not None and name in _spelled(path)


@functools.cache
def _spelled(path: str) -> frozenset[str]:
    found = look(path)
    if isinstance(found, ModuleType):
        return frozenset(vars(found))
    if isinstance(found, tuple | list | dict | set):
        return frozenset(one for one in found if isinstance(one, str))
    if not isinstance(found, type):
        return frozenset(_of_function(found))
    library = found.__module__.partition(".")[0]
    names: set[str] = set()
    # What a class takes from its library's own bases is its own; what torch's modules have is not.
    for cls in found.__mro__:
        if cls.__module__.partition(".")[0] == library:
            names |= {*vars(cls), *inspect.get_annotations(cls)}
            for value in vars(cls).values():
                names.update(_of_function(value))
                value = getattr(value, "value", value)  # of an enumeration
                names |= {value} if isinstance(value, str) else set()
    return frozenset(names)


def _of_function(value: Any) -> Iterator[str]:
    function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
    if isinstance(function, FunctionType):
        yield from _of_code(function.__code__)


def _of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (one for one in constant if isinstance(one, str))  # keywords of a call
        elif isinstance(constant, CodeType):
            yield from _of_code(constant)
