"""Keyformer: accumulated attention of noisy logits, and a recent window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.policy import BudgetLike
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite
from tokred.methods.kv.h2o import MASS

_MASK = 0xFFFFFFFF
# Logits of one block of queries.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Gumbel(Score):
    """The attention is summed as in ``column_sum``, but of ``softmax((logits + noise) / temperature)``.

    The noise depends on seed, layer, head, query and key alone, so neither batch-mates nor padding nor the size of a
    block change it. The layer's own output has no noise.

    Args:
        start, end: temperature at the prompt and after the last token.
        noise: "gumbel", "gaussian", "constant" (none, but with the temperature) or "none" (neither).
        seed: which noise.
        steps: tokens that will be generated; None: as ``generate`` says; unknown: the temperature stays at ``start``.

    Source: Adnan et al., Keyformer, MLSys 2024 (arXiv 2403.09054), sections 3.2 and 3.3.
    """

    name: ClassVar[str] = "gumbel"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    accumulates: ClassVar[bool] = True
    numbers: ClassVar[int] = 1

    start: float = 1.0
    end: float = 2.0
    noise: str = "gumbel"
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.start <= 0 or self.end <= 0:
            raise ValueError(f"temperatures must be positive, got {self.start} and {self.end}")
        if self.noise not in ("gumbel", "gaussian", "constant", "none"):
            raise ValueError(f"noise must be 'gumbel', 'gaussian', 'constant' or 'none', got {self.noise!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def temperature(self, step: int, steps: int | None) -> float:
        """Temperature at generated token ``step`` of ``steps``; it stays at ``end`` after the last."""
        total = self.steps if self.steps is not None else steps
        if total is None:
            return self.start
        return self.start + (self.end - self.start) * min(step, total) / total

    def _temperatures(self, site: CacheSite) -> Tensor | float:
        """Temperature of every sample ``[B, 1, 1, 1]``; one number where all are as many tokens after the prompt."""
        found = [self.temperature(g, site.steps) for g in site.since]
        if len(set(found)) == 1:
            return found[0]
        return torch.tensor(found, device=site.device).view(-1, 1, 1, 1)

    def observe(self, site: CacheSite) -> None:
        """Add the noisy attention of this forward's queries."""
        if self.noise == "none":
            received = site.columns(group="sum")
        else:
            tau = self._temperatures(site)
            received = noisy_columns(site, tau, lambda q, k: self.draw(site, q, k))
        before = site.rows.get(MASS)
        site.rows[MASS] = received if before is None else before + received

    def __call__(self, site: CacheSite) -> Tensor:
        """The sum that :meth:`observe` has added up."""
        return site.rows[MASS]

    def draw(self, site: CacheSite, query: Tensor, key: Tensor) -> Tensor | None:
        """Noise ``[B or 1, H, M, K]`` of pairs of tokens: ``query`` ``[B, 1, M, 1]``, ``key`` ``[B, H, 1, K]``."""
        if self.noise == "constant":
            return None
        head = torch.arange(site.q.shape[1], device=site.device).view(1, -1, 1, 1)
        h = _mix(query * 0x9E3779B1 + head * 0x85EBCA6B + self.seed * 0xC2B2AE35 + site.layer * 0x27D4EB2F + 0x165667B1)
        u = (_mix(h + key * 0x9E3779B1).double() + 0.5) / 2**32
        if self.noise == "gumbel":
            return gumbel(u).float()
        return (math.sqrt(2) * torch.erfinv(2 * u - 1)).float()


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform numbers, clamped so that it is finite."""
    return -torch.log(-torch.log(u.clamp(1e-10, 1 - 1e-7)))


def noisy_columns(site: CacheSite, tau: Tensor | float, draw: object) -> Tensor:
    """``[B, Hk, K]`` sum over queries and heads of ``softmax((logits + noise) / tau)``, block by block of queries.

    The operator ``column_scores`` takes no noise per logit; this is its sum with one.
    """
    q, k = site.q, site.k
    b, h, m, _ = q.shape
    n, group = k.shape[2], h // site.heads
    keys = k.float().repeat_interleave(group, 1)
    scale: float = site.scale  # type: ignore[assignment]
    bias = None if site.weights is None else (site.alpha * site.weights.log()).repeat_interleave(group, 1)[:, :, None]
    real = site.real
    if real is not None:
        real = real.expand(b, site.heads, n).repeat_interleave(group, 1)[:, :, None]
    key_token = site.token.expand(-1, site.heads, -1).repeat_interleave(group, 1)[:, :, None]
    query_token, votes = _query_tokens(site, m)
    total = torch.zeros(b, h, n, device=q.device)
    step = max(1, _BLOCK // max(b * h * n, 1))
    columns = torch.arange(n, device=q.device)
    for i in range(0, m, step):
        part = slice(i, min(i + step, m))
        stop = n if site.crosses else n - m + part.stop  # of the rows that any of these queries sees
        x = q[:, :, part].float() @ keys[:, :, :stop].mT * scale
        if site.softcap:
            x = torch.tanh(x / site.softcap) * site.softcap
        if bias is not None:
            x = x + bias[..., :stop]
        noise = draw(query_token[:, :, part], key_token[..., :stop])  # type: ignore[operator]
        x = (x if noise is None else x + noise) / tau
        last = torch.arange(n - m + part.start, n - m + part.stop, device=q.device)[:, None]
        seen = (columns[:stop] <= last) | site.crosses
        seen = seen if real is None else seen & real[..., :stop]
        x = x.masked_fill(~seen, -1e30)
        if site.sinks is not None:
            sink = (site.sinks.detach().float().view(1, h, 1, 1) / tau).expand(*x.shape[:3], 1)
            p = torch.cat([x, sink], -1).softmax(-1)[..., :-1].masked_fill(~seen, 0.0)
        else:
            p = x.softmax(-1).masked_fill(~seen, 0.0)
        total[..., :stop] += (p if votes is None else p * votes[:, :, part]).sum(2)
    summed: Tensor = total.view(b, site.heads, group, n).sum(2)
    return summed


def _query_tokens(site: CacheSite, m: int) -> tuple[Tensor, Tensor | None]:
    """Tokens of the queries ``[B or 1, 1, M, 1]``, and one or zero for each where some are padding."""
    if site.crosses:  # padding is that of the rows, and says nothing about queries
        return torch.arange(m, device=site.device).view(1, 1, m, 1), None
    if site.padding is None:
        return torch.arange(site.seen - m, site.seen, device=site.device).view(1, 1, m, 1), None
    token, mask = site.padding.token[:, -m:], site.padding.mask[:, -m:]
    return token[:, None, :, None], mask[:, None, :, None].float()


def _mix(h: Tensor) -> Tensor:
    """32 bits, well mixed."""
    h = h & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & _MASK
    return h ^ (h >> 16)


@register("keyformer")
@dataclass(frozen=True)
class Keyformer(KVPreset):
    """H2O with Gumbel noise and a rising temperature in the score; the model's own attention has neither.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        recent: share of the kept rows that are the newest (a whole number: tokens).
        tau: temperature at the prompt and at the last token.
        noise: "gumbel", "gaussian", "constant" (temperature alone) or "none" (H2O).
        seed: which noise.
        steps: tokens that will be generated; None: as ``generate`` says.
        every: generated tokens between evictions.

    Source: Adnan et al., Keyformer, MLSys 2024, section 3; the row that leaves the window competes, as in the text.
    """

    summary: ClassVar[str] = "accumulated attention of Gumbel-noisy logits, at every step"
    source: ClassVar[str] = "Adnan et al., MLSys 2024 (arXiv 2403.09054)"

    budget: BudgetLike = 0.6
    recent: float | int = 0.3
    tau: tuple[float, float] = (1.0, 2.0)
    noise: str = "gumbel"
    seed: int = 0
    steps: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if len(self.tau) != 2:
            raise ValueError(f"tau must be two temperatures, got {self.tau!r}")
        object.__setattr__(self, "tau", tuple(self.tau))
        super().__post_init__()

    def make_score(self) -> Score:
        return Gumbel(*self.tau, noise=self.noise, seed=self.seed, steps=self.steps)
