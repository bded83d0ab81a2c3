"""Which pass is running: a forward, or a checkpoint's recomputation of one while gradients are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tokred.adapters.contract import backward_pass
from tokred.errors import UnsupportedModelError
from tokred.kernels.dispatch import mapped


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


def outliving() -> contextlib.AbstractContextManager[None]:
    """A context for what is kept from one forward to the next: in inference mode it makes ordinary tensors, through
    which a later forward may have gradients. A view of an inference tensor stays one."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return _ordinary()


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode alone would turn gradients on
        yield


def check_not_mapped() -> None:
    """Refuse ``torch.func.vmap`` over a patched model whose choice of tokens, or what it keeps, depends on values.

    Raises:
        UnsupportedModelError: the model runs inside of it.
    """
    if not torch.compiler.is_compiling() and mapped():
        raise UnsupportedModelError(
            "torch.func.vmap runs over a patched model, whose choice of tokens depends on values that vmap hides: give "
            "the samples as one batch, or take them one by one in a loop, as torch.func.grad does for gradients of "
            "single samples; or call tokred.remove(model) first"
        )
