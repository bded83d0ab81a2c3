"""RESTORE: the tokens that another method keeps, the others merged beside them, and attention to both set right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tokred.core.checks import check_choice, check_share
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import methods, register
from tokred.core.settings import parse_setting
from tokred.core.site import Site
from tokred.vlm.before_llm import Budgeted, ProjectorMethod, VisualSite
from tokred.vlm.frames import ClipMethod, cells_of
from tokred.vlm.shots import FrameMerger
from tokred.vlm.tools.anchors import Pool, Position, beside_slots, merged_into_anchors
from tokred.vlm.tools.budget import Budget

_KEEPING = "'divprune', 'fastervlm', 'visionzip contextual=0', 'vidcom2' and 'fastvid context=0'"


@register("restore")
@dataclass(frozen=True)
class Restore(Budgeted):
    """RESTORE, around a method that keeps tokens: part of the budget is its choice, the rest are merged tokens, and
    every layer of the language model attends to both as it would to all.

    Tokens that leave take two things with them: the mass that text gave to them, and, by their places, how near the
    others seem. ``log(s (c - D))`` is added to the logits of visual keys: ``s`` tokens in a merged one, and ``D`` the
    mean cosine by which the rotary embedding turns a key at its distance from the query.

    Args:
        base: the method that chooses, as text (``"visionzip contextual=0"``, ``"vidcom2"``); its budget is set here. It
            may merge some tokens, but must drop others: one that merges all goes with ``gamma=1`` alone. Around a
            method for clips images stay whole.
        budget: tokens left of each image or clip, an integer or a share in (0, 1]; more where the base's rules keep
            more (a token of each frame, a whole frame), fewer where it drops fewer than there would be merged ones.
        gamma: share of the budget that the base is asked for, rounded half up. The others are merged ones, and what the
            base leaves unused of its share goes to them too. 1: nothing is merged, as reading small text wants.
        c: offset of the calibration, more than 1.
        pool: whether anchors are scored among ``"all"`` tokens or the ``"rest"``.
        position: which member's position a merged token takes: ``"median"``, ``"first"``, ``"mean"`` (the member
            nearest to it) or ``"last"``.

    Source: Improving Visual Token Reduction via Rectifying Distortions, ICML 2026 (arXiv 2606.01711), from the paper.
    """

    summary: ClassVar[str] = "another method's tokens, the rest merged beside them, attention to both calibrated"
    source: ClassVar[str] = "ICML 2026 (arXiv 2606.01711)"
    example: ClassVar[Parameters] = {"base": "random_visual", "budget": 6}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 64
    base: str = "divprune"
    gamma: float = 0.5
    c: float = 2.0
    pool: Pool = "all"
    position: Position = "median"
    inner: ProjectorMethod = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.gamma, "gamma", zero=True)
        if isinstance(self.c, bool) or not isinstance(self.c, int | float) or not self.c > 1:
            raise ValueError(f"c must be more than 1, which no rotary embedding exceeds, got {self.c!r}")
        check_choice(self.pool, "pool", ("all", "rest"))
        check_choice(self.position, "position", ("median", "first", "mean", "last"))
        if self.positions != "keep":
            raise ValueError("positions is 'repack', but what is calibrated are distances in the whole prompt")
        object.__setattr__(self, "inner", _base(self.base))
        # Around a method for clips images stay whole, and hosts are to know what is a clip.
        object.__setattr__(self, "clips", isinstance(self.inner, ClipMethod))
        # The base's where it alone merges; anchors merge as they enter the language model.
        object.__setattr__(self, "space", self.inner.space if self.gamma == 1 else "x")
        if self.gamma < 1 and not self.inner.drops:
            raise ValueError(
                f"base is {self.base!r}, which drops nothing that could be merged into anchors, but merges some tokens "
                f"into others: take gamma=1, which calibrates attention to these, or {_KEEPING}"
            )

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, what the base reads, and that a bias can be added in the language model."""
        return self.inner.reads | {"x", "calibration"}

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return self.inner.tower_layers

    @property
    def calibration(self) -> float:
        """The offset; a host that finds it calibrates attention to what :meth:`choose` leaves."""
        return float(self.c)

    def split(self, total: int) -> tuple[int, int]:
        """How many of so many tokens the base chooses, and how many are merged ones."""
        chosen = int(round(self.gamma * total, 9) + 0.5)
        return chosen, total - chosen

    def choose(self, site: VisualSite) -> Reduction:
        """Ask the base, and merge the others into distinctive anchors."""
        b, n = site.shape
        total = self.count(n)
        chosen, anchors = self.split(total)
        if not chosen:
            none = torch.zeros(b, 0, dtype=torch.long, device=site.device)
            return merged_into_anchors(site.x, none, anchors, self.pool, self.position)
        step = self.asked(chosen, site).choose(site)
        if step.trivial or (step.slots == n and step.mask is None):
            return Reduction.identity((b,), n, site.device)
        return beside_slots(site.x, step, total, self.pool, self.position) if anchors else step

    def asked(self, count: int, site: VisualSite) -> ProjectorMethod:
        """The base, set to leave so many tokens of each image or clip of a site."""
        if isinstance(self.inner, ClipMethod):
            cells = cells_of(site)
            return self.inner.leaving(count, site.shape[1] // cells, cells)
        return self.inner.with_budget(count)

    def reduce(self, site: Site) -> Reduction:
        """Keep, and merge into, some of each image's tokens; around a method for clips images stay whole.

        Raises:
            ValueError, MissingInputError: as other methods, and what the base raises.
        """
        if isinstance(self.inner, ClipMethod) and site.frames is None:
            return Reduction.identity((site.shape[0],), site.shape[1], site.device)
        return super().reduce(site)


def _base(text: object) -> ProjectorMethod:
    """The method that a setting names.

    Raises:
        TypeError, ValueError, UnknownMethodError: it names none of the stage, or one whose tokens cannot be counted or
            are not chosen there.
    """
    if not isinstance(text, str):
        raise TypeError(f"base must be a setting as text, such as 'divprune' or 'fastervlm', got {text!r}")
    name, parameters = parse_setting(text)
    made = methods.get(name)(**parameters)
    if isinstance(made, FrameMerger):
        # What leaves there is a share of each frame's features, which no reduction of tokens speaks of.
        raise ValueError(
            f"base is {text!r}, which merges frames inside the vision tower, so that no lost tokens are left "
            f"to be merged behind it: take {_KEEPING}"
        )
    if isinstance(made, ClipMethod):
        try:
            made.leaving(8, 2, 8)
        except ValueError:
            raise ValueError(
                f"base is {text!r}, of which no setting says how many tokens of a clip it leaves, so that none can be "
                f"set: take {_KEEPING}"
            ) from None
        return made
    if not isinstance(made, Budgeted) or isinstance(made, Restore) or made.joint:
        raise ValueError(
            f"base is {text!r}, but it must be a method before the language model with a budget for each image or "
            f"clip: {_KEEPING} are"
        )
    return made
