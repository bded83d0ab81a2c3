"""Offloading: every row stays as it came, in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("offloaded")
@dataclass(frozen=True)
class Offloaded(Keeping):
    """Nothing is evicted or rounded: rows wait in host memory, and come to the device when their layer is about to run.

    Args:
        block: rows of new tokens that wait on the device until they are moved together.
        prefetch: whether the next layer's rows set off before it runs.
    """

    summary: ClassVar[str] = "all rows, in host memory until their layer runs"
    source: ClassVar[str] = "as the offloaded cache of transformers"
    example: ClassVar[Parameters] = {"block": 4}
    form = stores.Offloaded

    block: int = 64
    prefetch: bool = True
