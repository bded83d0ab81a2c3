"""The stage ``attention``: fewer tokens around one sub-layer of a denoiser, and all of them again right after it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from tokred.method import Method
from tokred.selection import hash_uniform
from tokred.site import Lazy, Site, Stage

Part = Literal["tokens", "kv", "q", "heads"]
Sublayer = Literal["self", "cross", "mlp"]
Share = Literal["block", "resolution"]
Side = Literal["tokens", "queries", "keys"]


class Place(NamedTuple):
    """Where a sub-layer of a denoiser stands.

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
    """Which denoising step this is.

    Attributes:
        noise: level of the noise, from 1 at the start to 0 at the end: the timestep by the length of the training.
        number: steps of this image before it.
    """

    noise: float
    number: int


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
        q, k, v: ``(B, H, N, D)`` of the image's tokens, as the attention uses them, for methods with part ``"heads"``.
        side: which of them a method with part ``"heads"`` is asked to reduce, ``"queries"`` or ``"keys"``.
        count: steps of this image before this one.
        memory: what the method wants to find again at its next plan here; empty at the first step of an image.
        guidance: ``(B, N)`` float32, how much guidance changed each token in the step before, or None.
    """

    def __init__(
        self,
        x: Tensor | None,
        place: Place,
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


class AttentionMethod(Method):
    """Base of all methods of the stage ``attention``; subclasses are frozen dataclasses.

    What :meth:`reduce` answers is merged right before a sub-layer and undone right after it, so the residual stream
    keeps its length. It may read ``site.x``, ``site.grid``, ``site.place`` and :meth:`AttentionSite.uniform`. The
    frames of a clip are handed to it as samples of a batch, unless it reads ``"frames"``: then it gets the whole clip.

    Attributes:
        part: ``"tokens"``: the sub-layer runs on fewer tokens; ``"kv"``: queries stay, keys and values are reduced;
            ``"q"``: keys and values stay, queries are reduced, and what comes out is restored; ``"heads"``: queries,
            and keys with values, each by a plan of its own for every head (see :attr:`AttentionSite.side`), as the
            attention uses them, after norms and rotary embedding.
        share: ``"block"``: every block has a plan of its own; ``"resolution"``: blocks of one resolution share that of
            the first.
        refresh: a plan is kept for so many denoising steps.
        first_full: so many steps at the start of an image run as they are.
        near: it merges neighbours alone, so that keys may be averaged even where they are rotated by their places.
        remembers: it keeps something in :attr:`AttentionSite.memory`; compiled forwards forget it.
    """

    stage: ClassVar[Stage] = "attention"
    part: ClassVar[Part] = "tokens"
    near: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    share: Share = "block"
    refresh: int = 1
    first_full: int = 0

    @property
    def stepwise(self) -> bool:
        """Whether what it does depends on which step it is: known at the price of waiting for a device once a step, and
        not in compiled forwards."""
        return self.first_full > 0

    def at(self, step: Step | None) -> AttentionMethod | None:
        """What is in force at a step: the method, or another one; None: all sub-layers run as they are.

        Args:
            step: which one; None where steps are not counted: what is in force in most of them.
        """
        return None if step is not None and step.number < self.first_full else self

    def side(self, side: Side, place: Place) -> int:
        """Tokens of one side that remain, of ``place.length``; :meth:`left` unless part is ``"heads"``."""
        return self.left(place)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Around which sub-layers of a block the plan is used."""
        return ("self",)

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether the parameters say that nothing is ever reduced."""

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Unless it is idle; what is left depends on the resolution, so forwards say where they reduce nothing."""
        return not self.idle

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


def check_sharing(share: Any, refresh: Any, first_full: Any = 0) -> None:
    """Refuse values of ``share``, ``refresh`` and ``first_full`` that mean nothing.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if share not in ("block", "resolution"):
        raise ValueError(f"share is {share!r}; allowed are 'block', 'resolution'")
    check_count("refresh", refresh)
    check_count("first_full", first_full, least=0)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_ratio(ratio: Any, name: str = "ratio") -> None:
    """Refuse what is no share of tokens in ``[0, 1)``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise TypeError(f"{name} must be a number, got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {ratio}")


def removed(n: int, ratio: float) -> int:
    """``ratio * n`` tokens as a whole number; a half is rounded up."""
    return math.floor(round(n * ratio, 9) + 0.5)


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
