"""SAINT in vision-language models: inside the language model, and between the vision tower and it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.encoder.metric import head_mean
from tokred.kernels.gather_rows import gather_rows
from tokred.methods.encoder.saint import SAINT
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth
from tokred.vlm.tools.budget import Budget


@register("saint_layer")
@dataclass(frozen=True)
class SAINTLayer(LayerMethod):
    """SAINT inside the language model: after each of several layers visual tokens with many near-copies leave.

    As :class:`tokred.SAINT` with ``form="graph"``, on the visual tokens of a sample in their order and the keys of the
    layer that has just run: those at even places are sources, those at odd ones destinations. How many leave follows
    the image. With :class:`tokred.SAINTVisual` before it, this is SAINT's hybrid mode.

    Args:
        start, end: the first and the last layer whose keys decide, 0-based; tokens leave behind them. Layers that the
            model does not have are left out, as long as it has the first.
        tau: similarity from which on two tokens are joined.
        K: edges that make a token redundant.
        gamma: how much the mean strength of a token's edges counts beside their number.
        count: ``"image"``: each sample loses what its own graph says (ours); ``"batch"``: all the same number, the mean
            over the batch rounded down.
        max_r: at most so many leave per layer and sample (ours).
        min_tokens: keep at least so many visual tokens of each sample (ours).

    Source: Jeddi et al., Similarity-Aware Token Pruning: Your VLM but Faster, 2025, and its released code.
    """

    summary: ClassVar[str] = "inside the LLM drop visual tokens with many near-copies, as many as each image has"
    source: ClassVar[str] = "Jeddi et al., 2025 (arXiv 2503.11549)"
    example: ClassVar[Parameters] = {"start": 0, "end": 1, "tau": 0.2, "K": 1}
    nothing: ClassVar[Parameters | None] = {"start": 0, "end": 1, "tau": 2.0}

    start: int = 7
    end: int = 16
    tau: float = 0.83
    K: int = 5
    gamma: float = 10.0
    count: Literal["image", "batch"] = "image"
    max_r: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        check_count(self.start, "start")
        check_count(self.end, "end", self.start)
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not math.isfinite(self.tau):
            raise ValueError(f"tau must be a finite number, got {self.tau!r}")
        _ = self.graph

    @property
    def graph(self) -> SAINT:
        """The method whose graph this is."""
        return SAINT(
            tau=self.tau, K=self.K, gamma=self.gamma, count=self.count, max_r=self.max_r, min_tokens=self.min_tokens
        )

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and keys of the layer before."""
        return frozenset({"x", "rows_before"})

    def check(self, depth: int) -> None:
        """The first layer must exist, and have one behind it."""
        check_depth(self.start + 1, depth, "start + 1, where the first tokens leave,")

    def tokens(self, n: int, place: Place) -> int:
        """At most ``n``: how many leave depends on the image."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """True behind the layers from ``start`` to ``end``, where there are sources and destinations, and a cosine can
        reach the threshold."""
        inside = self.start < place.layer <= self.end + 1 and self.tau <= 1
        return inside and self.max_r != 0 and n > max(1, self.min_tokens)

    def choose(self, site: LayerSite) -> Reduction:
        """Drop the most redundant tokens."""
        most = max(site.counts)
        columns = visual_columns(site, most)
        place = torch.arange(most, device=site.device)
        real = None
        if min(site.counts) < most:
            real = place < torch.tensor(site.counts, device=site.device).unsqueeze(1)
        keys = head_mean(site.attention_of("before").k[:, :, -site.shape[1] :].float())
        score, degree = self.graph.redundancy(gather_rows(keys, columns), self.tau, real)
        r = self.graph.number_dropped(degree, most, real)
        sources = ranked(score) * 2
        leaves = place[: sources.shape[1]] < r.unsqueeze(1)
        gone = torch.zeros(site.shape, dtype=torch.bool, device=site.device)
        gone = gone.scatter(1, columns.gather(1, sources), leaves)
        return site.keep_columns(~gone | site.last)


@register("saint_visual")
@dataclass(frozen=True)
class SAINTVisual(Budgeted):
    """SAINT's full graph on a layer of the vision tower, down to a budget, before the language model.

    The patches whose keys are most similar to all others leave, a ``q``-th part at a time, and the sums of similarities
    are taken anew over those that are left. The authors drop them inside the tower, behind layer 19 of 24; here the
    tower runs on all of them, so that features of the kept ones may differ a little, and the language model gets the
    same ones.

    Args:
        budget: tokens kept of each image, an integer or a share in (0, 1]. The authors keep 375 of 576.
        q: divisor.
        layer: of the tower whose keys are compared, 0-based; negative ones count from the end.

    Source: Jeddi et al., Similarity-Aware Token Pruning: Your VLM but Faster, 2025, and its released code.
    """

    summary: ClassVar[str] = "drop the patches most similar to all others, by keys of a layer of the tower"
    source: ClassVar[str] = "Jeddi et al., 2025 (arXiv 2503.11549)"
    example: ClassVar[Parameters] = {"budget": 5, "layer": 1}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0, "layer": 1}

    budget: Budget = 375
    q: int = 16
    layer: int = 19

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.q, "q", 1)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"layer must be an integer, got {self.layer!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and keys of a layer of the tower."""
        return frozenset({"x", "tower_layers"})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """The one whose keys are compared."""
        return (self.layer,)

    def choose(self, site: VisualSite) -> Reduction:
        """Drop visual tokens that have many near-copies."""
        keys = site.layer_heads(self.layer)[1][:, :, site.prefix :]
        return SAINT(form="full", M=self.count(site.shape[1]), q=self.q).reduce(Site(k=keys.float()))


def visual_columns(site: LayerSite, most: int) -> Tensor:
    """``(B, most)`` int64: the columns of each sample's visual tokens, in order; behind them other columns."""
    return (~site.visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
