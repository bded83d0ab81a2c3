"""Private names of torch by which a function transform is known."""

from __future__ import annotations

import torch
from torch import Tensor


def mapped(x: Tensor) -> bool:
    """True for one sample of a batch over which ``torch.func.vmap`` runs a function, under whatever other transforms.

    Args:
        x: of any shape.
    """
    own = getattr(torch._C, "_functorch", None)
    if own is None or own.peek_interpreter_stack() is None:
        return False
    while own.is_functorch_wrapped_tensor(x):
        if own.is_batchedtensor(x):
            return True
        x = own.get_unwrapped(x)
    return False
