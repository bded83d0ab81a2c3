"""PiToMe: rank tokens by how crowded their neighbourhood is (energy), merge the crowded ones, protect the isolated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.kernels.similarity_rows import best_match, similarity_sum
from tokred.matching import match_to
from tokred.method import Method
from tokred.methods.tome import Metric, check_choice, read_metric
from tokred.reduction import Reduction
from tokred.registry import register
from tokred.schedules import kept
from tokred.selection import protected_rows, ranked
from tokred.site import Site

Form = Literal["plain", "bsm", "bsm-plain", "plain-bsm", "halves"]


@register("pitome")
@dataclass(frozen=True)
class PiToMe(Method):
    """Spectrum-preserving token merging.

    Args:
        ratio: share of the unprotected tokens that each layer keeps, in (0, 1]. At most half can go in one layer; a
            smaller ratio is capped there.
        margin: similarity margin at the first layer; it falls linearly to 0 over the depth. 0.9 in the paper, 0.75 in
            the released code for DeiT and MAE.
        alpha: floor of the clamp on dissimilar pairs.
        form: ``"plain"`` (the 2k most crowded tokens are paired, all k sources merge), ``"bsm"`` (ToMe's top-k of the
            energy order), or one in the first half of the layers and the other after: ``"bsm-plain"`` as released for
            DeiT, ``"plain-bsm"`` for MAE. ``"halves"`` is the released text form: the k most crowded tokens
            merge into the next k.
        energy: ``"elu"``, or ``"gaussian"`` (the released text form).
        prop_attn: proportional attention, as in the paper (the released vision code does not feed sizes to attention).
        metric: what is compared.

    Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024, section 3.
    """

    summary: ClassVar[str] = "merge tokens of crowded neighbourhoods (high energy), protect isolated ones"
    source: ClassVar[str] = "Tran et al., NeurIPS 2024 (arXiv 2405.16148)"

    ratio: float = 1.0
    margin: float = 0.9
    alpha: float = 1.0
    form: Form = "bsm-plain"
    energy: Literal["elu", "gaussian"] = "elu"
    prop_attn: bool = True
    metric: Metric = "k"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is the kept share and must lie in (0, 1], got {self.ratio!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must lie in [-1, 1], got {self.margin!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if self.energy == "gaussian" and self.margin == 1:
            raise ValueError("margin must be below 1 with the gaussian energy, whose width is 1 - margin")
        check_choice("form", self.form, ("plain", "bsm", "bsm-plain", "plain-bsm", "halves"))
        check_choice("energy", self.energy, ("elu", "gaussian"))
        check_choice("metric", self.metric, ("k", "q", "v", "x"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what is compared."""
        return frozenset({"x", self.metric})

    @property
    def proportional(self) -> bool:
        """As ``prop_attn`` says."""
        return self.prop_attn

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """``n`` less ``floor(T - T * ratio)`` of the ``T`` unprotected ones."""
        return n - self._removed(n - prefix - suffix)

    def _removed(self, free: int) -> int:
        return min(kept(free, 1 - self.ratio), free // 2)

    def _form(self, layer: int, depth: int) -> str:
        first, _, second = self.form.partition("-")
        return first if not second or layer < math.ceil(depth / 2) else second

    def reduce(self, site: Site) -> Reduction:
        """Rank by energy, pair by rank, merge."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        k = self._removed(free)
        if k == 0:
            return Reduction.identity((b,), n, site.device)
        metric = read_metric(site, self.metric)
        order = self.order(metric[:, site.prefix : n - site.suffix], site.layer, site.depth) + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        form = self._form(site.layer, site.depth)
        if form != "bsm":
            if form == "plain":
                a, receiving = order[:, 0 : 2 * k : 2], order[:, 1 : 2 * k : 2]
            else:
                a, receiving = order[:, :k], order[:, k : 2 * k]
            protected = order[:, 2 * k :]
            return match_to(metric, a, receiving, lead=torch.cat([lead, protected], 1), tail=tail)
        return _bsm(metric, order, k, lead, tail)

    def order(self, metric: Tensor, layer: int = 0, depth: int = 1) -> Tensor:
        """``(B, T)`` positions by descending energy, ties to the lower index."""
        return ranked(self.energies(metric, layer, depth))

    def energies(self, metric: Tensor, layer: int = 0, depth: int = 1) -> Tensor:
        """``(B, T)`` energy of each token: mean over all tokens of the clamped similarity. High means redundant."""
        margin = self.margin * (1 - layer / depth)
        function: Literal["elu", "gaussian"] = self.energy
        with torch.no_grad():
            return similarity_sum(metric, metric, function=function, margin=margin, alpha=self.alpha, mean=True)


def _bsm(metric: Tensor, order: Tensor, k: int, lead: Tensor, tail: Tensor) -> Reduction:
    """ToMe's step on tokens in energy order: even ranks against odd ranks, the top ``k`` pairs merge."""
    d = metric.shape[-1]
    a, b = order[:, ::2], order[:, 1::2]
    with torch.no_grad():
        score, match = best_match(
            metric.gather(1, a.unsqueeze(-1).expand(-1, -1, d)), metric.gather(1, b.unsqueeze(-1).expand(-1, -1, d))
        )
        rank = ranked(score)
        merged, unmerged = rank[:, :k], rank[:, k:]
        target = match.gather(1, merged) + lead.shape[1] + unmerged.shape[1]
    representative = torch.cat([lead, a.gather(1, unmerged), b, tail], dim=1)
    return Reduction(representative, a.gather(1, merged), target, metric.shape[1])
