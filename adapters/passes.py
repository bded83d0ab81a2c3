"""Which pass is running: a forward, or a checkpoint's recomputation of one while gradients are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.adapters.contract import backward_pass


def in_backward() -> bool:
    """True while autograd is running (a checkpoint's recomputation)."""
    return backward_pass() != -1


def recomputed() -> bool:
    """The same, and False while a graph is traced, which cannot ask."""
    return not torch.compiler.is_compiling() and in_backward()


def pointer(x: Tensor) -> int:
    """Address of the tensor's values, 0 where it has no storage (fake and functional tensors)."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0
