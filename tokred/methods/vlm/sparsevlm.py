"""SparseVLM: words of the question rate the visual tokens, layer by layer; the best losers are recycled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_blocks, check_choice, check_count, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.kernels.column_scores import column_scores
from tokred.vlm.in_llm import LayerMethod, LayerSite, Prompt, check_depth
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.cluster import density_peaks

# Visual tokens kept behind layers 2, 6 and 15, of 576, by the average that the authors name each setting after.
TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
WHOLE = 576
# Multiples of the rank that the first version keeps.
SCALES = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(LayerMethod):
    """Text-guided pruning inside the language model, in several steps.

    Raters are the tokens of the question whose input embeddings answer to the image's more than the mean. Behind each
    listed layer the visual tokens with the most attention from the raters stay, mean over heads. Of those that leave
    the better ``recycle`` part is clustered, and each cluster lives on as the mean of its members.

    Args:
        layers: decoder layers whose attention decides, 0-based and increasing; tokens leave behind them.
        budget: how many visual tokens stay, recycled ones aside. ``"auto"``: the table for samples whose images have
            576 tokens each, as those of LLaVA-1.5, where there are three layers; the rank for others (ours).
            ``"table"``: as the released code has it for
            ``average``, in proportion where an image does not have 576; ``"rank"``: the share ``strength`` of what
            exceeds the rank of the raters' attention leaves, as the paper says; ``"scale"``: a multiple of that rank
            stays, as the first released version has it; or a tuple with a number, or a share of the tokens before the
            first layer, for each of ``layers``.
        average: 192, 128, 96 or 64; for ``"scale"`` not 96.
        strength: see above, in (0, 1]; the paper's lambda.
        recycle: share of the tokens that leave which is recycled, in [0, 1]; 0: none, as in the second version.
        cluster: tokens of a cluster, on average.
        heads: ``"mean"``, or ``"priority"``: the mean over the half of the heads in which the raters attend most to
            visual tokens, as in the second version (whose correction for rotary distance is not here).

    Source: Zhang et al., SparseVLM, ICML 2025, sections 3.2 to 3.4, and its released code, versions 1.0 to 2.0.
    """

    summary: ClassVar[str] = "raters of the question choose visual tokens, layer by layer; the best losers are recycled"
    source: ClassVar[str] = "Zhang et al., ICML 2025 (arXiv 2410.04417)"
    example: ClassVar[Parameters] = {"layers": (0, 1), "budget": (0.5, 0.25)}

    layers: tuple[int, ...] = (2, 6, 15)
    budget: Literal["auto", "table", "rank", "scale"] | tuple[Budget, ...] = "auto"
    average: int = 192
    strength: float = 0.5
    recycle: float = 0.3
    cluster: int = 10
    heads: Literal["mean", "priority"] = "mean"

    def __post_init__(self) -> None:
        layers = check_blocks(self.layers, "layers") or ()
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be increasing, at least one, got {self.layers!r}")
        object.__setattr__(self, "layers", layers)
        if isinstance(self.budget, str):
            check_choice(self.budget, "budget", ("auto", "table", "rank", "scale"))
            allowed = SCALES if self.budget == "scale" else TABLES
            if self.average not in allowed:
                raise ValueError(f"average is {self.average!r}; allowed are {', '.join(map(str, allowed))}")
            if self.budget == "table" and len(layers) != 3:
                raise ValueError(f"the table has numbers for three layers, got {len(layers)}: give budget as a tuple")
        elif not isinstance(self.budget, Sequence) or len(self.budget) != len(layers):
            raise ValueError(
                f"budget must name a number or share for each of {len(layers)} layers, got {self.budget!r}"
            )
        else:
            object.__setattr__(self, "budget", tuple(as_budget(b, f"budget[{i}]") for i, b in enumerate(self.budget)))
        check_share(self.strength, "strength")
        check_share(self.recycle, "recycle", zero=True)
        check_count(self.cluster, "cluster", 1)
        check_choice(self.heads, "heads", ("mean", "priority"))
        check_count(self.average, "average", 1)

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, rows of the attention of the layer before, and the embeddings of the prompt."""
        return frozenset({"x", "rows_before", "prompt"})

    def check(self, depth: int) -> None:
        """Every layer must exist, and have one behind it."""
        check_depth(self.layers[-1] + 1, depth, "the layer behind the last of layers")

    def tokens(self, n: int, place: Place) -> int:
        """At most one less where it acts: what is left depends on the prompt's first count."""
        return n - 1 if n > 1 and place.layer - 1 in self.layers else n

    def choose(self, site: LayerSite) -> Reduction:
        """Rate, keep the best, recycle some of the others."""
        rows = raters(site.prompt)
        scores = self.scores(site, rows)
        counts = self.kept(site, rows)
        stays = site.best_visual(scores, counts)
        if self.recycle == 0:
            return site.keep_visual(stays, counts)
        return recycled(site, stays, scores, self.recycle, self.cluster)

    def scores(self, site: LayerSite, rows: Tensor) -> Tensor:
        """``(B, L)`` float32: attention of the raters to every column.

        Args:
            site: of a layer.
            rows: ``(B, L)`` bool, the raters.
        """
        if self.heads == "mean":
            return site.row_scores(rows, of="before")
        found = site.row_scores(rows, of="before", heads="none")
        total = (found * site.visual.unsqueeze(1)).sum(-1)
        best = ranked(total)[:, : -(-total.shape[1] // 2)]
        return found.gather(1, best.unsqueeze(-1).expand(-1, -1, found.shape[-1])).mean(1)

    def kept(self, site: LayerSite, rows: Tensor) -> tuple[int, ...]:
        """How many visual tokens of each sample stay, at least one and at most all but one."""
        stage = self.layers.index(site.layer - 1)
        rules = [self._rule(n) for n in site.initial]
        ranks = self.ranks(site, rows) if {"rank", "scale"} & set(rules) else [0] * len(rules)
        found = []
        for rule, first, n, rank in zip(rules, site.initial, site.counts, ranks, strict=True):
            most = n
            if isinstance(self.budget, tuple):
                wanted = count_of(self.budget[stage], first) if first else 0
            elif rule == "table":
                wanted = round(round(first * TABLES[self.average][stage] / WHOLE, 9))
            else:
                wanted = self._by_rank(n, rank, rule)
            if rule != "rank":
                most = max(n - 1, min(n, 1))
            found.append(min(max(wanted, min(n, 1)), most))
        return tuple(found)

    def _rule(self, n: int) -> str:
        """The way in which the tokens of a sample are counted that had ``n`` visual ones."""
        if self.budget != "auto":
            return self.budget if isinstance(self.budget, str) else "given"
        return "table" if n % WHOLE == 0 and len(self.layers) == 3 else "rank"

    def _by_rank(self, n: int, rank: int, rule: str) -> int:
        if rule == "rank":
            return n - int(round(self.strength * (n - rank), 9))
        scale, bias = SCALES[self.average]
        return int(round(rank * scale + bias, 9))

    def ranks(self, site: LayerSite, rows: Tensor) -> list[int]:
        """The rank of the raters' attention to the visual tokens of each sample; waits for the device."""
        order = (~rows).to(torch.uint8).argsort(dim=1, stable=True)
        most = int(rows.sum(1).max())
        place = torch.arange(rows.shape[1], device=rows.device)
        found = []
        for i in range(most):
            one = (place == order[:, i : i + 1]) & rows
            found.append(site.row_scores(one, of="before") * one.any(1, keepdim=True))
        matrix = torch.stack(found, 1) * site.visual.unsqueeze(1)
        return [int(r) for r in torch.linalg.matrix_rank(matrix.float()).tolist()]


def raters(prompt: Prompt) -> Tensor:
    """The tokens of the question that answer to the image more than the mean.

    Every visual token shares its attention out among the text behind the last visual token, by the product of their
    input embeddings; raters get more than an even share, on average. Where all get the same, all are raters; where no
    text stands behind the image, the text before it counts.

    Args:
        prompt: embeddings before the first layer.

    Returns:
        ``(B, L)`` bool at the columns that are left.

    Source: Zhang et al., SparseVLM, ICML 2025, section 3.2.
    """
    visual, text = prompt.visual, prompt.text
    behind = text & ~visual.flip(1).cummax(1).values.flip(1)
    text = torch.where(behind.any(1, keepdim=True), behind, text)
    e = prompt.embeds.unsqueeze(1)
    weight = visual / visual.sum(1, keepdim=True).clamp_min(1)
    share = column_scores(e, e, weight, scale=1.0, key_mask=text).squeeze(1)
    mean = 1 / text.sum(1, keepdim=True).clamp_min(1)
    found = text & (share > mean * (1 + 1e-5))
    return torch.where(found.any(1, keepdim=True), found, text).gather(1, prompt.columns)


def recycled(site: LayerSite, stays: Tensor, scores: Tensor, share: float, size: int) -> Reduction:
    """Keep some visual tokens, and clusters of the best of the others, each at the place of its centre.

    Args:
        site: of a layer.
        stays: ``(B, L)`` bool, the visual tokens that stay.
        scores: ``(B, L)``.
        share: of the others that are clustered.
        size: of a cluster, on average.
    """
    order = ranked(scores.masked_fill(~site.visual | stays, -torch.inf))
    lost = (site.visual & ~stays).sum(1).tolist()
    kept = stays | ~site.visual
    joined: list[tuple[Tensor, Tensor]] = []
    for i, d in enumerate(lost):
        if d == 0:
            joined.append((order[i, :0], order[i, :0]))
            continue
        m = min(d, int(round(share * d, 9)) + 1)
        members = order[i, :m].sort().values
        count = m // size + 1 if m // size + 1 <= m else m
        found = density_peaks(site.x[i : i + 1, members], count, count)
        centres = members[found.centre[0]]
        kept[i, centres] = True
        joined.append((members, centres[found.group[0]]))
    plan = site.keep_columns(kept)
    if plan.trivial:
        return plan
    slot = plan.index
    most = max(len(members) for members, _ in joined)
    source = torch.stack([F.pad(members, (0, most - len(members))) for members, _ in joined])
    target = torch.stack(
        [F.pad(slot[i, centre].masked_fill(centre == members, -1), (0, most - len(members)), value=-1)
         for i, (members, centre) in enumerate(joined)]
    )  # fmt: skip
    return replace(plan, source=source, target=target, mode="mean", by_size=False)
