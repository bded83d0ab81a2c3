"""LTP: one threshold per layer on the attention that a token receives decides which tokens go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_count
from tokred.core.learned import Facts
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod

FLOOR = 1e-5  # the smallest threshold that takes effect


@register("ltp")
@dataclass(frozen=True)
class LTP(BlockMethod):
    """Learned token pruning: a token stays while its mean attention reaches the layer's threshold.

    A token's score is the attention that it receives, averaged over heads and over the queries that are still there, so
    the scores of a sample add up to one and a threshold of ``1 / n`` is the mean. How many tokens stay follows from the
    text or image. Thresholds are given, or learned (``learn=True``): in training every token is multiplied at the end
    of a block by how far its score lies above the threshold, softly, and a loss (``mask``) pulls these factors down; in
    evaluation tokens leave.

    Scores are averaged over the real tokens of each sample (ours). The released code divides by the padded length, so
    that its thresholds hold for that length alone; ``padded`` says which.

    Args:
        thresholds: one for each block, 0 where a block prunes nothing. None: rising to ``theta_final``, as before any
            learning.
        theta_final: block ``l`` of ``L`` gets ``theta_final * l / L``; without ``thresholds`` only.
        padded: thresholds come from code that divides by this padded length; None: from scores as they are here.
        min_keep: tokens that every sample keeps at least, protected ones included; None: one besides those.
        learn: the thresholds are weights that are trained; those above are what they start from, and blocks whose
            threshold is 0 prune nothing.
        temperature: of the soft factors in training; scores are of the size ``1 / n``.
        penalty: weight of the loss on the soft factors: the larger, the more is pruned.

    Source: Kim et al., Learned Token Pruning for Transformers, KDD 2022, section 3.
    """

    summary: ClassVar[str] = "keep what is attended to above a learned threshold, as many as the text needs"
    source: ClassVar[str] = "Kim et al., KDD 2022 (arXiv 2107.00910)"
    example: ClassVar[Parameters] = {"theta_final": 0.3}
    nothing: ClassVar[Parameters | None] = {"theta_final": 0.0}
    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True
    by_mask: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    thresholds: Sequence[float] | None = None
    theta_final: float = 0.01
    padded: int | None = None
    min_keep: int | None = None
    learn: bool = False
    temperature: float = 1e-3
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if self.thresholds is not None and not isinstance(self.thresholds, Iterable):
            raise TypeError(f"thresholds must be a list of numbers, got {self.thresholds!r}")
        given = [self.theta_final] if self.thresholds is None else list(self.thresholds)
        for i, theta in enumerate(given):
            name = "theta_final" if self.thresholds is None else f"thresholds[{i}]"
            if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 <= theta <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {theta!r}")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", tuple(float(t) for t in given))
        for name, least in (("padded", 1), ("min_keep", 1)):
            value = getattr(self, name)
            if value is not None:
                check_count(value, name, least)

        if not isinstance(self.learn, bool):
            raise ValueError(f"learn must be True or False, got {self.learn!r}")
        for name, positive in (("temperature", True), ("penalty", False)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < torch.inf
            if not number or (positive and value == 0):
                raise ValueError(f"{name} must be a number {'above' if positive else 'of at least'} 0, got {value!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the attention that each receives; the module where thresholds are learned."""
        return frozenset({"x", "attention", "module"} if self.learn else {"x", "attention"})

    def check(self, depth: int) -> None:
        if self.thresholds is not None and len(self.thresholds) != depth:
            raise ValueError(f"thresholds has {len(self.thresholds)} entries, but the model has {depth} blocks")

    def theta(self, layer: int, depth: int) -> float:
        """The threshold of a block."""
        if self.thresholds is not None:
            return self.thresholds[layer]
        return base_threshold(self.theta_final, layer, depth)

    def tokens(self, n: int, place: Place) -> int:
        """At most all of them: the count depends on the sample."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """True where there is a threshold, and more tokens than stay in any case."""
        return self.theta(place.layer, place.depth) > 0 and n > self._least(place.protected)

    def _least(self, protected: int) -> int:
        """Tokens that stay in any case."""
        return max(protected, protected + 1 if self.min_keep is None else self.min_keep)

    def module(self, facts: Facts) -> nn.Module | None:
        """The thresholds, where they are learned."""
        if not self.learn:
            return None
        return Thresholds([self.theta(layer, facts.depth) for layer in range(facts.depth)])

    def _threshold(self, site: Site) -> Tensor | float:
        """Of the site's block, learned or given."""
        if not self.learn:
            return self.theta(site.layer, site.depth)
        module = self.its_module(site, Thresholds, "which ltp with learn=True decides by")
        theta: Tensor = module(site.layer)
        return theta

    def reduce(self, site: Site) -> Reduction:
        """Score, compare, keep in order."""
        if self.learn and site.learned.training:
            return self._soft(site)
        b, n = site.shape
        free = slice(site.prefix, n - site.suffix)
        with torch.no_grad():
            score = mean_attention(site)
            real = None if site.mask is None else site.mask[:, free]
            count = torch.full((b, 1), n, device=score.device) if site.mask is None else site.mask.sum(1, keepdim=True)
            scaled = score if self.padded is None else score * (count / self.padded)
            theta = self._threshold(site)
            keep = scaled[:, free] >= (max(FLOOR, theta) if isinstance(theta, float | int) else theta.clamp_min(FLOOR))
            least = self._least(site.prefix + site.suffix) - site.prefix - site.suffix
            if least > 0:
                own = score[:, free] if real is None else score[:, free].masked_fill(~real, -torch.inf)
                first = ranked(own)[:, :least]
                keep = keep.scatter(1, first, 1)
            keep = keep if real is None else keep & real
            rows = torch.arange(site.prefix, n - site.suffix, device=score.device).expand(b, -1)
            rows, mask = pack(rows, keep)
            if rows.shape[1] == n - site.prefix - site.suffix and mask is None:
                return Reduction.identity((b,), n, site.device)
            kept, mask = with_protected(rows, mask, n, site.prefix, site.suffix)
        return Reduction.keep(kept, n, mask=mask)

    def _soft(self, site: Site) -> Reduction:
        """A factor for every token's features, and the loss on them."""
        n = site.shape[1]
        free = slice(site.prefix, n - site.suffix)
        real = None if site.mask is None else site.mask[:, free]
        count = n if site.mask is None else site.mask.sum(1, keepdim=True)
        score = mean_attention(site)[:, free]
        scaled = score if self.padded is None else score * (count / self.padded)
        factor = soft_mask(scaled, self._threshold(site), self.temperature)
        mean = factor.mean() if real is None else (factor * real).sum() / real.sum().clamp_min(1)
        site.learned.losses["mask"] = self.penalty * mean
        return Reduction.soft(F.pad(factor, (site.prefix, site.suffix), value=1.0), "rows")


class Thresholds(nn.Module):
    """A threshold for every block: where it started, and what was learned.

    Args:
        base: ``L`` numbers.
    """

    base: Tensor

    def __init__(self, base: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor(base, dtype=torch.float32))
        self.delta = nn.Parameter(torch.zeros(len(base)))

    def forward(self, layer: int) -> Tensor:
        """That of a block, a scalar, float32."""
        return self.base[layer].float() + self.delta[layer].float()

    def values(self) -> list[float]:
        """All of them, for ``LTP(thresholds=...)``, which needs no module; 0 where what was learned prunes nothing."""
        both = self.base.float() + self.delta.detach().float()
        return [min(1.0, max(0.0, float(theta))) for theta in both]


def mean_attention(site: Site) -> Tensor:
    """``(B, N)`` float32: the attention that each token receives, averaged over heads and real queries.

    Source: Kim et al., KDD 2022, equation 3; the released code divides by the padded length instead.
    """
    received = site.column_scores().mean(1)
    if site.mask is None:
        return received / site.shape[1]
    return received / site.mask.sum(1, keepdim=True).clamp(min=1)


def base_threshold(theta_final: float, layer: int, depth: int) -> float:
    """The threshold of block ``layer`` of ``depth`` before anything is learned; 0 in the first.

    Source: released code of LTP.
    """
    return theta_final * layer / depth


def soft_mask(score: Tensor, theta: float | Tensor, temperature: float) -> Tensor:
    """Factors of the tokens while thresholds are learned: ``sigmoid((score - theta) / temperature)``, float32.

    Source: Kim et al., KDD 2022, section 3.3.
    """
    return torch.sigmoid((score.float() - theta) / temperature)
