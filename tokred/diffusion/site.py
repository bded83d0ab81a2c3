"""The stage ``attention``: fewer tokens around one sub-layer of a denoiser, and all of them again right after it."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from tokred.core.selection import hash_uniform
from tokred.core.site import Lazy, Site

Part = Literal["tokens", "kv", "q", "heads"]
Sublayer = Literal["self", "cross", "mlp"]
Share = Literal["block", "resolution"]
Side = Literal["tokens", "queries", "keys"]


class SublayerPlace(NamedTuple):
    """Place of a sub-layer in a denoiser.

    Attributes:
        length: ``N``, tokens of the image there.
        grid: ``(h, w)`` in which they stand; ``frames * h * w == N``.
        factor: ``d``, how much coarser the grid is than the sample that the denoiser was given.
        frames: grids that stand one after another, where the sample is a clip.
    """

    length: int
    grid: tuple[int, int]
    factor: int
    frames: int = 1


class Step(NamedTuple):
    """One denoising step among all.

    Attributes:
        noise: level of the noise, from 1 at the start to 0 at the end: the timestep by the length of the training.
        number: steps of this image before it.
    """

    noise: float
    number: int


def place_of(length: int, size: tuple[int, int]) -> SublayerPlace:
    """The place of a sub-layer of ``length`` tokens in a denoiser whose sample has ``size`` rows and columns.

    Raises:
        ValueError: the tokens form no grid of the sample.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023, their code; the check, and the
        search where their formula misses, are ours.
    """
    high, wide = size
    usual = math.isqrt(max(high * wide // max(length, 1) - 1, 0)) + 1  # the root, rounded up
    for factor in (usual, *range(1, max(high, wide) + 1)):
        grid = (-(-high // factor), -(-wide // factor))
        if grid[0] * grid[1] == length:
            return SublayerPlace(length, grid, factor)
    raise ValueError(f"{length} tokens form no grid of a sample of {high} x {wide}")


class AttentionSite(Site):
    """One sub-layer of a denoiser.

    Args:
        x: ``(B, N, C)`` the block's input, before any norm.
        place: where it stands.
        layer, depth: which block this is, of how many; where a plan is shared by a resolution, its first block.
        step: key of the denoising step: any integer, or an integer tensor of no dimension on the device of ``x``.
        q, k, v: ``(B, H, N, D)`` of the image's tokens, as the attention uses them, for methods with part ``"heads"``.
        side: which of them a method with part ``"heads"`` is asked to reduce, ``"queries"`` or ``"keys"``.
        count: steps of this image before this one.
        memory: what the method wants to find again at its next plan here; empty at the first step of an image.
        guidance: ``(B, N)`` float32, how much guidance changed each token in the step before, or None.
    """

    def __init__(
        self,
        x: Tensor | None,
        place: SublayerPlace,
        *,
        layer: int = 0,
        depth: int = 1,
        step: int | Tensor = 0,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        side: Side = "tokens",
        count: int = 0,
        memory: dict[str, Any] | None = None,
        guidance: Lazy = None,
    ) -> None:
        super().__init__(x=x, q=q, k=k, v=v, grid=place.grid, frames=place.frames, layer=layer, depth=depth)
        self._values["guidance"] = guidance
        self.place = place
        self.key = step
        self.side = side
        self.count = count
        self.memory: dict[str, Any] = {} if memory is None else memory

    @property
    def guidance(self) -> Tensor:
        """``(B, N)`` float32: size of the difference that guidance made to each token in the step before.

        Raises:
            MissingInputError: the denoiser ran without guidance.
        """
        return self._get("guidance")

    def uniform(self, n: int, seed: int) -> Tensor:
        """``(n,)`` numbers in [0, 1), the same at every call with this seed, step and block."""
        return hash_uniform(n, seed, self.layer, cast(int, self.key), device=self.device)


def step_key(timestep: Any) -> int | Tensor:
    """A key of the denoising step: the bits of its timestep, as an integer, without waiting for a device.

    Args:
        timestep: a number, or a tensor of any shape, of which the first value counts.
    """
    if timestep is None:
        return 0
    if isinstance(timestep, Tensor):
        first = timestep.detach().reshape(-1)[:1].to(torch.float32)
        return first.view(torch.int32).to(torch.int64)[0]
    return int(torch.tensor(float(timestep), dtype=torch.float32).view(torch.int32))
