"""R-KV: rows that matter and are not said twice, every so many generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_share
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import newest
from tokred.kv.budgets import Generated
from tokred.kv.parts import Budget, Score, When, as_part, check_count
from tokred.kv.policy import BudgetLike
from tokred.kv.pooling import check_pool, pooled
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite

# Numbers of a block of similarities, which are never all held at once.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Redundancy(Score):
    """A share of importance minus a share of redundancy.

    Importance is the attention of the newest queries, shared out among the rows before them and pooled by its maximum.
    Redundancy is the softmax of each key's mean cosine with all others, where the newest of similar keys are left out.

    Args:
        size: queries that judge, and newest tokens that are kept.
        pool: width of the pooling, odd; 1: none.
        importance: its share; the rest is redundancy's.
        similar: cosine above which two keys are similar.
        protect: of a key's similar ones, so many of the newest are not blamed for it.
        as_released: a key without a similar one is not counted for the first row, as in the authors' code.

    Source: Cai et al., R-KV, arXiv 2505.24133, equations 2 to 6.
    """

    name: ClassVar[str] = "redundancy"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    size: int = 8
    pool: int = 7
    importance: float = 0.1
    similar: float = 0.5
    protect: int = 1
    as_released: bool = False

    def __post_init__(self) -> None:
        check_count(self.size, "the window", 1)
        check_pool(self.pool, "max")
        check_share(self.importance, "importance", zero=True)
        if not -1 < self.similar < 1:
            raise ValueError(f"similar must lie in (-1, 1), got {self.similar!r}")
        check_count(self.protect, "protect")

    @property
    def window(self) -> int:
        return self.size

    @property
    def recent(self) -> int:
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Larger is kept; the newest tokens' values do not matter."""
        return self.importance * self.important(site) - (1 - self.importance) * self.redundant(site)

    def important(self, site: CacheSite) -> Tensor:
        """``[B, Hk, K]``: of heads that share a key the largest logit counts, before the softmax."""
        q, votes = newest.voters(site, self.size)
        b, heads, n = site.extent
        group, count = q.shape[1] // heads, q.shape[2]
        scale: float = site.scale  # type: ignore[assignment]
        logits = q.float().reshape(b, heads, group * count, q.shape[-1]) @ site.k.float().mT * scale
        if site.softcap:
            logits = torch.tanh(logits / site.softcap) * site.softcap
        logits = logits.view(b, heads, group, count, n).amax(2)
        if site.weights is not None:
            logits = logits + site.alpha * site.weights.log().unsqueeze(2)
        hidden = site.stands_behind(self.size)
        hidden = (hidden if site.real is None else hidden | ~site.real).expand(b, heads, n).unsqueeze(2)
        # Where nothing stands before the window there is nothing to share out.
        shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        if votes is None:
            found = shares.mean(2)
        else:
            weight = votes[:, None, :, None]
            found = (shares * weight).sum(2) / weight.sum(2).clamp(min=1)
        return pooled(site, found, self.pool, "max")

    def redundant(self, site: CacheSite) -> Tensor:
        """``[B, Hk, K]``: sums to one over the rows."""
        b, heads, n = site.extent
        k, real = site.k.float(), site.real
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
        count: Tensor | int = n
        if real is not None:
            unit = unit * real.unsqueeze(-1)
            count = real.sum(-1, keepdim=True).clamp(min=1)
        blamed = torch.zeros(b, heads, n, device=k.device)
        column = torch.arange(n, device=k.device)
        first = None if real is None else real.byte().argmax(-1)[..., None, None]
        step = max(1, _BLOCK // max(1, b * heads * n))
        for start in range(0, n, step):
            like = unit[:, :, start : start + step] @ unit.mT
            like.diagonal(start, -2, -1).zero_()
            for _ in range(self.protect):
                last = torch.where(like > self.similar, column, -1).amax(-1, keepdim=True)
                none = last < 0
                if self.as_released:
                    last, none = torch.where(none, 0 if first is None else first, last), torch.zeros_like(none)
                last = last.clamp(min=0)
                like.scatter_(-1, last, like.gather(-1, last).masked_fill(~none, 0.0))
            blamed += like.sum(-2)
        mean = blamed / count
        if real is not None:
            mean = mean.masked_fill(~real, -torch.inf)
        return mean.softmax(-1).nan_to_num(0.0)


@register("rkv")
@dataclass(frozen=True)
class RKV(KVPreset):
    """While tokens are generated, rows go that the newest queries pass by and that other rows say again.

    Args:
        budget: rows after an eviction, those of the prompt among them: a share in (0, 1] of the prompt, tokens, bytes
            such as "64 MiB", or a budget of :mod:`tokred.kv`. With ``keep_prompt`` generated rows, as a number.
        every: generated tokens between evictions.
        window: newest queries that judge, and newest tokens that stay.
        importance: share of the attention in the score; the rest is redundancy's.
        similar: cosine above which two keys are similar.
        pool: width of the maximum pooling of the attention, odd.
        protect: of a key's similar ones, so many of the newest are not blamed for it.
        sinks: first tokens that stay.
        keep_prompt: the prompt is never touched.
        as_released: with the hidden sink of the authors' code, see :class:`Redundancy`.

    Source: Cai et al., R-KV, arXiv 2505.24133, section 3; a row without a similar one changes nothing (ours).
    """

    summary: ClassVar[str] = "while tokens are generated: attention, minus what other keys say again"
    source: ClassVar[str] = "Cai et al., NeurIPS 2025 (arXiv 2505.24133)"
    example: ClassVar[Parameters] = {"budget": 9, "every": 2, "window": 2, "pool": 3}

    budget: BudgetLike = 1024
    every: int = 128
    window: int = 8
    importance: float = 0.1
    similar: float = 0.5
    pool: int = 7
    protect: int = 1
    sinks: int = 0
    keep_prompt: bool = False
    as_released: bool = False

    def __post_init__(self) -> None:
        check_count(self.every, "every", 1)
        if self.keep_prompt:
            given: Any = self.budget  # also as it was written down
            if isinstance(given, int) and not isinstance(given, bool):
                given = Generated(given)
            elif isinstance(given, dict):
                given = as_part(given, Budget, "budget")
            if not isinstance(given, Generated):
                raise ValueError(f"with keep_prompt, budget must be a number of generated rows, got {self.budget!r}")
            object.__setattr__(self, "budget", given)
        super().__post_init__()

    def make_score(self) -> Score:
        return Redundancy(self.window, self.pool, self.importance, self.similar, self.protect, self.as_released)

    def make_when(self) -> When:
        return When(prefill=False, every=self.every)

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        """First and newest tokens, and the prompt if it is to stay."""
        found = super().guarded(site, rows)
        return found | (site.token < site.column(site.prompt)) if self.keep_prompt else found
