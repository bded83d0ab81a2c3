"""The stage ``attention``: fewer tokens around one sub-layer of a denoiser, and all of them again right after it."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from tokred.method import Method
from tokred.selection import hash_uniform
from tokred.site import Site, Stage

Part = Literal["tokens", "kv"]
Sublayer = Literal["self", "cross", "mlp"]
Share = Literal["block", "resolution"]


class Place(NamedTuple):
    """Where a sub-layer of a denoiser stands.

    Attributes:
        length: ``N``, tokens of the image there.
        grid: ``(h, w)`` in which they stand; ``h * w == N``.
        factor: ``d``, how much coarser the grid is than the sample that the denoiser was given.
    """

    length: int
    grid: tuple[int, int]
    factor: int


def place_of(length: int, size: tuple[int, int]) -> Place:
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
            return Place(length, grid, factor)
    raise ValueError(f"{length} tokens form no grid of a sample of {high} x {wide}")


class AttentionSite(Site):
    """One sub-layer of a denoiser.

    Args:
        x: ``(B, N, C)`` the block's input, before any norm.
        place: where it stands.
        layer, depth: which block this is, of how many; where a plan is shared by a resolution, its first block.
        step: key of the denoising step: any integer, or an integer tensor of no dimension on the device of ``x``.
    """

    def __init__(self, x: Tensor, place: Place, *, layer: int = 0, depth: int = 1, step: int | Tensor = 0) -> None:
        super().__init__(x=x, grid=place.grid, layer=layer, depth=depth)
        self.place = place
        self.key = step

    def uniform(self, n: int, seed: int) -> Tensor:
        """``(n,)`` numbers in [0, 1), the same at every call with this seed, step and block."""
        return hash_uniform(n, seed, self.layer, cast(int, self.key), device=self.device)


class AttentionMethod(Method):
    """Base of all methods of the stage ``attention``; subclasses are frozen dataclasses.

    What :meth:`reduce` answers is merged right before a sub-layer and undone right after it, so the residual stream
    keeps its length. It may read ``site.x``, ``site.grid``, ``site.place`` and :meth:`AttentionSite.uniform`.

    Attributes:
        part: ``"tokens"``: the sub-layer runs on fewer tokens; ``"kv"``: queries stay, keys and values are reduced.
        share: ``"block"``: every block has a plan of its own; ``"resolution"``: blocks of one resolution share that of
            the first.
        refresh: a plan is kept for so many denoising steps.
    """

    stage: ClassVar[Stage] = "attention"
    part: ClassVar[Part] = "tokens"
    share: Share = "block"
    refresh: int = 1

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Around which sub-layers of a block the plan is used."""
        return ("self",)

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether the parameters say that nothing is ever reduced."""

    @abstractmethod
    def left(self, place: Place) -> int:
        """Tokens (or keys) that remain of ``place.length``; as many: the host's own sub-layer runs.

        Raises:
            ValueError: the parameters do not fit the grid.
        """

    @property
    def advice(self) -> str:
        """What to change where a denoiser has no place at which anything is reduced."""
        return ""

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """All: what is merged before a sub-layer is undone right after it."""
        return n

    def site(self, site: Site) -> AttentionSite:
        """``site`` as one of a denoiser.

        Raises:
            TypeError: it is another stage's.
        """
        if not isinstance(site, AttentionSite):
            raise TypeError(f"{self.name!r} needs a tokred.AttentionSite, got {type(site).__name__}")
        return site


def check_sharing(share: Any, refresh: Any) -> None:
    """Refuse values of ``share`` and ``refresh`` that mean nothing.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if share not in ("block", "resolution"):
        raise ValueError(f"share is {share!r}; allowed are 'block', 'resolution'")
    check_count("refresh", refresh)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no positive integer.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_ratio(ratio: Any) -> None:
    """Refuse what is no share of tokens in ``[0, 1)``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")


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
