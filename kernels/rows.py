"""Rows of a batched tensor as one flat table, and the indices into it: what the row operators' torch paths share.

``index_select`` on a flat table of rows copies whole rows; ``gather`` with an index expanded over the channels does the
same work an element at a time, ten times slower on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels import dispatch


class Rows(NamedTuple):
    """A tensor ``(*lead, N, C)`` seen as a table of rows.

    Row ``(i, ..., n)`` of the tensor is row ``i * steps[0] + ... + n * steps[-1]`` of ``table``.
    """

    table: Tensor
    steps: tuple[int, ...]


def contiguous_steps(lengths: Sequence[int]) -> tuple[int, ...]:
    """The steps of a contiguous tensor whose leading dimensions have these lengths."""
    steps = [1]
    for length in reversed(lengths[1:]):
        steps.append(steps[-1] * length)
    return tuple(reversed(steps))


def rows_of(x: Tensor) -> Rows:
    """``x`` of shape ``(*lead, N, C)`` as a table of rows, without a copy where strides allow it.

    Slices of a larger buffer, expanded batches and heads packed side by side are read where they lie. A gradient or
    a trace takes the plain way (``contiguous``), which autograd and the compiler know best.
    """
    channels = x.shape[-1]
    if not x.is_contiguous():
        plain = (
            dispatch.traced()
            or (x.requires_grad and torch.is_grad_enabled())
            or type(x) not in (Tensor, torch.nn.Parameter)
        )
        lead = x.stride()[:-1]
        if not plain and x.numel() > 0 and x.stride(-1) == 1 and all(stride % channels == 0 for stride in lead):
            last = sum((length - 1) * stride for length, stride in zip(x.shape[:-1], lead, strict=True))
            table = x.as_strided((last // channels + 1, channels), (channels, 1))
            return Rows(table, tuple(stride // channels for stride in lead))
        x = x.contiguous()
    return Rows(x.view(math.prod(x.shape[:-1]), channels), contiguous_steps(x.shape[:-1]))


def flat_index(index: Tensor, steps: Sequence[int], lead: Sequence[int] | None = None) -> Tensor:
    """Row numbers in a table of rows.

    Args:
        index: ``(*lead, K)`` int64, positions along the last row dimension; leading dimensions may be 1.
        steps: one step per dimension of ``index``, from :class:`Rows`.
        lead: the leading lengths to broadcast to; by default those of ``index``.

    Returns:
        ``(prod(lead) * K,)`` int64.
    """
    if lead is None and index.ndim == 2 and steps[1] == 1:
        return (index + offsets(index.shape[0], steps[0], index)).reshape(-1)
    lead = index.shape[:-1] if lead is None else lead
    flat = index if steps[-1] == 1 else index * steps[-1]
    for dim, length in enumerate(lead):
        if length == 1:
            continue
        shape = [1] * index.ndim
        shape[dim] = -1
        offset = torch.arange(length, device=index.device)
        flat = flat + (offset if steps[dim] == 1 else offset * steps[dim]).view(shape)
    return flat.reshape(-1)


@functools.lru_cache(maxsize=64)
def _offsets(batch: int, step: int) -> Tensor:
    with torch.inference_mode(False):
        return (torch.arange(batch) * step).unsqueeze(1)


def offsets(batch: int, step: int, like: Tensor) -> Tensor:
    """``(B, 1)`` int64: row numbers at which the samples of a flat table of ``B * step`` rows begin.

    Remembered on a CPU, where making them anew costs as much as what is done with them.
    """
    if like.device.type == "cpu" and type(like) is Tensor and not dispatch.traced():
        found = _offsets(batch, step)
        if type(found) is Tensor:
            return found
        _offsets.cache_clear()  # made under a mode that hands out stand-ins
    return (torch.arange(batch, device=like.device) * step).unsqueeze(1)


def check_index(name: str, index: Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """Refuse an index tensor of another type, device or shape; ``None`` in ``shape`` allows any length.

    Raises:
        TypeError: ``index`` is not an int64 tensor.
        ValueError: wrong shape or device.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        found = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {found}")
    check_shape(name, index, shape)
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}, the rows are on {device}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Refuse a tensor of another shape; ``None`` allows any length.

    Raises:
        ValueError: the shape differs.
    """
    if len(tensor.shape) == len(shape):
        for found, wanted in zip(tensor.shape, shape, strict=True):
            if wanted is not None and found != wanted:
                break
        else:
            return
    wanted_text = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted_text})")


def check_heads(name: str, x: Tensor, rows: Tensor, last: int, letter: str) -> None:
    """Refuse queries or weights that do not fit rows ``[B, Hk, ...]``.

    Args:
        name: of the argument.
        x: to be ``[B, Hk, G, last]``.
        rows: of ``B`` samples and ``Hk`` heads, whatever they are held in.
        last: length of the last dimension.
        letter: that dimension's, for the message.

    Raises:
        ValueError: the shape differs.
    """
    b, heads = rows.shape[:2]
    if x.ndim != 4 or x.shape[:2] != (b, heads) or x.shape[3] != last:
        raise ValueError(f"{name} must be [B, Hk, G, {letter}] = [{b}, {heads}, G, {last}], got {list(x.shape)}")


def check_range(name: str, index: Tensor, low: int, high: int) -> None:
    """In debug mode (``TOKRED_DEBUG=1``) refuse indices outside ``[low, high)``; else free of cost.

    Raises:
        ValueError: an index is out of range.
    """
    if dispatch.traced() or not dispatch.debug() or index.numel() == 0:
        return
    smallest, largest = (int(value) for value in torch.aminmax(index))
    if smallest < low or largest >= high:
        raise ValueError(f"{name} holds indices from {smallest} to {largest}, allowed are {low} to {high - 1}")
