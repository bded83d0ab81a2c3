"""The base of methods around the sub-layers of denoisers, and the checks of their parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from tokred.core.checks import check_choice, check_count
from tokred.core.method import Method, Parameters
from tokred.core.site import Site, Stage
from tokred.diffusion.site import AttentionSite, Part, Share, Side, Step, Sublayer, SublayerPlace


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
        near: keys are merged with their neighbours alone, which may be averaged even after they were rotated by their
            places.
        remembers: it keeps something in :attr:`AttentionSite.memory`; compiled forwards forget it.
    """

    stage: ClassVar[Stage] = "attention"
    part: ClassVar[Part] = "tokens"
    near: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}
    share: Share = "block"
    refresh: int = 1
    first_full: int = 0

    @property
    def proportional(self) -> bool:
        """True if attention adds the log of each token's size (proportional attention)."""
        return False

    @property
    def stepwise(self) -> bool:
        """True if the method has to be told which step it is: this waits for a device once a step, and cannot be had in
        compiled forwards."""
        return self.first_full > 0

    def at(self, step: Step | None) -> AttentionMethod | None:
        """The method in force at a step: this one, or another; None: all sub-layers run as they are.

        Args:
            step: which one; None where steps are not counted, which asks for the method of most of them.
        """
        return None if step is not None and step.number < self.first_full else self

    def side(self, side: Side, place: SublayerPlace) -> int:
        """Tokens of one side that remain, of ``place.length``; :meth:`left` unless part is ``"heads"``."""
        return self.left(place)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Around which sub-layers of a block the plan is used."""
        return ("self",)

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True if the parameters say that nothing is ever reduced."""

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Unless it is idle; what is left depends on the resolution, so forwards say where they reduce nothing."""
        return not self.idle

    @abstractmethod
    def left(self, place: SublayerPlace) -> int:
        """Tokens (or keys) that remain of ``place.length``; as many: the host's own sub-layer runs.

        Raises:
            ValueError: the parameters do not fit the grid.
        """

    @property
    def advice(self) -> str:
        """Advice for a denoiser in which no place is reduced: the parameter to change."""
        return ""

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
        ValueError: naming the argument.
    """
    check_choice(share, "share", ("block", "resolution"))
    check_count(refresh, "refresh", 1)
    check_count(first_full, "first_full", 0)


def removed(n: int, ratio: float) -> int:
    """``ratio * n`` tokens as a whole number; a half is rounded up."""
    return math.floor(round(n * ratio, 9) + 0.5)
