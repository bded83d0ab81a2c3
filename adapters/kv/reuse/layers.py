"""Caches of a model without a policy, and where the layers of any cache are."""

from __future__ import annotations

from typing import Any

import torch

from tokred.adapters.contract import host_object, words
from tokred.adapters.kv.host import CacheHost


def plain_cache(config: Any) -> Any:
    """An empty cache of transformers, with layers of the kinds that the configuration names."""
    return host_object("cache of rows that grow")(**{words.CONFIG.name: config})


def check_plain(cache: Any) -> None:
    """Refuse what is no cache of rows that grow.

    Raises:
        TypeError: naming what it is.
    """
    wanted = host_object("cache of rows that grow")
    if type(cache) is not wanted or words.OFFLOADS.part(cache, False):
        more = " that offloads its layers" if words.OFFLOADS.part(cache, False) else ""
        raise TypeError(f"cache must be a {wanted.__name__}, got a {type(cache).__name__}{more}")


def devices(host: CacheHost) -> list[torch.device]:
    """The device of each layer of a cache: that of its attention; of layers without rows, that of the one before."""
    found: list[torch.device] = []
    here = _device_of(next(iter(host.attentions.values()))[1])
    for i in range(len(host.attentions) + host.states):
        here = _device_of(host.attentions[i][1]) if i in host.attentions else here
        found.append(here)
    return found


def _device_of(module: Any) -> torch.device:
    """Where the rows of an attention belong."""
    # Weights that are brought in for each forward stand on ``meta``, and are computed with on the first real device.
    there: list[torch.device] = [p.device for p in module.parameters() if not p.is_meta]
    if there:
        return there[0]
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
