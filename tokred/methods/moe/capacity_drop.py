"""Capacity-aware token drop: an expert takes only so many tokens of a forward, and no straggler is waited for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_number
from tokred.core.experts import ExpertMethod, ExpertSite, Routing
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.core.selection import hash_uniform, ranked

_SAFE = 1024.0  # so many times the mean load is more than any expert of a published model could get


@register("capacity_drop")
@dataclass(frozen=True)
class CapacityDrop(ExpertMethod):
    """Every expert takes at most ``gamma`` times the mean load; the assignments with the smallest scores are dropped.

    A token without an assignment gets nothing from the routed experts; residual and shared experts still act.

    Args:
        gamma: capacity of an expert over the mean load ``k * T / E``, at least 0.5; the capacity is at least 1 token.
        strategy: which tokens an expert keeps: ``"score"``, those with the largest router scores for it; ``"first"``
            and ``"last"``, the earliest and the latest; ``"random"``. The last three are worse, and for comparison.
        rounds: candidates of a token over ``k``, at least 1. Above 1 (expanded drop) a token takes the ``k`` best
            experts that have room among its ``ceil(k * rounds)`` best.
        devices: experts in their order lie on so many devices, and the limit is on the sum of each device; None: on
            each expert.
        empty: ``"residual"``: a token of which every assignment was dropped has none; ``"fallback"``: it keeps its best
            one, so that an expert may get more than its capacity.
        over: whose tokens share a capacity: those of the whole ``"batch"``, as published, or those of each
            ``"sample"``, so that a result does not depend on the rest of the batch (ours).
        seed: of the strategy ``"random"``.

    Where a group has a single token (decoding), nothing is dropped. Padding takes no room from real tokens.

    Source: Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts, ICLR 2026: token drop
        and expanded drop. Tokens without experts, samples, padding and ties (to the lower index) are ours.
    """

    summary: ClassVar[str] = "experts take at most gamma times the mean load; the lowest scores are dropped"
    source: ClassVar[str] = "Capacity-Aware Inference, ICLR 2026 (arXiv 2503.05066)"
    example: ClassVar[Parameters] = {"gamma": 0.5}
    nothing: ClassVar[Parameters | None] = {"gamma": _SAFE}

    gamma: float = 1.5
    strategy: Literal["score", "first", "last", "random"] = "score"
    rounds: float = 1.0
    devices: int | None = None
    empty: Literal["residual", "fallback"] = "residual"
    over: Literal["batch", "sample"] = "batch"
    seed: int = 0

    def __post_init__(self) -> None:
        if check_number(self.gamma, "gamma") < 0.5:
            raise ValueError(f"gamma must be at least 0.5, got {self.gamma!r}")
        check_choice(self.strategy, "strategy", ("score", "first", "last", "random"))
        if check_number(self.rounds, "rounds") < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds!r}")
        if self.devices is not None:
            check_count(self.devices, "devices", 1)
        check_choice(self.empty, "empty", ("residual", "fallback"))
        check_choice(self.over, "over", ("batch", "sample"))
        check_count(self.seed, "seed")

    def groups(self, experts: int) -> int:
        """Number of groups of ``experts`` that have a capacity each.

        Raises:
            ValueError: they cannot be shared evenly among the devices.
        """
        groups = experts if self.devices is None else self.devices
        if experts % groups:
            raise ValueError(f"devices must divide the {experts} experts, got devices={self.devices}")
        return groups

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        return self.gamma < _SAFE

    def spares(self, per_token: int, experts: int) -> bool:
        groups = self.groups(experts)
        # a token has at most so many of its experts in one group
        return self.gamma * per_token / groups >= min(per_token, experts // groups)

    def candidates(self, per_token: int, experts: int) -> int:
        """Experts that a token may go to."""
        return min(experts, math.ceil(round(per_token * self.rounds, 9)))

    def route(self, site: ExpertSite) -> Routing:
        ids, experts, k = site.ids, site.experts, site.per_token
        if self.spares(k, experts) or site.logits.shape[0] == 0:
            return Routing(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            scores = site.scores
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
            count = self.candidates(k, experts)
            wanted = chosen
            if count > k:  # the host's own choice stands in front, whatever ties it saw
                best = ranked(scores + 2 * chosen)[:, :count]
                wanted = torch.zeros_like(chosen).scatter(1, best, True)
            taken = self._taken(site, scores, wanted)
            kept = taken.gather(1, ids)
            if count > k:
                best = ranked(scores.masked_fill(~taken, -1))[:, :k]
                # a token that lost nothing keeps the host's order too, so that it stays as it is bit for bit
                ids = torch.where(kept.all(1, keepdim=True), ids, best)
                kept = taken.gather(1, ids)
            if self.empty == "fallback":
                ids, kept = _fallen_back(scores, site.ids, ids, kept)
        return Routing(ids, kept)

    def _taken(self, site: ExpertSite, scores: Tensor, wanted: Tensor) -> Tensor:
        """``(T, E)`` bool: the pairs among the ``wanted`` ones that find room."""
        tokens, experts = scores.shape
        groups, samples = self.groups(experts), site.samples if self.over == "sample" else 1
        real = torch.ones(tokens, dtype=torch.bool, device=scores.device) if site.real is None else site.real

        def lined(x: Tensor) -> Tensor:
            """``(T, E)`` to ``(samples, groups, pairs)``, the pairs in the order of tokens, then of experts."""
            return x.view(samples, -1, groups, experts // groups).transpose(1, 2).flatten(2)

        priority = lined(self._priority(site, scores))
        # real tokens first, then padding, then pairs that nobody wants; among equals the lower index
        grade = lined(wanted.to(torch.uint8) * (1 + real.to(torch.uint8)).unsqueeze(1))
        order = ranked(priority)
        order = order.gather(2, ranked(grade.gather(2, order)))
        place = torch.empty_like(order).scatter(
            2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
        )
        taken = place < self._capacity(real.view(samples, -1).sum(1), site.per_token, groups).view(-1, 1, 1)
        shape = (samples, groups, tokens // samples, experts // groups)
        return taken.view(shape).transpose(1, 2).reshape(tokens, experts) & wanted

    def _capacity(self, tokens: Tensor, per_token: int, groups: int) -> Tensor:
        """``(samples,)`` int64: pairs that a group takes of so many tokens; of a single one all."""
        mean = tokens.double() * per_token / groups
        found = (self.gamma * mean - 1e-9).ceil().long().clamp(min=1)
        return torch.where(tokens <= 1, torch.iinfo(torch.int64).max, found)

    def _priority(self, site: ExpertSite, scores: Tensor) -> Tensor:
        """``(T, E)``: the larger, the sooner a pair is taken."""
        if self.strategy == "score":
            return scores
        tokens, experts = scores.shape
        length = tokens // site.samples if self.over == "sample" else tokens
        if self.strategy == "random":
            drawn = hash_uniform(length * experts, self.seed, site.layer, device=scores.device).view(length, experts)
            return drawn.repeat(tokens // length, 1)
        place = torch.arange(tokens, device=scores.device).unsqueeze(1).expand(-1, experts)
        return -place if self.strategy == "first" else place


def _fallen_back(scores: Tensor, first: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Routing in which a token without an expert goes to the best of those that the host chose ``first``."""
    none = ~kept.any(1, keepdim=True)
    best = scores.gather(1, first).argmax(1, keepdim=True)
    alone = torch.zeros_like(kept).scatter(1, best, True)
    return torch.where(none, first, ids), kept | (none & alone)
