"""Policies for the KV caches of language models, one file each."""

from __future__ import annotations

import warnings
from typing import Any

from tokred.errors import MovedWarning


def __getattr__(name: str) -> Any:
    # In tokred 0.1 this was the module of one method.
    if name == "KVPolicy":
        from tokred.methods.kv.kv import KVPolicy

        warnings.warn("tokred.methods.kv.KVPolicy has moved to tokred.methods.kv.kv", MovedWarning, stacklevel=2)
        return KVPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
