"""Keys of a block's sub-module as a forward hook notes them, before a host turns or mixes them."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from tokred.adapters.swap import Hook


def split_heads(t: Tensor, heads: int) -> Tensor:
    """``(B, N, H * D)`` to ``(B, H, N, D)``."""
    return t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)


class _Noted(threading.local):
    """Keys of the forward that this thread runs: another may be between the same two hooks."""

    value: Tensor | None = None


class KeyTap(Hook):
    """Forward hook that notes a sub-module's output: keys after their norm, before rotary embedding.

    A plain object rather than a closure, so that patched models pickle and copy; the noted tensor never travels along.

    Args:
        heads: split an output of ``(B, N, H * D)`` into ``(B, H, N, D)``; None where it has heads already.
    """

    def __init__(self, heads: int | None = None) -> None:
        self.heads = heads
        self._noted = _Noted()

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.put(output if self.heads is None else split_heads(output, self.heads))

    def put(self, keys: Tensor) -> None:
        """Notes keys ``(B, H, N, D)`` for whoever takes them next in this thread."""
        self._noted.value = keys

    def take(self) -> Tensor | None:
        """The noted keys; None when they have been taken already."""
        value, self._noted.value = self._noted.value, None
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"heads": self.heads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["heads"])  # type: ignore[misc]
