"""StreamingTOM's memory: the rows of each frame in four bits, and those frames are attended to that a query is near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("streamingtom_cache")
@dataclass(frozen=True)
class StreamingTOMCache(Keeping):
    """Online quantised memory: groups of rows in four bits, of which queries attend to the nearest.

    The first stage, fewer tokens of each frame, is ``"streamingtom"``; :func:`tokred.stream` runs both.

    Args:
        groups: that are attended to.
        group: rows of one; None: all rows of a forward of several tokens, or in a stream of every frame.
        sinks: first rows, which are in no group, never rounded and always attended to.
        most: groups that are held; the oldest leaves when there are more. None: all.

    Source: StreamingTOM, CVPR 2026 (arXiv 2510.18269); written from its description.
    """

    summary: ClassVar[str] = "frames in four bits; queries attend to those they are near"
    source: ClassVar[str] = "StreamingTOM, CVPR 2026 (arXiv 2510.18269)"
    example: ClassVar[Parameters] = {"groups": 2, "group": 3, "sinks": 1}
    form = stores.Grouped

    groups: int = 250
    group: int | None = None
    sinks: int = 0
    most: int | None = None
