"""VisionZip: dominant image tokens by attention, and a few contextual ones that the others are folded into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, is_count
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, highest
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.before_llm import Budgeted, Space, VisualSite
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.scores import ATTENTION, Attention, attention_reads, patch_scores


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Budgeted):
    """VisionZip, without its training.

    The tokens with the highest scores are dominant and stay. Of the others, in the order of the image, every so many
    one becomes a target; each of the rest goes to the target with the most similar key (mean over heads).

    Args:
        budget: tokens left of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        contextual: how many of them are targets: an integer, 0 included, or a share of the budget, rounded. The
            authors' 64 are 54 and 10, which is the default share; at least one token is dominant.
        merge: ``"sum"``: a target's features plus the mean of those that go to it, as the authors' code does, which
            doubles their scale; ``"mean"``: the mean of all of them, as the paper says.
        cls: ``"drop"``: all dominant tokens are patches; ``"count"``: one of them is the class token, which the authors
            hand to the language model. No host here does: with ``"count"`` one token fewer is left.
        attention: ``"class"``: scores are the class token's attention; ``"received"``: the mean over all tokens, as the
            authors have it for towers without a class token.
        space: ``"tower"``: features are merged before the projector, as published, where the host can run it on merged
            ones; ``"x"``: behind it.

    Source: Yang et al., VisionZip, CVPR 2025, section 3, and its released code.
    """

    summary: ClassVar[str] = "dominant image tokens by attention, the others folded into a few contextual ones"
    source: ClassVar[str] = "Yang et al., CVPR 2025 (arXiv 2412.04467)"
    example: ClassVar[Parameters] = {"budget": 6, "contextual": 2}

    budget: Budget = 64
    contextual: Budget = 0.15625
    merge: Literal["sum", "mean"] = "sum"
    cls: Literal["drop", "count"] = "drop"
    attention: Attention = "class"
    space: Space = "tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual != 0 or isinstance(self.contextual, bool):
            as_budget(self.contextual, "contextual (unless 0)")
        if is_count(self.budget) and is_count(self.contextual) and self.contextual >= self.budget:
            raise ValueError(f"contextual is {self.contextual}, which leaves no dominant token of {self.budget}")
        check_choice(self.merge, "merge", ("sum", "mean"))
        check_choice(self.cls, "cls", ("drop", "count"))
        check_choice(self.attention, "attention", ATTENTION)
        check_choice(self.space, "space", ("tower", "x"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, what scores them, and, where tokens merge, the tower's keys and features."""
        merging = set() if self.contextual == 0 else {"k", "tower"} if self.space == "tower" else {"k"}
        return frozenset({"x"} | merging | attention_reads(self.attention))

    @property
    def drops(self) -> bool:
        """Where there are no targets."""
        return self.contextual == 0

    def with_budget(self, n: int) -> VisionZip:
        """With at least one dominant token."""
        whole = is_count(self.contextual)
        return replace(self, budget=n, contextual=min(self.contextual, n - 1) if whole else self.contextual)

    def split(self, total: int) -> tuple[int, int]:
        """How many of so many tokens are dominant, at least one, and contextual."""
        share = isinstance(self.contextual, float)
        wanted = round(round(total * self.contextual, 9)) if share else int(self.contextual)
        contextual = min(wanted, total - 1)
        return max(1, total - contextual - (self.cls == "count")), contextual

    def count(self, n: int) -> int:
        """Number of dominant and contextual tokens together."""
        total = count_of(self.budget, n)
        return n if total == n else sum(self.split(total))

    def choose(self, site: VisualSite) -> Reduction:
        """Score, keep the dominant ones, fold the others."""
        n = site.shape[1]
        dominant, contextual = self.split(count_of(self.budget, n))
        first = highest(patch_scores(site, self.attention), dominant)[0]
        if contextual == 0:
            return Reduction.keep(first, n)
        return self.fold(first, besides(first, n), contextual, site.k[:, :, site.prefix :], n)

    def fold(self, first: Tensor, rest: Tensor, contextual: int, keys: Tensor, n: int) -> Reduction:
        """Slots are the dominant tokens, then the targets, each in the order of the image.

        Args:
            first: ``(B, D)`` int64 dominant tokens.
            rest: ``(B, M)`` int64 all others, ascending.
            contextual: how many of them become targets, 1 to ``M``.
            keys: ``(B, H, N, D)``.
            n: ``N``.
        """
        m = rest.shape[1]
        step = max(1, m // contextual)
        place = torch.arange(m, device=rest.device)
        chosen = (place % step == 0) & (place // step < contextual)
        order = chosen.to(torch.uint8).argsort(stable=True)
        source, target = rest[:, order[: m - contextual]], rest[:, order[m - contextual :]]
        metric = keys.float().mean(1)
        into = best_match(gather_rows(metric, source), gather_rows(metric, target)).index
        representative, slot = torch.cat([first, target], 1), into + first.shape[1]
        if self.merge == "mean":
            return Reduction(representative, source, slot, n, mode="mean", by_size=False, complete=True)
        received = torch.zeros(*target.shape, device=into.device)
        received = received.scatter_add(1, into, torch.ones_like(into, dtype=torch.float32))
        weight = torch.ones(rest.shape[0], n, device=into.device)
        weight = weight.scatter(1, source, received.gather(1, into).reciprocal())
        return Reduction(representative, source, slot, n, weight=weight, mode="sum", by_size=False, complete=True)
