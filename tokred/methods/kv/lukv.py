"""LU-KV: each head keeps as many rows as curves of the model say, whose loss would cost most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Curves
from tokred.kv.budgets.curves import Points
from tokred.kv.parts import Budget, Score, as_part, check_amount
from tokred.kv.policy import as_budget
from tokred.kv.preset import KVPreset
from tokred.kv.repeat import Repeats
from tokred.kv.site import CacheSite
from tokred.kv.values import value_lengths

JUDGED, UTILITY = "judged", "utility"


@dataclass(frozen=True)
class Utility(Score):
    """Another score, and beside it what generated tokens then make of each row; for making curves, with a full cache.

    A row's utility is the largest attention that a generated token pays it, times the length of what its value adds to
    the stream, as a share of all rows' lengths.

    Args:
        inner: the score that curves are made for.

    Source: Tang et al., LU-KV, ICML 2026 (arXiv 2602.08585), equation 6.
    """

    accumulates: ClassVar[bool] = True
    numbers: ClassVar[int] = 2

    inner: Score

    @property
    def window(self) -> int:
        return self.inner.window

    @property
    def repeats(self) -> Repeats | None:
        return self.inner.repeats

    @property
    def needs(self) -> frozenset[str]:
        """The inner score's needs, attention, values and the output projection."""
        return self.inner.needs | {"q", "k", "v", "projection"}

    def observe(self, site: CacheSite) -> None:
        """Let the score see the prompt, and measure what comes after."""
        if not site.generated:
            self.inner.observe(site)
            return
        lengths = value_lengths(site)
        whole = lengths[..., : min(site.prompt)].sum((1, 2), keepdim=True)
        used = site.statistics(group="none").max * lengths / whole
        used = used.view(used.shape[0], site.heads, -1, used.shape[2]).amax(2)
        before = site.rows.get(UTILITY)
        site.rows[UTILITY] = used if before is None else torch.maximum(before, used)

    def __call__(self, site: CacheSite) -> Tensor:
        """The score at the end of the prompt."""
        if not site.generated:
            site.rows[JUDGED] = self.inner(site).float()
        return site.rows[JUDGED]


@register("lukv")
@dataclass(frozen=True)
class LUKV(KVPreset):
    """Any score, but each layer and head keeps what curves say that were made for the model and the score.

    Args:
        budget: the mean over layers and heads: a share in (0, 1], tokens, or bytes such as "64 MiB".
        curves: a file that ``tokred calibrate ... -m lukv`` made, or shares by point, layer and head.
        score: the score, an object of :mod:`tokred.kv` or its name; the one that the curves were made for.
        sinks, recent: first and newest tokens that stay.

    Source: Tang et al., LU-KV, ICML 2026 (arXiv 2602.08585), section 4.
    """

    summary: ClassVar[str] = "heads keep rows by what their loss has cost on a text"
    source: ClassVar[str] = "Tang et al., ICML 2026 (arXiv 2602.08585)"
    example: ClassVar[Parameters] = {
        "curves": (((0.9, 0.3), (0.5, 0.5), (0.2, 0.8)),),
        "budget": 9,
        "score": {"part": "window", "size": 4, "pool": 3},
    }
    nothing: ClassVar[Parameters | None] = None

    curves: str | Points | None = None
    score: Score | str = "expected_attention"
    sinks: int = 4
    recent: int = 1

    def __post_init__(self) -> None:
        amount = as_budget(self.budget).amount
        object.__setattr__(self, "budget", check_amount(amount))
        object.__setattr__(self, "curves", Curves(amount, self.curves).curves)
        super().__post_init__()
        object.__setattr__(self, "budget", amount)

    def make_score(self) -> Score:
        return as_part(self.score, Score, "score")  # type: ignore[type-abstract]

    def make_budget(self) -> Budget:
        return Curves(as_budget(self.budget).amount, self.curves)
