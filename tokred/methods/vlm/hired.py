"""HiRED: a budget for the tiles of a high-resolution image, by what the class token sees where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_share, is_count
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept
from tokred.core.selection import highest, ranked
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.tools.budget import Budget, largest_remainder
from tokred.vlm.tools.tiles import Tiles


@register("hired")
@dataclass(frozen=True)
class HiRED(Budgeted):
    """High-resolution early dropping.

    Of an image's budget the share ``alpha`` goes to the tile that shows the whole image. The rest is shared out over
    the other tiles by their visual content: how much the class token attends, in the tower's first layer, to the places
    of the whole image that they show. In every tile the tokens stay that the class token attends to in the layer whose
    features are used. An image without tiles keeps its highest scores.

    Args:
        budget: tokens kept of each image, all tiles together: a share in (0, 1], rounded down, or an integer.
        alpha: see above, in [0, 1]; ``1 - alpha`` is also the share of the whole image's tokens that count as content.
        l_early: layer of the tower that content is read from, 0-based; negative ones count from the end.
        content: ``"count"``: how many of the content tokens lie in a tile, as the authors' code has it; ``"sum"``: the
            tile's share of the attention, as the paper describes it.
        rounding: ``"largest_remainder"`` meets the budget; what a tile cannot hold goes to the next one by content
            (ours). ``"floor"`` loses fractions, as the authors' code does.
        ignore_padding: tokens that the host cuts away, since they show padding, count for nothing and get no budget
            (ours); False: they do, and what a tile's other tokens cannot use is lost.

    Source: Arif et al., HiRED, AAAI 2025, section 3, and its released code.
    """

    summary: ClassVar[str] = "share a budget over the tiles of an image by content, keep what the class token sees"
    source: ClassVar[str] = "Arif et al., AAAI 2025 (arXiv 2408.10945)"
    example: ClassVar[Parameters] = {"budget": 0.4}
    joint: ClassVar[bool] = True

    budget: Budget = 0.2
    alpha: float = 0.5
    l_early: int = 0
    content: Literal["count", "sum"] = "count"
    rounding: Literal["largest_remainder", "floor"] = "largest_remainder"
    ignore_padding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.alpha, "alpha", zero=True)
        if isinstance(self.l_early, bool) or not isinstance(self.l_early, int):
            raise ValueError(f"l_early must be an integer, got {self.l_early!r}")
        check_choice(self.content, "content", ("count", "sum"))
        check_choice(self.rounding, "rounding", ("largest_remainder", "floor"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and the class token's attention in two layers."""
        return frozenset({"x", "class_attention", "tower_layers"})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.l_early,)

    def count(self, n: int) -> int:
        """The budget as a number of tokens, rounded down, at least one."""
        return min(n, int(self.budget) if is_count(self.budget) else max(1, kept(n, float(self.budget))))

    def acts(self, n: int, place: Place) -> bool:
        """Unless everything stays; a number of tokens may be less than those of all tiles together."""
        return n > 0 and (is_count(self.budget) or self.budget < 1)

    def choose(self, site: VisualSite) -> Reduction:
        """Share the budget out, keep the highest scores of this tile."""
        scores, tiles = site.class_attention_heads.sum(1), site.tiles
        b, n = scores.shape
        if tiles is None or tiles.total == 1:
            counts = [self.count(n)] * b
        else:
            early = site.whole_attention(self.l_early).sum(1)
            counts = [self.budgets(one, tiles)[site.tile.index] for one in early]
        if min(counts) >= n:
            return Reduction.identity((b,), n, site.device)
        return chosen(scores, counts)

    def budgets(self, early: Tensor, tiles: Tiles) -> list[int]:
        """How many tokens each tile keeps; waits for the device.

        Args:
            early: ``(N,)`` float32 attention to the tokens of the whole image in the early layer.
            tiles: of the image.
        """
        n, parts = len(early), tiles.total - 1
        room = tiles.real().sum(1).tolist() if self.ignore_padding else [n] * tiles.total
        total = self.count(sum(room))
        whole = min(kept(total, self.alpha), n)
        rest = min(total - whole, sum(room[1:]))
        content = self.contents(early, tiles.cell(early.device), parts) if rest else [0] * parts
        return [whole, *shared(content, rest, room[1:], self.rounding == "largest_remainder")]

    def contents(self, early: Tensor, cell: Tensor, parts: int) -> list[float]:
        """Visual content of every part of the image.

        Args:
            early: ``(N,)`` scores of the tokens of the whole image.
            cell: ``(N,)`` int64, the part that each lies in.
            parts: how many there are.
        """
        value = early
        if self.content == "count":
            marked = ranked(early)[: kept(len(early), 1 - self.alpha)]
            value = torch.zeros_like(early).scatter(0, marked, 1.0)
        found: list[float] = value.new_zeros(parts).index_add(0, cell, value).tolist()
        return found


def shared(content: Sequence[float], total: int, room: Sequence[int], exact: bool) -> list[int]:
    """A budget in proportion to content.

    Args:
        content: of every part, not negative; all zero: even shares.
        total: the budget, at most the sum of ``room``.
        room: the most that each part can take.
        exact: meet the budget: largest remainder, and what is too much for a part goes to the next by content; False:
            shares are rounded down and cut off.
    """
    if not exact:
        weight = content if any(content) else [1] * len(content)
        return [min(math.floor(round(c / sum(weight) * total, 9)), r) for c, r in zip(weight, room, strict=True)]
    found = largest_remainder(content, total)
    spare = 0
    for i, most in enumerate(room):
        spare += max(0, found[i] - most)
        found[i] = min(found[i], most)
    for i in sorted(range(len(room)), key=lambda i: (-content[i], i)):
        more = min(spare, room[i] - found[i])
        found[i] += more
        spare -= more
    return found


def chosen(scores: Tensor, counts: Sequence[int]) -> Reduction:
    """The highest scores of every row, ties to the lower index, in ascending order.

    Args:
        scores: ``(B, N)``.
        counts: how many of each row.
    """
    count = torch.tensor([min(c, scores.shape[1]) for c in counts], device=scores.device).unsqueeze(1)
    rows, mask = highest(scores, int(max(min(c, scores.shape[1]) for c in counts)), count)
    return Reduction.keep(rows, scores.shape[1], None if len(set(counts)) == 1 else mask)
