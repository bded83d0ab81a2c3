"""Expected Attention: what queries to come would attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score, check_count
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite

NOTES = ("query_count", "query_mean", "query_spread")


class Moments(NamedTuple):
    """Statistics of queries: how many ``[B]``, their mean ``[B, H, D]``, and the sum of outer products around it."""

    total: Tensor
    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Expected(Score):
    """Queries are taken to be Gaussian, and rotated to the positions that come next; no question has to be at hand.

    The statistics are those of all queries so far, whatever forwards they came in.

    Args:
        future: positions ahead, over which the rotation is averaged.
        sinks: first tokens, left out of the statistics and kept.
        epsilon: added to the attention before it is multiplied by the length of the value.

    Source: Devoto et al., Expected Attention, arXiv 2510.00636.
    """

    name: ClassVar[str] = "expected_attention"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k", "v", "rope"})
    accumulates: ClassVar[bool] = True

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.future, "future", 1)
        check_count(self.sinks, "sinks")

    def note_bytes(self, heads: int, width: int) -> int:
        """Bytes of the statistics."""
        return 4 * (1 + heads * width * (1 + width))

    def observe(self, site: CacheSite) -> None:
        """Add this forward's queries to the statistics."""
        new, old = self._moments(site), _noted(site)
        site.notes.update(zip(NOTES, new if old is None else _joined(old, new), strict=True))

    def __call__(self, site: CacheSite) -> Tensor:
        """Expected attention times the length of the value."""
        mean, cov = self._future_queries(site)
        b, d, group = mean.shape[0], mean.shape[2], mean.shape[1] // site.heads
        k = site.k.float()
        scale: float = site.scale  # type: ignore[assignment]
        mean, cov = mean.view(b, site.heads, group, 1, d), cov.view(b, site.heads, group, d, d)
        # Both terms are linear in the key once it is multiplied last: scale k.m + scale^2 / 2 k.Ck.
        rows = [
            (k @ (cov[:, :, g] * (scale**2 / 2))).add_(mean[:, :, g], alpha=scale).mul_(k).sum(-1) for g in range(group)
        ]
        logits = torch.stack(rows, 2)  # [B, Hk, G, K]
        hidden = site.token < self.sinks
        hidden = hidden if site.real is None else hidden | ~site.real
        # A sample of sinks alone has nothing to share out; its scores do not matter.
        attention = logits.masked_fill(hidden.unsqueeze(2), -1e30).softmax(-1).mean(2)
        score: Tensor = (attention.masked_fill(hidden, 0.0) + self.epsilon) * site.v.float().norm(dim=-1)
        return score

    def _future_queries(self, site: CacheSite) -> tuple[Tensor, Tensor]:
        """Mean ``[B, H, D]`` and covariance ``[B, H, D, D]`` of queries at the positions that come next."""
        found = _noted(site) or self._moments(site)
        mean = found.mean.unsqueeze(2)
        cov = found.spread / found.total.clamp(min=1)[:, None, None, None]
        each = [self._rotation(site, n, mean.shape[-1]) for n in site.lengths]
        turn = torch.stack(each or [torch.eye(mean.shape[-1], device=site.device)])[:, None]  # [B, 1, D, D]
        return (mean @ turn.mT).squeeze(2), turn @ cov @ turn.mT

    def _moments(self, site: CacheSite) -> Moments:
        """Moments of this forward's queries that count: none of padding, and of none of the first tokens."""
        q, m = site.rope.unrotate(site.q).float(), site.q.shape[2]
        if site.padding is None:
            return _moments(q[:, :, max(0, self.sinks - (site.seen - m)) :], None)
        return _moments(q, site.padding.mask[:, -m:] & (site.padding.token[:, -m:] >= self.sinks))

    def _rotation(self, site: CacheSite, start: int, d: int) -> Tensor:
        """``[D, D]`` the mean rotation of the positions from ``start`` on."""
        cos, sin = site.rope.mean(start, self.future)
        eye = torch.eye(d, device=site.device)
        half = torch.cat([-eye[d // 2 :], eye[: d // 2]])
        return cos.float()[:, None] * eye + sin.float()[:, None] * half


def _noted(site: CacheSite) -> Moments | None:
    return Moments(*(site.notes[n] for n in NOTES)) if NOTES[0] in site.notes else None


def _moments(q: Tensor, vote: Tensor | None) -> Moments:
    """Moments of queries ``[B, H, M, D]``, those that ``vote`` ``[B, M]`` marks; None: all."""
    if vote is None:
        count = q.new_full((q.shape[0],), q.shape[2])
        mean = q.sum(2) / max(q.shape[2], 1)
        apart = q - mean.unsqueeze(2)
        return Moments(count, mean, apart.mT @ apart)
    w = vote.float()
    count = w.sum(1)
    w = w[:, None, :, None]
    mean = (q * w).sum(2) / count.clamp(min=1)[:, None, None]
    apart = (q - mean.unsqueeze(2)) * w
    return Moments(count, mean, apart.mT @ apart)


def _joined(a: Moments, b: Moments) -> Moments:
    """Moments of both together, without sums of squares, which would take the digits."""
    count = a.total + b.total
    share = (b.total / count.clamp(min=1))[:, None, None]
    apart = b.mean - a.mean
    between = apart.unsqueeze(-1) * apart.unsqueeze(-2) * (share * a.total[:, None, None]).unsqueeze(-1)
    return Moments(count, a.mean + apart * share, a.spread + b.spread + between)


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(KVPreset):
    """Queries are modelled as Gaussian and rotated to the positions that follow, so no question has to be at hand.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        future: positions ahead over which the rotation is averaged.
        sinks: first tokens, left out of the statistics, which stay.
        epsilon: added to the attention before the length of the value weighs it.

    Source: Devoto et al., Expected Attention, arXiv 2510.00636, section 3.
    """

    summary: ClassVar[str] = "the attention that queries to come are expected to give"
    source: ClassVar[str] = "Devoto et al., 2025 (arXiv 2510.00636)"
    example: ClassVar[Parameters] = {"budget": 9, "sinks": 2, "future": 16}

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def make_score(self) -> Score:
        return Expected(self.future, self.sinks, self.epsilon)
