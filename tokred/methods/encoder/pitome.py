"""PiToMe: rank tokens by how crowded their neighbourhood is (energy), merge the crowded ones, protect the isolated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_flags, check_number
from tokred.core.matching import bipartite_soft_matching, bipartite_uneven_matching, match_to
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import Compared
from tokred.encoder.metric import Metric, read_metric
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match, similarity_sum

Form = Literal["plain", "bsm", "bsm-plain", "plain-bsm", "tome-plain", "halves"]
FORMS = ("plain", "bsm", "bsm-plain", "plain-bsm", "tome-plain", "halves")

# Settings of the released code, by the kind of model that it runs them on.
PRESETS: dict[str, dict[str, Any]] = {
    "deit": {"margin": 0.75, "form": "bsm-plain", "prop_attn": False},
    "mae": {"margin": 0.75, "form": "plain-bsm", "prop_attn": False},
    "augreg": {"margin": 0.9, "form": "bsm-plain", "prop_attn": False},
    "blip": {"margin": 0.9, "form": "plain", "prop_attn": False, "metric": "x", "start": 1},
    "clip": {"margin": 0.95, "form": "plain", "prop_attn": False, "metric": "x"},
    "clip-hf": {
        "margin": 0.9, "form": "tome-plain", "turn": 13, "prop_attn": False, "metric": "x", "size_weighted": False,
    },
    "bert": {
        "margin": 0.9, "fall": 0.25, "form": "halves", "energy": "gaussian", "stop": 3, "prop_attn": False,
        "size_weighted": False,
    },
}  # fmt: skip


@register("pitome")
@dataclass(frozen=True)
class PiToMe(Compared):
    """Spectrum-preserving token merging.

    Args:
        ratio: share of the unprotected tokens that each layer keeps, in (0, 1]. At most half can go in one layer; a
            smaller ratio is capped there.
        margin: similarity margin at the first layer; it falls linearly to 0 over the depth. 0.9 in the paper, 0.75 in
            the released code for DeiT and MAE.
        alpha: floor of the clamp on dissimilar pairs.
        form: ``"plain"`` (the 2k most crowded tokens are paired, all k sources merge), ``"bsm"`` (ToMe's top-k of the
            energy order), or one in the first half of the layers and the other after: ``"bsm-plain"`` as released for
            DeiT, ``"plain-bsm"`` for MAE, ``"tome-plain"`` (ToMe's own matching, by position, first) for CLIP.
            ``"halves"`` is the released text form: the k most crowded tokens merge into the next k.
        energy: ``"elu"``, or ``"gaussian"`` (the released text form).
        prop_attn: proportional attention, as in the paper (the released vision code does not feed sizes to attention).
        metric: what is compared.
        fall: how far the margin falls over the depth. None: to 0.
        start, stop: it acts in the blocks from ``start`` up to, not including, ``stop``. None: to the last.
        turn: block at which the second of two forms begins. None: half of the depth, rounded up.
        size_weighted: weigh the mean by the sizes of the tokens; False is the plain mean of each step.

    Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024, section 3.
    """

    summary: ClassVar[str] = "merge tokens of crowded neighbourhoods (high energy), protect isolated ones"
    source: ClassVar[str] = "Tran et al., NeurIPS 2024 (arXiv 2405.16148)"
    example: ClassVar[Parameters] = {"ratio": 0.8}
    nothing: ClassVar[Parameters | None] = {"ratio": 1.0}
    usual: ClassVar[Parameters] = {"ratio": 0.9}

    ratio: float = 1.0
    margin: float = 0.9
    alpha: float = 1.0
    form: Form = "bsm-plain"
    energy: Literal["elu", "gaussian"] = "elu"
    prop_attn: bool = True
    metric: Metric = "k"
    fall: float | None = None
    start: int = 0
    stop: int | None = None
    turn: int | None = None
    size_weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(size_weighted=self.size_weighted)
        for name in ("margin", "alpha", "fall"):
            if not (name == "fall" and self.fall is None):
                check_number(getattr(self, name), name)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is the kept share and must lie in (0, 1], got {self.ratio!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must lie in [-1, 1], got {self.margin!r}")
        if self.fall is not None and not 0 <= self.fall <= 2:
            raise ValueError(f"fall must lie in [0, 2], got {self.fall!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if self.energy == "gaussian" and self.margin == 1:
            raise ValueError("margin must be below 1 with the gaussian energy, whose width is 1 - margin")
        for name in ("start", "stop", "turn"):
            value = getattr(self, name)
            if not (value is None and name != "start"):
                check_count(value, name)
        if self.stop is not None and self.start >= self.stop:
            raise ValueError(f"start must lie before stop, got start={self.start} and stop={self.stop}")
        check_choice(self.form, "form", FORMS)
        check_choice(self.energy, "energy", ("elu", "gaussian"))

    @classmethod
    def preset(cls, host: str, ratio: float, **changes: Any) -> PiToMe:
        """The settings of the released code for a kind of model.

        Args:
            host: ``"deit"``, ``"mae"``, ``"augreg"`` (classification); ``"blip"`` and ``"clip"`` (retrieval and
                captions, the towers of lavis), ``"clip-hf"`` (the tower of LLaVA, 24 blocks); ``"bert"`` (text).
            ratio: see the class.
            changes: other parameters, over those of the release.

        Raises:
            ValueError: no such host, or a parameter does not fit.
        """
        check_choice(host, "host", tuple(PRESETS))
        return cls(**{**PRESETS[host], "ratio": ratio, **changes})

    def check(self, depth: int) -> None:
        """The first block must exist."""
        if self.start >= depth:
            raise ValueError(f"start is {self.start}, but the model has {depth} blocks (0 to {depth - 1})")

    def tokens(self, n: int, place: Place) -> int:
        """``n`` less ``floor(T - T * ratio)`` of the ``T`` unprotected ones."""
        acts = self.start <= place.layer and (self.stop is None or place.layer < self.stop)
        return n - self._removed(place.free(n)) if acts else n

    def _removed(self, free: int) -> int:
        return min(kept(free, 1 - self.ratio), free // 2)

    def _form(self, layer: int, depth: int) -> str:
        first, _, second = self.form.partition("-")
        turn = math.ceil(depth / 2) if self.turn is None else self.turn
        return first if not second or layer < turn else second

    def reduce(self, site: Site) -> Reduction:
        """Rank by energy, pair by rank, merge."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        if self._removed(free) == 0:
            return Reduction.identity((b,), n, site.device)
        metric = read_metric(site, self.metric)
        step = self._even(metric, site) if site.mask is None else self._uneven(metric, site, site.mask)
        return step if self.size_weighted or step.trivial else replace(step, by_size=False)

    def _even(self, metric: Tensor, site: Site) -> Reduction:
        """Every sample has the same number of tokens."""
        b, n = site.shape
        k = self._removed(n - site.prefix - site.suffix)
        form = self._form(site.layer, site.depth)
        if form == "tome":
            return bipartite_soft_matching(metric, k, prefix=site.prefix, suffix=site.suffix)
        order = self.order(metric[:, site.prefix : n - site.suffix], site.layer, site.depth) + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        if form == "bsm":
            return _bsm(metric, order, k, lead, tail)
        if form == "plain":
            a, receiving = order[:, 0 : 2 * k : 2], order[:, 1 : 2 * k : 2]
        else:
            a, receiving = order[:, :k], order[:, k : 2 * k]
        return match_to(metric, a, receiving, lead=torch.cat([lead, order[:, 2 * k :]], 1), tail=tail)

    def _uneven(self, metric: Tensor, site: Site, mask: Tensor) -> Reduction:
        """Padding takes no part, and each sample merges the share of its own tokens."""
        n = site.shape[1]
        real = mask[:, site.prefix : n - site.suffix]
        number = real.sum(1)
        # The floor of ``kept``, for tensors.
        k = torch.minimum((number.double() * (1 - self.ratio) + 5e-10).floor().long(), number // 2)
        form = self._form(site.layer, site.depth)
        if form == "tome":
            return bipartite_uneven_matching(metric, lambda _: k, prefix=site.prefix, suffix=site.suffix, mask=mask)
        inner = metric[:, site.prefix : n - site.suffix].detach()
        energy = self.energies(inner, site.layer, site.depth, real).masked_fill(~real, -torch.inf)
        return _by_rank(inner, ranked(energy), real, k, form, n, site.prefix, site.suffix)

    def order(self, metric: Tensor, layer: int = 0, depth: int = 1) -> Tensor:
        """``(B, T)`` positions by descending energy, ties to the lower index."""
        return ranked(self.energies(metric, layer, depth))

    def energies(self, metric: Tensor, layer: int = 0, depth: int = 1, real: Tensor | None = None) -> Tensor:
        """``(B, T)`` energy of each token: mean over all tokens of the clamped similarity. High means redundant.

        Args:
            metric: ``(B, T, D)`` of the unprotected tokens.
            layer, depth: which block, of how many: decides the margin.
            real: ``(B, T)`` bool, False on padding, which counts for nobody; None: all are real.
        """
        share = layer / depth
        margin = self.margin * (1 - share) if self.fall is None else self.margin - self.fall * share
        function: Literal["elu", "gaussian"] = self.energy
        options: dict[str, Any] = {"function": function, "margin": margin, "alpha": self.alpha, "mean": True}
        with torch.no_grad():
            return similarity_sum(metric, metric, a_mask=real, b_mask=real, **options)


def _bsm(metric: Tensor, order: Tensor, k: int, lead: Tensor, tail: Tensor) -> Reduction:
    """ToMe's step on tokens in energy order: even ranks against odd ranks, the top ``k`` pairs merge."""
    a, b = order[:, ::2], order[:, 1::2]
    with torch.no_grad():
        score, match = best_match(gather_rows(metric, a), gather_rows(metric, b))
        rank = ranked(score)
        merged, unmerged = rank[:, :k], rank[:, k:]
        target = match.gather(1, merged) + lead.shape[1] + unmerged.shape[1]
    representative = torch.cat([lead, a.gather(1, unmerged), b, tail], dim=1)
    return Reduction(representative, a.gather(1, merged), target, metric.shape[1])


def _by_rank(
    metric: Tensor, order: Tensor, real: Tensor, k: Tensor, form: str, n: int, prefix: int, suffix: int
) -> Reduction:
    """Matching in all forms in which the rank decides who is a source, with a number of pairs for each sample.

    Args:
        metric: ``(B, T, D)`` of the unprotected tokens.
        order: ``(B, T)`` these by descending energy, padding last.
        real: ``(B, T)`` bool.
        k: ``(B,)`` pairs to merge. A sample with 0 keeps its order.
        form: ``"plain"``, ``"bsm"`` or ``"halves"``.
        n, prefix, suffix: of the whole sequence.
    """
    b, free = metric.shape[:2]
    rank, pairs = torch.arange(free, device=order.device).expand(b, -1), k.unsqueeze(1)
    by_rank = real.gather(1, order)
    if form == "bsm":
        a, receives = by_rank & (rank % 2 == 0), by_rank & (rank % 2 == 1)
    elif form == "plain":
        a, receives = (rank < 2 * pairs) & (rank % 2 == 0), (rank < 2 * pairs) & (rank % 2 == 1)
    else:
        a, receives = rank < pairs, (rank >= pairs) & (rank < 2 * pairs)
    with torch.no_grad():
        rows = gather_rows(metric, order)
        score, match = best_match(rows, rows, a_mask=a, b_mask=receives)
        # Sources by falling similarity; behind them all others, still by falling energy.
        line = ranked(score)
        goes = rank < pairs
        stays = by_rank.gather(1, line) & ~receives.gather(1, line) & ~goes
        stays, line_of_all = torch.cat([stays, receives], 1), torch.cat([line, rank], 1)
        slot = (stays.cumsum(1) - 1 + prefix)[:, free:]
        target = torch.where(goes, slot.gather(1, match.gather(1, line)), -1)
        source = order.gather(1, line) + prefix
        place = order.gather(1, line_of_all)
        # A sample that merges nothing keeps its order.
        stays = torch.where(pairs > 0, stays, torch.cat([real, torch.zeros_like(real)], 1))
        place = torch.where(pairs > 0, place, torch.cat([rank, rank], 1))
        packed, mask = pack(place + prefix, stays, most=free)
    representative, mask = with_protected(packed, mask, n, prefix, suffix)
    return Reduction(representative, source, target, n, mask=mask)
