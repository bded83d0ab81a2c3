"""SkipViT: what the class token does not look at takes a path around the blocks in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_integer, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest, protected_rows, random_order
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where
from tokred.encoder.padding import reduce_each

Score = Literal["class", "columns", "random"]


@register("skipvit")
@dataclass(frozen=True)
class SkipViT(BlockMethod):
    """Skip connections of tokens: a share of the patches goes around some blocks and comes back unchanged.

    Behind block ``split`` the patches with the lowest scores leave; before block ``join`` they stand in their places
    again, each as it was when it left. It has no weights; models are trained with it. Training and inference do the
    same.

    Args:
        rho: share of the patches that skips, rounded down, in [0, 1].
        split: block whose attention decides, the last one with all tokens; None: a quarter of the depth, less one.
        join: first block with all tokens again; the depth: they come back behind the last block. None: the last two.
        score: ``"class"``: attention of the class token, mean over heads; ``"columns"``: attention of all tokens
            (models without a class token); ``"random"``.
        seed: of the random scores.

    Source: Ataiefard et al., SkipViT, 2024; block numbers and the mean over heads are ours.
    """

    summary: ClassVar[str] = "patches of low class attention go around the middle blocks and come back before the last"
    source: ClassVar[str] = "Ataiefard et al., 2024 (arXiv 2401.15293)"
    example: ClassVar[Parameters] = {"rho": 0.5}
    nothing: ClassVar[Parameters | None] = {"rho": 0.0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"

    rho: float = 0.55
    split: int | None = None
    join: int | None = None
    score: Score = "class"
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.rho, "rho", zero=True)
        for name, least in (("split", 0), ("join", 2)):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name, least)
        check_choice(self.score, "score", get_args(Score))
        check_integer(self.seed, "seed")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and the attention that scores them."""
        return frozenset({"x"} | {"class": {"class_attention"}, "columns": {"attention"}, "random": set()}[self.score])

    def between(self, depth: int) -> tuple[int, int]:
        """The last block with all tokens, and the first one with all again."""
        first = max(0, depth // 4 - 1) if self.split is None else self.split
        return first, min(depth, max(first + 2, depth - 2)) if self.join is None else self.join

    def joins(self, depth: int) -> int | None:
        return self.between(depth)[1]

    def check(self, depth: int) -> None:
        """There is a block to go around.

        Raises:
            ValueError: ``split`` and ``join`` leave none, or are not blocks of the model.
        """
        first, second = self.between(depth)
        if not first + 2 <= second <= depth:
            raise ValueError(
                f"tokens that leave behind block split={first} have to come back at least two further on and at most "
                f"behind the last of {depth} blocks, got join={second}"
            )

    def skipped(self, free: int) -> int:
        """How many of so many patches go around."""
        return math.floor(self.rho * free + 1e-9)

    def tokens(self, n: int, place: Place) -> int:
        """Without those that skip; one token is left in any case."""
        if place.layer != self.between(place.depth)[0]:
            return n
        return max(n - self.skipped(place.free(n)), place.protected, 1)

    def reduce(self, site: Site) -> Reduction:
        """Keep the patches of the highest scores, in their order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        left = self.tokens(n, Place.of(site)) - site.prefix - site.suffix
        with torch.no_grad():
            rows, _ = highest(self._scores(site)[:, site.prefix : n - site.suffix], left)
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return Reduction.keep(torch.cat([lead, rows + site.prefix, tail], 1), n)

    def _scores(self, site: Site) -> Tensor:
        """``(B, N)`` float32 of all tokens."""
        if self.score == "class":
            return site.class_attention
        if self.score == "columns":
            return site.column_scores().mean(1)
        b, n = site.shape
        # The first in the random order scores highest.
        return random_order(b, n, self.seed, site.layer, site.step, site.device).argsort(1).neg().float()
