"""``contract``: what tokred takes for granted about host libraries, in one place.

Adapters ask for things by *role* (the cache that a forward was given, the function behind a wrapper), and this file
says what the hosts call them, since which version and until when. Where a type or an annotation tells more than a name,
it is asked first, so that the next renaming is found without a new release of tokred.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn


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
