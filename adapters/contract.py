"""``contract``: what tokred takes for granted about host libraries, in one place.

Adapters ask for things by *role* (the cache that a forward was given, the function behind a wrapper), and this file
says what the hosts call them, since which version and until when. Where a type or an annotation tells more than a name,
it is asked first, so that the next renaming is found without a new release of tokred.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokred.errors import UnsupportedModelError


class Spelling(NamedTuple):
    """One spelling of a host's name.

    Attributes:
        name: as the host writes it.
        library: that writes it.
        since, until: first and last version that do; empty: all that are supported.
    """

    name: str
    library: str
    since: str = ""
    until: str = ""


# The cache among the arguments of forwards, attention modules, mask functions and ``model_kwargs`` of ``generate``, and
# among the fields of outputs. transformers 5.24 takes the older names until 5.40 and renames them itself.
CACHE = (
    Spelling("cache", "transformers", since="5.24"),
    Spelling("past_key_values", "transformers", until="5.39"),
    Spelling("layer_past", "transformers", until="5.39"),
)
CACHE_NAMES = tuple(s.name for s in CACHE)


# What forwards of language models without keys and values call their state.
STATE_NAMES = ("cache_params", "state", "mems")


@functools.cache
def _cache_argument(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    # An annotation survives renaming: ``Cache | None``, quoted or not.
    for name, parameter in parameters.items():
        text = getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)
        words = str(parameter.annotation) if text == "Union" else text
        if any(part.strip(" '\"").rpartition(".")[2] in _CACHE_TYPES for part in words.split("|")):
            return name
    return next((name for name in CACHE_NAMES if name in parameters), None)


_CACHE_TYPES = frozenset({"Cache", "DynamicCache", "EncoderDecoderCache"})


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Name of the argument by which ``function`` takes a cache: the one annotated with a cache, else one of a known
    name; None where it takes none."""
    return _cache_argument(getattr(function, "__func__", function))


def cache_name(function: Callable[..., Any]) -> str:
    """The same for a function that is known to take one.

    Raises:
        TypeError: it takes none.
    """
    name = cache_argument(function)
    if name is None:
        raise TypeError(f"{getattr(function, '__qualname__', function)} takes no cache ({', '.join(CACHE_NAMES)})")
    return name


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments by name; None where there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def with_cache(given: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """Arguments with ``cache`` under ``name`` and under no other spelling, of which hosts take one at a time."""
    return {**{k: v for k, v in given.items() if k not in CACHE_NAMES}, name: cache}


def generation_cache_name(model_kwargs: Mapping[str, Any], model: nn.Module) -> str:
    """Key of the cache in ``model_kwargs`` of ``generate``: the one in use, else the one of the model's forward."""
    used = next((name for name in CACHE_NAMES if name in model_kwargs), None)
    return used if used is not None else cache_name(type(model).forward)


# Attributes by which wrappers remember the forward that they stand in front of: on the module itself, or on what the
# module holds under the first name, one item of its list after the other.
KEPT_FORWARDS = (
    (Spelling("_old_forward", "accelerate"), ""),
    (Spelling("_diffusers_hook", "diffusers", since="0.32"), "_fn_refs"),
)
_IN_LIST = ("forward", "original_forward")
# Classes that wrappers make of a module's class, by a base that all of them have.
_WRAPPING_BASES = (Spelling("FSDPModule", "torch", since="2.6"), Spelling("ReplicateModule", "torch", since="2.9"))


def is_wrapper(cls: type) -> bool:
    """Whether a wrapper (FSDP 2 and its kind) made a class of a module's class, or it is what those have in common."""
    names = {base.name for base in _WRAPPING_BASES}
    return any(c.__name__ in names and c.__module__.startswith("torch.") for c in (cls, *cls.__bases__))


def rewrapped(cls: type, bases: tuple[type, ...]) -> type:
    """``cls``, a wrapper's class, made of other ``bases``."""
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, body)


def own_forwards(module: nn.Module) -> list[tuple[Any, str]]:
    """Places that hold the module's own forward as a bound method: ``(holder, attribute)``.

    A wrapper that replaces ``module.forward`` keeps the one before; whoever exchanges the module's class has to
    exchange that one as well, or the wrapper passes the new class by.
    """
    places: list[tuple[Any, str]] = [(module, "forward")]
    for spelling, items in KEPT_FORWARDS:
        holder = module.__dict__.get(spelling.name)
        if not items:
            places.append((module, spelling.name))
        elif holder is not None:
            places += [(one, name) for one in getattr(holder, items, ()) for name in _IN_LIST]
    own = type(module).forward
    return [(holder, name) for holder, name in places if _is_bound(holder.__dict__.get(name), module, own)]


def _is_bound(found: Any, module: nn.Module, function: Any) -> bool:
    return isinstance(found, MethodType) and found.__self__ is module and found.__func__ is function


def foreign_forward(module: nn.Module) -> str | None:
    """Description of a forward that was put in front of the module's own and never reaches its class again, as far as
    is known; None where there is none."""
    found = module.__dict__.get("forward")
    if found is None or own_forwards(module):
        return None
    inner = found
    while isinstance(inner, functools.partial):
        inner = inner.func
    return f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', type(inner).__name__)}"


def skips_layers(model: nn.Module) -> bool:
    """Whether the host has been told to leave out layers in some forwards (caches of diffusers, guidance by skipped
    layers), so that a site that did not run has not been passed by."""
    names = [spelling.name for spelling, items in KEPT_FORWARDS if items]
    return any(name in module.__dict__ for module in model.modules() for name in names)


# Hooks that bring a module's own parameters to the device when it is called, and take them away again.
_LOADERS = (Spelling("_hf_hook", "accelerate"),)


@contextlib.contextmanager
def parameters_at_hand(module: nn.Module) -> Iterator[None]:
    """While open, parameters that stand directly on ``module`` can be read, as inside of its own forward.

    Whatever keeps weights elsewhere (in host memory, on disk) brings them when the module is called. Who reads a
    parameter without calling its module would read a placeholder, which multiplies without an error.
    """
    hooks = [h for h in (module.__dict__.get(s.name) for s in _LOADERS) if h is not None]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


def check_at_hand(tensor: Tensor, name: str) -> Tensor:
    """``tensor``, which is about to be read.

    Raises:
        UnsupportedModelError: it is a placeholder without values.
    """
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"{name} has been moved away (it is on the meta device) by something that brings it back only when its "
            "module is called, and this model needs it between calls: load that module on the device that runs it"
        )
    return tensor
