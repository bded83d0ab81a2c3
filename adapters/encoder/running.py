"""State of the forward of an encoder that one thread runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.passes import in_backward, pointer

if TYPE_CHECKING:
    from tokred.adapters.encoder.state import TokenState


class LayerRecord(NamedTuple):
    """Tokens that entered and left a block in the last forward, and the state behind it."""

    tokens_in: int
    tokens_out: int
    state: TokenState


class Slot(NamedTuple):
    """The state of a tensor between two blocks, by which it is found where the tensor came without one."""

    pointer: int
    shape: torch.Size
    state: TokenState


class Running(threading.local):
    """Fields of each thread: several may use one model.

    Attributes:
        expose_all: every block returns full length.
        final: state behind the block that ran last, while intermediate features are asked for.
        slots: by the block that they enter.
    """

    def __init__(self) -> None:
        self.expose_all = False
        self.final: TokenState | None = None
        self.slots: dict[int, Slot] = {}


class Slots:
    """The slots of all threads. A thread of autograd ran no forward: a checkpoint there finds those of the last one."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.last: dict[int, Slot] = {}

    def keep(self, layer: int, x: Tensor, state: TokenState) -> None:
        """Note the state of ``x``, which enters block ``layer``."""
        self.running.slots[layer] = self.last[layer] = Slot(pointer(x), x.shape, state)

    def again(self, layer: int, x: Tensor) -> TokenState | None:
        """The state of ``x`` in a checkpoint's recomputation; None elsewhere, and where it is not known."""
        if not in_backward():
            return None
        address = pointer(x)
        found = (self.running.slots.get(layer), self.last.get(layer))
        return next((s.state for s in found if s is not None and s.pointer == address and s.shape == x.shape), None)

    def find(self, layer: int, x: Tensor) -> TokenState | None:
        """The state of ``x``, or of a copy of it, in this thread; None where it is not known."""
        if in_backward():
            return self.again(layer, x)
        slot = self.running.slots.get(layer)
        return slot.state if slot is not None and slot.shape == x.shape else None
