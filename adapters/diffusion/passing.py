"""Functions other than attention, as a mode that watches attention lets them through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def passed(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of its arguments, as it would run were nobody watching.

    Under a mode compilers look inside of those methods of a tensor that are written in Python. Older ones cannot follow
    what stands in ``Tensor.unflatten``, by which processors divide heads; ``torch.unflatten`` gives the same.
    """
    return (torch.unflatten if func is Tensor.unflatten else func)(*args, **(kwargs or {}))
