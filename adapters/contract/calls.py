"""Calls of a host's forward: what they ask for, where more than one name says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokred.adapters.contract import words


def makes_cache(module: nn.Module, given: Mapping[str, Any], config: Any) -> bool:
    """True if a forward that was given no cache makes one of its own.

    Args:
        module: whose forward it is.
        given: its arguments by name.
        config: of the decoder, which decides where the arguments do not.
    """
    use = words.CACHED.of(given)
    use = words.CACHED.part(config, True) if use is None else use
    return bool(use) and not (module.training and words.CHECKPOINTS.part(module, False))
