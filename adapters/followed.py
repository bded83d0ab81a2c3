"""Methods of a patched model's class by which the module that a method learns goes wherever the model goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tokred.adapters.contract import members
from tokred.adapters.host import State
from tokred.adapters.swap import SETTINGS


def followed(host: Any) -> dict[str, Any]:
    """The methods of ``host`` that change a model's mode, device or type, and the module's after it.

    What a method learns is no sub-module of the model, so it has to be taken along.
    """
    return {name: _followed(getattr(host, name)) for name in ("train", members.APPLY.name)}


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        shared: State | None = self.__dict__.get(SETTINGS)
        if shared is not None and shared.module is not None:
            getattr(shared.module, original.__name__)(*args, **kwargs)
        return out

    return method
