"""``Parts``: the things a stream is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tokred.adapters.kv.front import Front
from tokred.adapters.kv.host import CacheHost
from tokred.adapters.vlm.host import VisualHost
from tokred.adapters.vlm.streams.families import Looks
from tokred.adapters.vlm.streams.tower import TowerReuse
from tokred.vlm.before_llm import ProjectorMethod


class Parts(NamedTuple):
    """The things a stream is made of; :func:`tokred.stream` puts them together.

    Attributes:
        host: the model with vision.
        cache_host: its language model.
        looks: how it takes frames.
        method: that leaves some tokens of each frame; None: all stay.
        policy: of the cache; None: every row stays as it came.
        tower: features that are used again; None: every frame goes through the whole tower.
        tokenizer: for questions as text; None: they come as ids.
        seconds: between two frames, for models that see time.
        free: raises if methods act on the model that a stream would pass by.
        front: moves the prompt up behind frames that have left; None: it stays where it is.
    """

    host: VisualHost
    cache_host: CacheHost
    looks: Looks
    method: ProjectorMethod | None
    policy: Any
    tower: TowerReuse | None
    tokenizer: Any
    seconds: float
    free: Callable[[], None]
    front: Front | None = None
