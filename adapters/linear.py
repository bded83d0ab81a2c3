"""Matrices of a host as it runs them: plain, quantised, packed, offloaded, sharded, or with adapters around them.

What a module multiplies by is told by its features in and out, and by calling it; never by the weight that it holds,
which may lie on another device, be packed to other shapes, or be only a part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.errors import UnsupportedModelError

# What quantisers call them.
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"))

# Rows of an identity that are fed at once.
_ROWS = 4096
# A power of two, so that in half precision the digits of small weights are not lost beside a bias.
_SCALE = 64.0


def features(module: Any) -> tuple[int, int] | None:
    """Features in and out of a module that multiplies by one matrix; None where it is no such module."""
    for names in _FEATURES:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(n, int) for n in found):
            return int(found[0]), int(found[1])  # type: ignore[arg-type]
    return None


def matrices(module: nn.Module, path: str = "") -> Iterator[tuple[str, int, int]]:
    """Dotted name, features in and features out of every matrix inside, each once.

    A wrapper of adapters (it has a ``base_layer``) runs the module that it wraps and the adapters beside it, as long as
    these are not merged into it.
    """
    yield from _matrices(module, path, set())


def _matrices(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    if id(module) in seen or isinstance(module, nn.Embedding):
        return
    seen.add(id(module))
    base = words.BENEATH.part(module)
    if isinstance(base, nn.Module):
        yield from _matrices(base, f"{path}.{words.BENEATH.name}" if path else words.BENEATH.name, seen)
        if words.MERGED.part(module, False):
            return
    elif (sizes := features(module)) is not None:
        yield (path, *sizes)
        return
    for name, p in module.named_parameters(recurse=False):
        if p.ndim == 2 and name.endswith("weight"):
            yield (f"{path}.{name}" if path else name), p.shape[1], p.shape[0]
    for name, child in module.named_children():
        yield from _matrices(child, f"{path}.{name}" if path else name, seen)


def macs(module: nn.Module) -> int:
    """Multiply-adds of every matrix inside, once."""
    return sum(wide * high for _, wide, high in matrices(module))


def linear(module: Any, x: Tensor) -> Tensor:
    """The product of ``x`` with the matrix of a module, without its bias."""
    if _plain(module):
        return F.linear(x, module.weight)
    y: Tensor = module(x)
    return y - constant(module, x)


def constant(module: Any, like: Tensor) -> Tensor:
    """``(out,)``: what a module of one matrix adds to everything, its bias; zeros where it has none."""
    if _plain(module) and module.bias is None:
        return like.new_zeros(module.out_features)
    if _plain(module):
        bias: Tensor = module.bias
        return bias
    nothing: Tensor = module(like.new_zeros(1, 1, like.shape[-1]))
    return nothing[0, 0]


@torch.no_grad()
def weight_of(module: nn.Module, width: int, like: Tensor) -> Tensor:
    """``[C, width]`` the matrix of a linear layer, without its bias.

    Args:
        module: anything linear.
        width: numbers that it takes.
        like: of the type and device of its inputs.
    """
    if _plain(module) and module.weight.device == like.device:
        return module.weight.detach()  # type: ignore[operator]
    # Under autocast the inputs are narrower than the weights, and a call takes them as wide as these.
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), like.dtype)
    eye = torch.eye(width, dtype=dtype, device=like.device) * _SCALE
    with _settled(module):
        bias = module(eye.new_zeros(1, width)).float()
        found = torch.cat([module(part).float() - bias for part in torch.split(eye, _ROWS)])
    return (found / _SCALE).to(like.device).T


def _plain(module: Any) -> bool:
    """True for a module whose call does nothing but multiply by a weight that is in place."""
    hooks = (members.HOOKS_AFTER.need(module), members.HOOKS_BEFORE.need(module))
    own = type(module) is nn.Linear and type(module.weight) in (Tensor, nn.Parameter) and "forward" not in vars(module)
    return own and not module.weight.is_meta and not any(hooks)


def check_there(tensor: Tensor | None, name: str) -> Tensor | None:
    """``tensor``, a parameter of the attention itself, which no call of an inner module brings onto a device.

    Raises:
        UnsupportedModelError: it is offloaded.
    """
    if tensor is not None and tensor.is_meta and not torch.compiler.is_compiling():
        raise UnsupportedModelError(
            f"{name} is offloaded and not at hand between forwards: take a method that reads no 'transform', or keep "
            "the attention on its device"
        )
    return tensor


@contextlib.contextmanager
def _settled(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode while open: adapters of weights have dropout, which would make every call differ."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def value_transform(attn: Any, normed: Tensor, v: Tensor, heads: int, *, per_head: bool = False) -> Tensor:
    """Value and output projections of each token alone, without their biases: ``(B, N, C)``, or ``(B, H, N, C)``.

    What stands between the two and acts on mixtures of tokens (a norm, a gate) is left out.

    Args:
        attn: an attention with an output projection ``proj``.
        normed: ``(B, N, C)`` its input.
        v: ``(B, Hk, N, D)``, the values that it used.
        heads: query heads ``H``.
        per_head: keep the part of each head apart; their sum is the whole.
    """
    projection, bias = members.LAST_OF_ATTENTION.need(attn), _value_bias(attn, normed)
    if bias is not None:
        v = v - bias.to(v.dtype).view(v.shape[1], 1, -1)
    if v.shape[1] != heads:
        v = v.repeat_interleave(heads // v.shape[1], 1)
    if not per_head:
        return linear(projection, v.transpose(1, 2).flatten(2))
    parts = []
    for head in range(heads):
        alone = torch.zeros_like(v)
        alone[:, head] = v[:, head]
        parts.append(linear(projection, alone.transpose(1, 2).flatten(2)))
    return torch.stack(parts, 1)


def _value_bias(attn: Any, normed: Tensor) -> Tensor | None:
    """The bias of the value projection ``(C,)``, wherever a host keeps it; None where it has none."""
    if words.VALUE.part(attn) is not None:
        return constant(words.VALUE.need(attn), normed)
    if words.VALUE_BIAS.part(attn) is not None:
        return check_there(words.VALUE_BIAS.need(attn), "the attention's v_bias")
    fused = words.TOGETHER.part(attn)
    return None if fused is None else constant(fused, normed).chunk(3)[2]
