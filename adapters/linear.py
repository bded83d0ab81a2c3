"""What a linear layer does to its input, found by calling it.

A weight that is read may be packed into four bits, lie on no device while its module is offloaded, or be a part of what
the layer does (adapters beside it). A call is right for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Rows of an identity that are fed at once.
_ROWS = 4096
# A power of two, so that in half precision the digits of small weights are not lost beside a bias.
_SCALE = 64.0


@torch.no_grad()
def weight_of(module: nn.Module, width: int, like: Tensor) -> Tensor:
    """``[C, width]`` the matrix of a linear layer, without its bias.

    Args:
        module: anything linear.
        width: numbers that it takes.
        like: of the type and device of its inputs.
    """
    if _plain(module, like):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.detach()
    # Under autocast the inputs are narrower than the weights, and a call takes them as wide as these.
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), like.dtype)
    eye = torch.eye(width, dtype=dtype, device=like.device) * _SCALE
    with _settled(module):
        bias = module(eye.new_zeros(1, width)).float()
        found = torch.cat([module(part).float() - bias for part in torch.split(eye, _ROWS)])
    return (found / _SCALE).to(like.device).T


def _plain(module: nn.Module, like: Tensor) -> bool:
    """Whether it is a linear layer of torch as it was made, so that its weight says everything."""
    weight = getattr(module, "weight", None)
    own = type(module) is nn.Linear and type(weight) in (Tensor, nn.Parameter) and "forward" not in module.__dict__
    hooked = bool(module._forward_pre_hooks or module._forward_hooks)
    return own and not hooked and weight.device == like.device and weight.is_floating_point()  # type: ignore[union-attr]


@contextlib.contextmanager
def _settled(module: nn.Module) -> Iterator[None]:
    """Without dropout, as adapters have it."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
