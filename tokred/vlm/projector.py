"""What methods between a vision tower and a language model share: their stage, and counts per image."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from tokred.method import Method
from tokred.reduction import Reduction
from tokred.schedules import check_choice
from tokred.site import Site, Stage
from tokred.vlm.budget import Budget, as_budget, count_of
from tokred.vlm.site import VisualSite

Space = Literal["x", "tower"]

# Settings that let a method run where the tower has no class token, or does not hand its features over.
_LESS = {"attention": "received", "space": "x", "relevance": "none"}


@dataclass(frozen=True)
class ProjectorMethod(Method):
    """Base of methods at the stage ``projector``.

    A subclass says how many of ``n`` tokens stay (:meth:`count`) and which (:meth:`choose`).

    Args:
        positions: ``"keep"``: tokens keep the positions that they had in the whole prompt; ``"repack"``: those that are
            left are counted anew, where a host's positions are plain numbers. A keyword of every method.

    Attributes:
        space: the features that are merged: ``"x"``, as they enter the language model, or ``"tower"``: before the
            projector, which then runs on the merged ones, where the host can do that.
        tower_layers: layers of the tower whose attention :meth:`choose` reads beside that of the features' layer.
        joint: whether one budget is shared by all tiles of an image, where a host cuts images into tiles.
    """

    stage: ClassVar[Stage] = "projector"
    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    space = "x"

    positions: Literal["keep", "repack"] = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, ("keep", "repack"))

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """0-based; negative ones count from the end."""
        return ()

    @abstractmethod
    def count(self, n: int) -> int:
        """How many of ``n`` tokens stay; at most so many where it depends on the image.

        Raises:
            ValueError: less than one.
        """

    @abstractmethod
    def choose(self, site: VisualSite) -> Reduction:
        """Decide; called where something is to be decided, and no gradient is recorded."""

    def with_budget(self, n: int) -> ProjectorMethod:
        """The same method that leaves ``n`` tokens of an image.

        Raises:
            ValueError: it has no budget to set.
        """
        if not any(f.name == "budget" for f in dataclasses.fields(self)):
            raise ValueError(f"{self.name!r} has no budget that could be set for each image")
        changes: dict[str, Any] = {"budget": n}
        return dataclasses.replace(self, **changes)

    def variants(self) -> Iterator[tuple[str, ProjectorMethod]]:
        """The same method with settings that read less, for hosts that supply less: in words, and made."""
        known = {f.name for f in dataclasses.fields(self)}
        less = {k: v for k, v in _LESS.items() if k in known and getattr(self, k) != v}
        for count in range(1, len(less) + 1):
            for names in itertools.combinations(less, count):
                words = ", ".join(f"{k}={less[k]!r}" for k in names)
                changes: dict[str, Any] = {k: less[k] for k in names}
                yield words, dataclasses.replace(self, **changes)

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """Protected tokens and :meth:`count` of the others."""
        free = n - prefix - suffix
        return n - free + min(free, self.count(free)) if free > 0 else n

    def reduce(self, site: Site) -> Reduction:
        """Keep, or merge into, some of each image's tokens.

        Raises:
            ValueError: the images of the site are padded, or the budget is less than one token.
            MissingInputError: the site lacks something that the method reads.
        """
        (b, n), place = site.shape, {"layer": site.layer, "depth": site.depth}
        if site.mask is not None:
            raise ValueError("a site of the stage 'projector' has images of one length and no padding")
        if not isinstance(site, VisualSite):
            raise TypeError(f"{self.name!r} acts on a VisualSite, got {type(site).__name__}")
        if n == 0 or not self.acts(n, **place):
            return Reduction.identity((b,), n, site.device)
        with torch.no_grad(), torch.autocast(site.device.type, enabled=False):
            return self.choose(site)


@dataclass(frozen=True)
class Budgeted(ProjectorMethod):
    """Base of methods that keep a fixed number or share of each image's tokens, named ``budget``."""

    budget: Budget = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)
