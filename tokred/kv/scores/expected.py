"""The attention that future queries are expected to give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.kv.parts import Score, check_count
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Expected(Score):
    """Queries are taken to be Gaussian, and rotated to the positions that come next; no question has to be at hand.

    Args:
        future: positions ahead, over which the rotation is averaged.
        sinks: first tokens, left out of the statistics and kept.
        epsilon: added to the attention before it is multiplied by the length of the value.

    Source: Devoto et al., Expected Attention, arXiv 2510.00636.
    """

    name: ClassVar[str] = "expected_attention"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k", "v", "rope"})

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.future, "future", 1)
        check_count(self.sinks, "sinks")

    def __call__(self, site: CacheSite) -> Tensor:
        """Expected attention times the length of the value."""
        mean, cov = self._future_queries(site)
        b, d, group = mean.shape[0], mean.shape[2], mean.shape[1] // site.heads
        k = site.k.float()
        scale: float = site.scale  # type: ignore[assignment]
        linear = mean.view(b, site.heads, group, d) @ k.mT  # [B, Hk, G, K]
        rows = []
        for g in range(group):
            c = cov.view(b, site.heads, group, d, d)[:, :, g]
            rows.append(((k @ c) * k).sum(-1))
        logits = scale * linear + scale**2 / 2 * torch.stack(rows, 2)
        hidden = site.token < self.sinks
        hidden = hidden if site.real is None else hidden | ~site.real
        # A sample of sinks alone has nothing to share out; its scores do not matter.
        attention = logits.masked_fill(hidden.unsqueeze(2), -1e30).softmax(-1).mean(2)
        score: Tensor = (attention.masked_fill(hidden, 0.0) + self.epsilon) * site.v.float().norm(dim=-1)
        return score

    def _future_queries(self, site: CacheSite) -> tuple[Tensor, Tensor]:
        """Mean ``[B, H, D]`` and covariance ``[B, H, D, D]`` of queries at the positions that come next."""
        q = site.rope.unrotate(site.q).float()
        m = q.shape[2]
        token = torch.arange(site.seen - m, site.seen, device=q.device)[None]
        vote = token >= self.sinks
        if site.padding is not None:
            vote = site.padding.mask[:, -m:] & (site.padding.token[:, -m:] >= self.sinks)
        w = vote.expand(q.shape[0], -1).float()[:, None, :, None]
        total = w.sum(2, keepdim=True).clamp(min=1)
        mean = (q * w).sum(2, keepdim=True) / total
        spread = (q - mean) * w
        cov = spread.mT @ (q - mean) / total
        turn = torch.stack([self._rotation(site, n, q.shape[-1]) for n in site.lengths])[:, None]  # [B, 1, D, D]
        return (mean @ turn.mT).squeeze(2), turn @ cov @ turn.mT

    def _rotation(self, site: CacheSite, start: int, d: int) -> Tensor:
        """``[D, D]`` the mean rotation of the positions from ``start`` on."""
        cos, sin = site.rope.mean(start, self.future)
        eye = torch.eye(d, device=site.device)
        half = torch.cat([-eye[d // 2 :], eye[: d // 2]])
        return cos.float()[:, None] * eye + sin.float()[:, None] * half
