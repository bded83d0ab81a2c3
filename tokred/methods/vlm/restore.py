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
from tokred.vlm.before_llm import Budgeted, ProjectorMethod, VisualSite
from tokred.vlm.tools.anchors import Pool, Position, merged_into_anchors
from tokred.vlm.tools.budget import Budget


@register("restore")
@dataclass(frozen=True)
class Restore(Budgeted):
    """RESTORE, around a method that keeps tokens: part of the budget is its choice, the rest are merged tokens, and
    every layer of the language model attends to both as it would to all.

    Tokens that leave take two things with them: the mass that text gave to them, and, by their places, how near the
    others seem. ``log(s (c - D))`` is added to the logits of visual keys: ``s`` tokens in a merged one, and ``D`` the
    mean cosine by which the rotary embedding turns a key at its distance from the query.

    Args:
        base: the method that chooses, as text (``"visionzip contextual=0"``); its budget is set here. It must keep
            tokens as they are, a fixed number of each image.
        budget: tokens left of each image, an integer or a share in (0, 1].
        gamma: share of the budget that is the base's, rounded half up; the others are merged. 1: nothing is merged, as
            reading small text wants.
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
        chosen, anchors = self.split(self.count(n))
        kept = torch.zeros(b, 0, dtype=torch.long, device=site.device)
        if chosen:
            step = self.inner.with_budget(chosen).choose(site)
            if step.mode != "keep" or step.mask is not None or step.slots != chosen:
                how = "merges some" if step.mode != "keep" else f"leaves {step.slots} of {chosen}, or uneven numbers"
                raise ValueError(
                    f"base is {self.base!r}, which has to keep tokens as they are, so many in each image, but {how}: "
                    "take one such as 'divprune', 'fastervlm' or 'visionzip contextual=0'"
                )
            kept = step.representative
        return merged_into_anchors(site.x, kept, anchors, self.pool, self.position)


def _base(text: object) -> ProjectorMethod:
    """The method that a setting names.

    Raises:
        TypeError, ValueError, UnknownMethodError: it names none of the stage, or one without a fixed budget.
    """
    if not isinstance(text, str):
        raise TypeError(f"base must be a setting as text, such as 'divprune' or 'fastervlm', got {text!r}")
    name, parameters = parse_setting(text)
    made = methods.get(name)(**parameters)
    if not isinstance(made, Budgeted) or isinstance(made, Restore) or made.joint:
        raise ValueError(
            f"base is {text!r}, but it must be a method before the language model with a budget for each image: "
            "'divprune', 'fastervlm' and 'visionzip contextual=0' are"
        )
    return made
