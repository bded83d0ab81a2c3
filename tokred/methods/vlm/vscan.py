"""VScan: image tokens by a local and a global scan; the others merge into their nearest kept one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share
from tokred.core.matching import match_to
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, ranked
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth, check_layer
from tokred.vlm.tools.budget import Budget, as_budget, count_of


@register("vscan")
@dataclass(frozen=True)
class VScan(Budgeted):
    """VScan's first stage, between vision tower and language model.

    A part of the budget goes to the tokens that the class token attends to in a shallow layer, the same number in every
    window of the grid; the rest to those that it attends to in the layer whose features are used. Tokens that are not
    kept are averaged into the kept token with the most similar projected features.

    The second stage, inside the language model, is :class:`tokred.VScanLayer`.

    Args:
        budget: tokens kept of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        local_ratio: share of the budget for the windows, in [0, 1].
        window: side of a window in tokens. At the edges windows may be smaller (ours: the authors have 4 x 4
            whole ones).
        shallow: layer of the tower that scores the windows, 0-based; negative ones count from the end.
        exact_budget: what the windows cannot share evenly goes to the global part, so that the budget is met; False
            loses it, as the authors' code does.

    Source: Zhang et al., VScan, TMLR 2026 (arXiv 2505.22654), section 4, and its released code.
    """

    summary: ClassVar[str] = "image tokens by windows and by the whole image; the others merge into them"
    source: ClassVar[str] = "Zhang et al., TMLR 2026 (arXiv 2505.22654)"
    example: ClassVar[Parameters] = {"budget": 6, "window": 2, "shallow": 0}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0, "shallow": 0}

    budget: Budget = 96
    local_ratio: float = 0.5
    window: int = 6
    shallow: int = 5
    exact_budget: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.local_ratio, "local_ratio", zero=True)
        check_count(self.window, "window", 1)
        if isinstance(self.shallow, bool) or not isinstance(self.shallow, int):
            raise ValueError(f"shallow must be an integer, got {self.shallow!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, their grid, and the class token's attention in two layers."""
        return frozenset({"x", "grid", "class_attention", "tower_layers"})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.shallow,)

    @property
    def drops(self) -> bool:
        """Never."""
        return False

    def choose(self, site: VisualSite) -> Reduction:
        """Scan the windows, scan the image, merge the rest."""
        n = site.shape[1]
        total = self.count(n)
        kept = self.select(
            site.layer_class_attention(self.shallow).mean(1), site.class_attention, total, window_of(site, self.window)
        )
        return replace(match_to(site.x.detach(), besides(kept, n), kept), by_size=False)

    def select(self, shallow: Tensor, deep: Tensor, total: int, window: Tensor) -> Tensor:
        """``(B, K)`` int64 the kept tokens in ascending order.

        Args:
            shallow: ``(B, N)`` scores for the windows.
            deep: ``(B, N)`` scores for the whole image.
            total: the budget.
            window: ``(N,)`` int64, the window of each token, on the CPU.
        """
        share = int(round(total * self.local_ratio, 9))
        sizes = window.bincount()
        each = share // len(sizes)
        starts = sizes.cumsum(0) - sizes
        # Sorted by windows, and within them by score, the places of the winners are the same in every sample.
        place = torch.cat(
            [torch.arange(s, s + min(each, c)) for s, c in zip(starts.tolist(), sizes.tolist(), strict=True)]
        )
        order = ranked(shallow)
        grouped = order.gather(1, window.to(order.device)[order].argsort(dim=1, stable=True))
        local = grouped[:, place.to(order.device)]
        count = total - (local.shape[1] if self.exact_budget else share)
        ahead = ranked(deep.scatter(1, local, -torch.inf))[:, :count]
        return torch.cat([local, ahead], 1).sort(dim=1).values


@register("vscan_layer")
@dataclass(frozen=True)
class VScanLayer(LayerMethod):
    """VScan's second stage: before one decoder layer, keep the visual tokens that the prompt's last token attends to.

    The attention is that of the layer itself, computed for one row before it runs.

    Args:
        budget: visual tokens kept of each sample, an integer or a share in (0, 1].
        layer: 0-based, at least 1; None: at half of the depth (16 of 32, 14 of 28).

    Source: Zhang et al., VScan, TMLR 2026 (arXiv 2505.22654), section 4, and its released code.
    """

    summary: ClassVar[str] = "at half of the depth keep the visual tokens that the last prompt token attends to"
    source: ClassVar[str] = "Zhang et al., TMLR 2026 (arXiv 2505.22654)"
    example: ClassVar[Parameters] = {"budget": 5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 32
    layer: int | None = None

    def __post_init__(self) -> None:
        as_budget(self.budget)
        if self.layer is not None:
            check_layer(self.layer)

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and rows of the layer's own attention."""
        return frozenset({"x", "rows"})

    def check(self, depth: int) -> None:
        if self.layer is not None:
            check_depth(self.layer, depth)

    def tokens(self, n: int, place: Place) -> int:
        """The budget at its layer."""
        here = place.depth // 2 if self.layer is None else self.layer
        return count_of(self.budget, n) if place.layer == here else n

    def choose(self, site: LayerSite) -> Reduction:
        """Keep the visual tokens with the highest scores."""
        counts = tuple(count_of(self.budget, n) for n in site.counts)
        return site.keep_visual(site.best_visual(site.row_scores(1, of="own"), counts), counts)


def window_of(site: VisualSite, side: int) -> Tensor:
    """``(N,)`` int64 on the CPU: the window of each token, numbered row by row, frame by frame.

    Args:
        site: with the grid of its tokens.
        side: of a window.
    """
    rows, columns = site.grid
    wide = -(-columns // side)
    one = (torch.arange(rows).unsqueeze(1) // side * wide + torch.arange(columns) // side).flatten()
    frames = site.shape[1] // len(one)
    return (torch.arange(frames).unsqueeze(1) * (-(-rows // side) * wide) + one).flatten()
