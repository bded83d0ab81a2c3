"""What a case of the kernel benchmarks is, and the random inputs it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]
Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]


class Draw:
    """Random inputs on a device.

    Attributes:
        device: where the tensors are made.
        dtype: of floating point inputs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values; drawn in float32 and rounded."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in ``[low, high)``."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def subset(self, lead: tuple[int, ...], n: int, k: int) -> Tensor:
        """``k`` of ``n`` numbers in ascending order, another set for every leading index: ``(*lead, k)`` int64."""
        keys = torch.rand(*lead, n, generator=self.generator, device=self.device)
        return keys.argsort(-1)[..., :k].sort(-1).values


@dataclass(frozen=True)
class Work:
    """The least that an operator has to do: bytes in and out, multiply-adds times two, exponentials."""

    bytes: float
    flops: float = 0.0
    exps: float = 0.0


def _as_they_are(inputs: Inputs, outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Case:
    """One operator with one set of options.

    Attributes:
        name: what tables call it.
        make: random inputs for given sizes.
        ours: the operator; returns a tuple of tensors.
        chain: the same result from plain torch operations, the way published code computes it. In float64 it is the
            reference of ``ours``.
        tiny: sizes for a run in Triton's interpreter.
        work: the least work for given sizes.
        values: what is compared: from the float64 inputs and the outputs. Indices are replaced by the similarities that
            they lead to, for two rows may be equally close within rounding.
        by_sample: whether the reference is computed one sample at a time, because its matrices are large.
    """

    name: str
    make: Callable[[Sizes, Draw], Inputs]
    ours: Run
    chain: Run
    tiny: Sizes
    work: Callable[[Sizes], Work] | None = None
    values: Callable[[Inputs, Outputs], Outputs] = _as_they_are
    by_sample: bool = False

    def reference(self, inputs: Inputs) -> tuple[Inputs, Outputs]:
        """The inputs in float64, and the chain's outputs for them."""
        wide = {name: _wide(value) for name, value in inputs.items()}
        if not self.by_sample:
            return wide, tuple(self.chain(wide))
        tensors = {name: value for name, value in wide.items() if isinstance(value, Tensor)}
        batch = next(iter(tensors.values())).shape[0]
        pieces = [self.chain({**wide, **{name: t[i : i + 1] for name, t in tensors.items()}}) for i in range(batch)]
        return wide, tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def bytes_of(inputs: Inputs) -> int:
    """Bytes of all tensors among the inputs."""
    return sum(t.numel() * t.element_size() for t in inputs.values() if isinstance(t, Tensor))


def size_text(sizes: Sizes) -> str:
    """``B=256 N=197 C=64``."""
    return " ".join(f"{name}={value}" for name, value in sizes.items())
