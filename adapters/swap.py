"""Exchange a module's class for a subclass of the same name, and back.

The subclass keeps ``__name__``, ``__qualname__`` and ``__module__``: tools that look layers up by class name (device
maps, FSDP policies, ``repr``) notice nothing. Nothing is added to parameters, buffers or sub-modules, so ``state_dict``
keys stay. Pickle and deepcopy rebuild the subclass from the host's class, since a class made at run time cannot be
imported by name.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from tokred.adapters import contract
from tokred.errors import UnsupportedModelError

# On a swapped module, what its new class needs to know; on that class, the host's own.
SETTINGS = "_tokred"
_HOST = "_tokred_host_class"

# The methods of the subclass of a host's class. A function of a module rather than a closure: pickles name it.
Body = Callable[[Any], dict[str, Any]]


class Undo(ABC):
    """How one change is taken back: a small object, so that what holds it copies and pickles."""

    @property
    @abstractmethod
    def in_force(self) -> bool:
        """True while the change is still there."""

    @abstractmethod
    def undo(self) -> None:
        """Take the change back, unless that has happened already."""


def host_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its host library wrote it: without the patch, and without what wrappers made of it."""
    cls: Any = type(module)
    return _plain(cls)  # type: ignore[no-any-return]


@functools.cache
def _plain(cls: Any) -> Any:
    return next(c for c in cls.__mro__ if _HOST not in c.__dict__ and not contract.is_wrapper(c))


@functools.cache
def _without(cls: Any) -> Any:
    """``cls`` as it would be had it not been patched, also where a wrapper was put around the patched class since."""
    if _HOST in cls.__dict__:
        return cls.__dict__[_HOST]
    if not any(_HOST in c.__dict__ for c in cls.__mro__):
        return cls
    return contract.rewrapped(cls, tuple(_without(base) for base in cls.__bases__))


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what the forward of a module's class takes by position, in order, without ``self``."""
    parameters = list(inspect.signature(host_class(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def is_swapped(module: nn.Module) -> bool:
    """True for a module whose own class was exchanged."""
    return any(_HOST in c.__dict__ for c in type(module).__mro__)


def swap(module: nn.Module, body: Body, settings: Any) -> None:
    """Exchange the class of ``module`` in place for a subclass.

    Args:
        module: to be exchanged.
        body: the methods of the subclass, given the class; a function that can be imported.
        settings: what those methods find under :data:`SETTINGS`.

    Raises:
        UnsupportedModelError: it is exchanged already, for another place in the model.
    """
    if is_swapped(module):
        raise UnsupportedModelError(
            f"a {type(module).__name__} is patched already: it stands at several places of this model. What happens to "
            "its tokens is known by its place, so each needs a module of its own, such as copy.deepcopy makes"
        )
    host: Any = type(module)
    _exchange(module, _subclass(host, body))
    module.__dict__[SETTINGS] = settings


def _exchange(module: nn.Module, cls: Any) -> None:
    """Another class for ``module``, also for wrappers that hold on to the forward of the one before."""
    places = contract.own_forwards(module)
    module.__class__ = cls
    for holder, name in places:
        setattr(holder, name, MethodType(cls.forward, module))


def check_entrance(module: nn.Module, name: str) -> None:
    """Refuse a module whose forward someone has replaced in a way that would pass a patch by.

    Raises:
        UnsupportedModelError: with what stands there, and what to do.
    """
    found = contract.foreign_forward(module)
    if found is not None:
        raise UnsupportedModelError(
            f"the forward of {name} was replaced on the module itself (by {found}), which would pass a patch by: call "
            "tokred.apply before whatever replaces it, or undo that first"
        )


def restore(module: nn.Module) -> None:
    """Take :func:`swap` back, with what else its settings changed."""
    host: Any = type(module)
    _exchange(module, _without(host))
    settings = module.__dict__.pop(SETTINGS, None)
    if isinstance(settings, Undo):
        settings.undo()


class Hook:
    """Base of hooks on modules, by which they are found again; objects, so that models copy and pickle."""


class Standin:
    """Base of what stands on an instance in front of a method of its class."""


@functools.cache
def _subclass(host: Any, body: Body) -> type[nn.Module]:
    members: dict[str, Any] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _make_reduce(host, body),
        "__prepare_scriptable__": refuse_script,
        _HOST: host,
    }
    members.update(body(host))
    return type(host.__name__, (host,), members)


def unchanged(host: type[nn.Module]) -> dict[str, Any]:
    """The body of a module that keeps all its methods, and is exchanged to hold settings and refuse scripting."""
    return {}


def refuse_script(module: nn.Module) -> nn.Module:
    """Stand before ``torch.jit.script``, which asks this of a module before it compiles it.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"torch.jit.script cannot compile a patched {type(module).__name__}: export the model with torch.export.export "
        "(or torch.jit.trace), or call tokred.remove(model) first"
    )


def _make_reduce(host: type[nn.Module], body: Body) -> Callable[..., Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, protocol)
        return (_rebuild, (host, body), *reduced[2:])

    return __reduce_ex__


def _rebuild(host: Any, body: Body) -> nn.Module:
    cls = _subclass(host, body)
    return cls.__new__(cls)
