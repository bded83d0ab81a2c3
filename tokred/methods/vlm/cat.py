"""CAT: a budget for each image by what there is to see in it, for any method that has a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokred.core.checks import check_choice, check_count, is_count
from tokred.core.method import Method, Parameters, from_dict
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import methods, register
from tokred.vlm.before_llm import ProjectorMethod, VisualSite
from tokred.vlm.tools.budget import Budget, as_budget, count_of, shared_out
from tokred.vlm.tools.complexity import SCORES, calibrated
from tokred.vlm.tools.samples import part_of, stacked


@register("cat")
@dataclass(frozen=True)
class CAT(ProjectorMethod):
    """Content-adaptive budgets: another method, told for each image how many tokens to leave.

    CAT itself is a learned tokenizer whose complexity comes from captions and a language model; what is here is its
    idea as a policy (our reading): no published figure speaks for it.

    Args:
        selector: a method of the stage ``projector`` with a ``budget``, or its name; the budget it has is not used.
        score: how complex an image is: ``"redundancy"``, ``"features"`` (effective rank), ``"attention"`` or
            ``"received"`` (entropy), ``"outliers"``, ``"pixels"``, see :mod:`tokred.vlm.tools.complexity`; or a
            function from the site to ``(B,)`` numbers in [0, 1], which settings cannot be written down with.
        policy: ``"linear"``: from ``n_min`` to ``n_max`` in proportion to the score; ``"levels"``: a quarter of
            ``base`` below the first threshold, ``base`` below the second, else all; ``"pool"``: ``total`` tokens for
            all images of a sample that have one shape together, shared out in proportion to their scores.
        n_min, n_max: bounds on the tokens of an image; None: all of them.
        base: of ``"levels"``, an integer or a share of the image's tokens.
        thresholds: of ``"levels"``.
        total: of ``"pool"``, an integer or a share of the tokens of the sample's images.
        calibration: scores of other images, which are mapped to even steps between 0 and 1; None: scores as they are.
        round_to: budgets are rounded up to a multiple.

    Source: after Shen et al., CAT: Content-Adaptive Image Tokenization, NeurIPS 2025; scores and policies are ours.
    """

    summary: ClassVar[str] = "a budget for each image by what there is to see in it, for other methods"
    source: ClassVar[str] = "after Shen et al., NeurIPS 2025 (arXiv 2501.03120); policies are ours"
    example: ClassVar[Parameters] = {"selector": "fastervlm", "n_min": 2, "n_max": 9}
    nothing: ClassVar[Parameters | None] = {"n_min": 1 << 20}

    selector: ProjectorMethod | str = "divprune"
    score: str | Callable[[VisualSite], Tensor] = "redundancy"
    policy: Literal["linear", "levels", "pool"] = "linear"
    n_min: int = 16
    n_max: int | None = None
    base: Budget = 0.25
    thresholds: tuple[float, float] = (1 / 3, 2 / 3)
    total: Budget = 0.25
    calibration: tuple[float, ...] | None = None
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "selector", _method(self.selector))
        if not callable(self.score):
            check_choice(self.score, "score", tuple(SCORES))
        check_choice(self.policy, "policy", ("linear", "levels", "pool"))
        check_count(self.n_min, "n_min", 1)
        if self.n_max is not None:
            check_count(self.n_max, "n_max", self.n_min)
        as_budget(self.base, "base")
        as_budget(self.total, "total")
        check_count(self.round_to, "round_to", 1)
        low, high = thresholds = tuple(self.thresholds)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"thresholds must be two numbers in [0, 1], the lower one first, got {self.thresholds!r}")
        object.__setattr__(self, "thresholds", thresholds)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", tuple(float(c) for c in self.calibration))
            if len(self.calibration) < 2 or not all(map(math.isfinite, self.calibration)):
                raise ValueError(f"calibration must be two finite scores or more, got {self.calibration!r}")

    @property
    def inner(self) -> ProjectorMethod:
        """The method that selects."""
        assert isinstance(self.selector, ProjectorMethod)  # made so above
        return self.selector

    @property
    def reads(self) -> frozenset[str]:
        """Everything that the selector reads, and the score besides."""
        more = frozenset({"x"}) if callable(self.score) else SCORES[self.score][0]
        return self.inner.reads | more

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return self.inner.tower_layers

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.inner.space

    def count(self, n: int) -> int:
        """The most that an image is left with."""
        most = n if self.n_max is None else min(n, self.n_max)
        return min(n, -(-most // self.round_to) * self.round_to)

    def acts(self, n: int, place: Place) -> bool:
        """True where an image has more tokens than ``n_min``."""
        return place.free(n) > self.n_min

    def choose(self, site: VisualSite) -> Reduction:
        """Score the images, give each its budget, let the method decide."""
        n = site.shape[1]
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(self.budgets(self.scores(site), n, site.samples)):
            groups.setdefault(count, []).append(row)
        parts, order = [], []
        for count, rows in groups.items():
            order += rows
            if count >= n:
                parts.append(Reduction.identity((len(rows),), n, site.device))
            else:
                parts.append(self.inner.with_budget(count).reduce(part_of(site, rows)))
        return stacked(parts, order)

    def scores(self, site: VisualSite) -> Tensor:
        """``(B,)`` float32 in [0, 1], calibrated."""
        found = self.score(site) if callable(self.score) else SCORES[self.score][1](site)
        return (found if self.calibration is None else calibrated(found, self.calibration)).float().clamp(0, 1)

    def budgets(self, scores: Tensor, n: int, sample: tuple[int, ...] | None = None) -> list[int]:
        """How many tokens each image is left with; waits for the device.

        Args:
            scores: ``(B,)`` in [0, 1].
            n: tokens of an image.
            sample: which sample of the batch each image belongs to; None: all to one.
        """
        values = scores.tolist()
        low, high = min(n, self.n_min), n if self.n_max is None else min(n, self.n_max)
        if self.policy == "linear":
            found = [min(max(round(low + c * (high - low)), low), high) for c in values]
        elif self.policy == "levels":
            base = count_of(self.base, n)
            ladder = (max(1, base // 4), base, n)
            found = [min(max(ladder[sum(c >= t for t in self.thresholds)], low), high) for c in values]
        else:
            found = [0] * len(values)
            owner = (0,) * len(values) if sample is None else sample
            for one in dict.fromkeys(owner):
                rows = [i for i, s in enumerate(owner) if s == one]
                total = int(self.total) if is_count(self.total) else count_of(self.total, n * len(rows))
                for i, count in zip(rows, shared_out([values[i] for i in rows], total, low, high), strict=True):
                    found[i] = count
        return [min(n, -(-count // self.round_to) * self.round_to) for count in found]


def _method(value: Any) -> ProjectorMethod:
    if isinstance(value, str):
        value = methods.get(value)()
    elif isinstance(value, Mapping):
        value = from_dict(dict(value))
    if not isinstance(value, Method):
        raise TypeError(f"selector must be a method or its name, got {value!r}")
    if not isinstance(value, ProjectorMethod) or value.joint or isinstance(value, CAT):
        raise ValueError(f"{value.name!r} takes no budget for each image; methods such as 'divprune' do")
    value.with_budget(2)
    return value
