"""Exchange a module's class for a subclass of the same name, and back.

The subclass keeps ``__name__``, ``__qualname__`` and ``__module__``: tools that look layers up by class name (device
maps, FSDP policies, ``repr``) notice nothing. Nothing is added to parameters, buffers or sub-modules, so ``state_dict``
keys stay. Pickle and deepcopy rebuild the subclass from the host's class, since a class made at run time cannot be
imported by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from tokred.adapters import contract
from tokred.errors import UnsupportedModelError

SETTINGS = "_tokred"
_HOST = "_tokred_host_class"


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


def is_swapped(module: nn.Module) -> bool:
    """Whether this very module's class was exchanged."""
    return any(_HOST in c.__dict__ for c in type(module).__mro__)


def swap(module: nn.Module, kind: str, settings: Any) -> None:
    """Exchange the class of ``module`` in place; ``kind`` is a key of ``_BODIES``."""
    if is_swapped(module):
        raise RuntimeError(f"{type(module).__name__} is patched already")
    host: Any = type(module)
    _exchange(module, _subclass(host, kind))
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
    """Undo :func:`swap`, and what the settings know besides."""
    host: Any = type(module)
    _exchange(module, _without(host))
    undo = getattr(module.__dict__.pop(SETTINGS, None), "undo", None)
    if undo is not None:
        undo()


class Hook:
    """Base of hooks on modules, by which they are found again; objects, so that models copy and pickle."""


class Standin:
    """Base of what stands on an instance in front of a method of its class."""


def remove_hooks(module: nn.Module) -> None:
    """Take tokred's hooks off one module, and what stands in front of its methods."""
    for name in [k for k, value in module.__dict__.items() if isinstance(value, Standin)]:
        del module.__dict__[name]
    for hooks, others in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            for other in others:
                other.pop(key, None)


@functools.cache
def _subclass(host: Any, kind: str) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _make_reduce(host, kind),
        "__prepare_scriptable__": refuse_script,
        _HOST: host,
    }
    body.update(_BODIES[kind](host))
    return type(host.__name__, (host,), body)


def _block_body(host: type[nn.Module]) -> dict[str, Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings = self.__dict__.get(SETTINGS)
        if settings is None:  # removed, but a wrapper that came later still calls this
            return host.forward(self, *args, **kwargs)
        settings.shared.watch.ran(settings.site)
        run = settings.recipe.run
        if args:
            return run(self, functools.partial(host.forward, self), args[0], args[1:], kwargs)
        x = kwargs.pop("hidden_states")
        return run(self, functools.partial(host.forward, self), x, (), kwargs)

    return {"forward": forward}


def _model_body(host: type[nn.Module]) -> dict[str, Any]:
    """Methods that reshape intermediate tokens to a map get them at full length: a short one would be scrambled."""
    body: dict[str, Any] = {}
    for name in ("forward_intermediates", "get_intermediate_layers"):
        original = getattr(host, name, None)
        if original is not None:
            body[name] = _exposed(original)
    # What a method learns is no sub-module of the model, so it has to be taken along.
    body.update({name: _followed(getattr(host, name)) for name in ("train", "_apply")})
    return body


def _cache_body(host: type[nn.Module]) -> dict[str, Any]:
    """What a model with a policy for its cache does before it generates."""
    from tokred.adapters.kv import generate

    return generate.body(host)


def _layers_body(host: type[nn.Module]) -> dict[str, Any]:
    """A list of decoder layers that hands them out with what is to be done before each."""
    from tokred.adapters.vlm import layers

    return layers.body(host)


def _sublayer_body(host: type[nn.Module]) -> dict[str, Any]:
    original = host.forward  # the compiler follows a function, not the attribute of a class

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        spot = self.__dict__.get(SETTINGS)
        if spot is None:  # removed, but a wrapper that came later still calls this
            return original(self, *args, **kwargs)
        return spot.run(self, original, args, kwargs)

    return {"forward": forward}


_BODIES: dict[str, Callable[[type[nn.Module]], dict[str, Any]]] = {
    "block": _block_body,
    "model": _model_body,
    "cache": _cache_body,
    "layers": _layers_body,
    "sublayer": _sublayer_body,
    "denoiser": lambda host: {},  # hooks do it all
}


def _exposed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shared = self.__dict__.get(SETTINGS)
        if shared is None:  # removed, but bound to this function before
            return original(self, *args, **kwargs)
        return shared.intermediates(original, (self, *args), kwargs)

    return method


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        module = getattr(self.__dict__.get(SETTINGS), "module", None)
        if module is not None:
            getattr(module, original.__name__)(*args, **kwargs)
        return out

    return method


def refuse_script(module: nn.Module) -> nn.Module:
    """Stand before ``torch.jit.script``, which asks this of a module before it compiles it.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"torch.jit.script cannot compile a patched {type(module).__name__}: export the model with torch.export.export "
        "(or torch.jit.trace), or call tokred.remove(model) first"
    )


def _make_reduce(host: type[nn.Module], kind: str) -> Callable[..., Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, protocol)
        return (_rebuild, (host, kind), *reduced[2:])

    return __reduce_ex__


def _rebuild(host: Any, kind: str) -> nn.Module:
    cls = _subclass(host, kind)
    return cls.__new__(cls)
