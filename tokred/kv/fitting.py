"""A compact cache that is fitted: a few of the keys, a weight for each, and values by least squares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.errors import MissingInputError
from tokred.kv.parts import Fate, check_count
from tokred.kv.select import Counts, keep, kept_mask
from tokred.kv.site import CacheSite

# Notes of a layer for the moment of its eviction: queries that the fit is to serve, and what was fitted.
REFERENCE, FITTED = ("reference", "reference_meant"), ("fitted_values", "fitted_weights")
# Likewise: keys that were made along with the values.
FITTED_KEYS = "fitted_keys"


@dataclass(frozen=True)
class Fit(Fate):
    """They go, and those that stay are given weights and values by which attention comes out as it would have.

    For the reference queries that the score has left, the weights match the mass of all rows that may go, and the
    values their output, by least squares. Rows that are never evicted stay as they are, outside of the fit. A row's
    weight acts as if so many tokens had its key.

    Args:
        most: weights lie between ``1 / most`` and ``most``.
        steps: steps of projected gradient descent after the clamped least squares.
        ridge: of the values, by the square of the largest singular value.
        direct: values stay those of the model, and only weights are fitted.

    Source: Zweiger et al., Fast KV Compaction via Attention Matching, arXiv 2602.16284, section 3; with the exact
    largest eigenvalue, and a ridge (ours).
    """

    name: ClassVar[str] = "fit"
    rewrites: ClassVar[bool] = True

    most: float = math.exp(3)
    steps: int = 2
    ridge: float = 1e-6
    direct: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.most < math.inf:
            raise ValueError(f"most must be at least 1 and finite, got {self.most!r}")
        check_count(self.steps, "steps")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge must be at least 0 and finite, got {self.ridge!r}")

    def reduce(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Reduction:
        """Keep the best rows; their weights and values are noted beside."""
        kept = kept_mask(score, site.real, guard, counts)
        free = torch.ones_like(kept) if guard is None else ~guard.expand_as(kept)
        free = free if site.real is None else free & site.real
        if REFERENCE[0] not in site.notes:
            raise MissingInputError(
                "the fate 'fit' serves queries that the score 'matched' leaves, and had none: take both"
            )
        queries, meant = (site.notes.pop(name) for name in REFERENCE)
        site.notes.update(zip(FITTED, self.fitted(site, kept & free, free, queries, meant), strict=True))
        return keep(score, site.real, guard, counts, exact=site.slots is None or site.real is None)

    def fitted(
        self, site: CacheSite, chosen: Tensor, free: Tensor, queries: Tensor, meant: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values ``[B, Hk, K, Dv]`` and float32 weights ``[B, Hk, K]`` of all rows; new ones where ``chosen``.

        Args:
            site: whose rows are fitted.
            chosen: ``[B, Hk, K]`` bool, rows that stay and may change.
            free: ``[B, Hk, K]`` bool, rows that they stand for, themselves included.
            queries: ``[B, H, n, D]`` that the fit is to serve.
            meant: ``[B, n]`` bool, which of them are some.
        """
        values = site.v.clone()
        weights = torch.ones(chosen.shape, device=site.device) if site.weights is None else site.weights.clone()
        b, heads, _ = chosen.shape
        for i in range(b):
            q = queries[i].reshape(heads, -1, *queries.shape[2:])[:, :, meant[i]].float()
            for h in range(heads):
                rows = free[i, h].nonzero().view(-1)
                mine = chosen[i, h].index_select(0, rows)
                if not bool(mine.any()) or not q.shape[2]:
                    continue
                logits = self._logits(site, q[h].flatten(0, 1), site.k[i, h].index_select(0, rows).float())
                logits = logits + weights[i, h].index_select(0, rows).log()
                found = solve(logits, site.v[i, h].index_select(0, rows).float(), mine, self)
                place = rows[mine]
                # Weights of before are in the logits; the fitted ones take their place.
                weights[i, h, place] = found[0] * weights[i, h, place]
                if not self.direct:
                    values[i, h, place] = found[1].to(values.dtype)
        return values, weights

    def _logits(self, site: CacheSite, q: Tensor, k: Tensor) -> Tensor:
        scale: float = site.scale  # type: ignore[assignment]
        logits = q @ k.mT * scale
        return torch.tanh(logits / site.softcap) * site.softcap if site.softcap else logits


def solve(logits: Tensor, values: Tensor, chosen: Tensor, fit: Any) -> tuple[Tensor, Tensor]:
    """Factors ``[t]`` of the chosen rows' weights, and their values ``[t, Dv]``.

    Args:
        logits: ``[n, T]`` of the reference queries with all rows.
        values: ``[T, Dv]``.
        chosen: ``[T]`` bool, of which ``t`` are True.
        fit: bounds, steps and ridge, a :class:`Fit`.
    """
    # Each query by its own largest logit: one whose mass lies elsewhere counts as the others do.
    mass = (logits - logits.amax(-1, keepdim=True)).double().exp()
    total = mass.sum(-1)
    part = mass[:, chosen]
    least, most = 1 / fit.most, fit.most
    square, aim = part.mT @ part, part.mT @ total
    factors = _least_squares(square, aim[:, None])[:, 0].clamp(least, most)
    if fit.steps:
        largest = torch.linalg.eigvalsh(square)[-1].clamp(min=torch.finfo(torch.float64).tiny)
        for _ in range(fit.steps):
            factors = (factors - (square @ factors - aim) / largest).clamp(least, most)
    weighed = part * factors
    share = weighed / weighed.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    wanted = (mass / total[:, None]) @ values.double()
    gram = share.mT @ share
    if fit.ridge:
        gram = gram + fit.ridge * torch.linalg.eigvalsh(gram)[-1] * torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device
        )
    return factors.float(), _least_squares(gram, share.mT @ wanted).float()


def _least_squares(gram: Tensor, aim: Tensor) -> Tensor:
    """The shortest of the solutions of ``gram x = aim``; in double precision, where columns may be alike."""
    found: Tensor = torch.linalg.pinv(gram, hermitian=True) @ aim
    return found
