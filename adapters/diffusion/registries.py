"""diffusers' own hooks (caches, offloading): what they know of a class by a registry, and where they skip forwards."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tokred.adapters.swap import host_class


def enter(module: nn.Module) -> None:
    """Let diffusers find under a patched module's class what it knows of the host's; where it knows nothing: nothing.

    Its caches ask by class what a block takes and returns. What they find names the class whose forward has these
    parameters: that stays the host's.
    """
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return  # no hooks, so none that ask
    host, registry = host_class(module), TransformerBlockRegistry
    if host is type(module):
        return
    try:
        known: Any = copy.copy(registry.get(host))
    except ValueError:
        return
    registry.register(type(module), known)
    known._cls = host


def repeats(module: nn.Module) -> bool:
    """Whether a cache of diffusers may answer with what the module gave in another step."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return any(getattr(hook, "_is_stateful", False) for hook in hooks.values())
