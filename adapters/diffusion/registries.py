"""Registries of diffusers: what its caches know of a class of blocks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tokred.adapters.contract import find_object, members
from tokred.adapters.swap import host_class


def enter(module: nn.Module) -> None:
    """Let diffusers find under a patched module's class what it knows of the host's; where it knows nothing: nothing.

    Its caches ask by class what a block takes and returns. What they find names the class whose forward has these
    parameters: that stays the host's.
    """
    host, registry = host_class(module), find_object("blocks that caches of features know")
    if registry is None or host is type(module):
        return  # no caches, so none that ask
    try:
        known: Any = copy.copy(registry.get(host))
    except ValueError:
        return
    members.REGISTER.need(registry)(type(module), known)
    members.KNOWN_CLASS.set(known, host)
