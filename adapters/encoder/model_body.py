"""The class of a patched model, where it differs from its host's: intermediate tokens come at full length, and what a
method learns goes wherever the model goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tokred.adapters.contract import members
from tokred.adapters.encoder.state import Shared
from tokred.adapters.followed import followed
from tokred.adapters.swap import SETTINGS


def body(host: Any) -> dict[str, Any]:
    """Methods of a patched model's class: those that reshape intermediate tokens to a map get them at full length,
    since a short sequence would be scrambled."""
    names = (*members.INTERMEDIATES.names, *members.LAYERS_BETWEEN.names)
    exposed = {name: _exposed(getattr(host, name)) for name in names if getattr(host, name, None) is not None}
    return {**exposed, **followed(host)}


def _exposed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shared: Shared | None = self.__dict__.get(SETTINGS)
        if shared is None:  # removed, but bound to this function before
            return original(self, *args, **kwargs)
        return shared.intermediates(original, (self, *args), kwargs)

    return method
