"""Cropr: learned queries say of each token how much the task needs it; their heads are gone after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_count, check_flags, is_count
from tokred.core.learned import Facts, linear, norm
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import schedule
from tokred.core.selection import highest, protected_rows
from tokred.core.site import Site
from tokred.encoder.method import Scheduled, Where
from tokred.encoder.padding import reduce_each
from tokred.errors import MissingInputError
from tokred.kernels.dispatch import without_autocast
from tokred.learn.losses import check_classes

Targets = Literal["class", "labels", "map"]


@register("cropr")
@dataclass(frozen=True)
class Cropr(Scheduled):
    """Cross-attention pruning: the tokens that a learned query looks at least leave after every block.

    While it learns, each block has queries that gather the tokens, and a small head that foretells the task's targets
    from what they gathered. The head's loss reaches the queries alone, never the model. In evaluation the queries of a
    block are one vector, and a token's score is its product with that vector. Untrained, the choice is a random one.

    Args:
        r: tokens that leave after each block (an integer, a pair or a list, as for ToMe); as many more after the first
            as are protected, so that the rows, protected ones included, are as many as patches would be.
        fuse: bring all tokens back before the last block, each as it was when it left; without, none comes back. The
            last block but one then removes nothing.
        classes: outputs of the auxiliary heads; None: there are none, and nothing of the method learns.
        targets: what is foretold: ``"class"``, one class a sample; ``"labels"``, any number of classes a sample;
            ``"map"``, a class for every pixel.
        grid: rows and columns of the queries where the targets are a map, usually those of the patches.
        ignore: class of pixels that do not count.
        weight: of the loss of the heads, which are summed.
        round_to: rows that are left, protected ones included, are a multiple of this (ours); None: any number.

    Source: Bergner et al., Token Cropr, CVPR 2025, section 3.
    """

    summary: ClassVar[str] = "trained queries keep the tokens that the task needs; all may return before the last block"
    source: ClassVar[str] = "Bergner et al., CVPR 2025 (arXiv 2412.00965)"
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"
    by_mask: ClassVar[bool] = True

    fuse: bool = False
    classes: int | None = None
    targets: Targets = "class"
    grid: tuple[int, int] | None = None
    ignore: int = -100
    weight: float = 1.0
    round_to: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(fuse=self.fuse)
        check_choice(self.targets, "targets", get_args(Targets))
        for name in ("classes", "round_to"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name, 1)
        if isinstance(self.ignore, bool) or not isinstance(self.ignore, int):
            raise ValueError(f"ignore must be an integer, got {self.ignore!r}")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < torch.inf:
            raise ValueError(f"weight must be a number of at least 0, got {self.weight!r}")
        grid: object = self.grid
        if (grid is not None) != (self.targets == "map"):
            needed = "needs grid=(rows, columns)" if grid is None else f"has no grid, got {grid!r}"
            raise ValueError(f"targets={self.targets!r} {needed}")
        if grid is not None:
            if not isinstance(grid, list | tuple) or len(grid) != 2 or not all(is_count(side, 1) for side in grid):
                raise ValueError(f"grid must be two integers of at least 1, rows and columns, got {grid!r}")
            object.__setattr__(self, "grid", tuple(grid))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the module."""
        return frozenset({"x", "module"})

    def joins(self, depth: int) -> int | None:
        return depth - 1 if self.fuse else None

    @property
    def queries(self) -> int:
        """How many gather the tokens of a block."""
        return 1 if self.grid is None else self.grid[0] * self.grid[1]

    def places(self, depth: int) -> int:
        """How many blocks, from the first on, have queries: what left after the last one would be read by nobody."""
        return max(0, depth - (2 if self.fuse else 1))

    def tokens(self, n: int, place: Place) -> int:
        """``n`` less this block's ``r``; one unprotected token stays."""
        taken = schedule(self.r).at(place.layer, place.depth)
        if place.layer >= self.places(place.depth) or taken <= 0 or place.free(n) < 2:
            return n
        taken += place.protected if place.layer == 0 else 0
        left = max(n - taken, place.protected + 1)
        rounded = left - left % self.round_to if self.round_to else left
        return left if rounded <= place.protected else rounded

    def module(self, facts: Facts) -> nn.Module:
        """Queries and heads for every block that removes tokens; without classes one vector for each."""
        count = self.places(facts.depth)
        if self.classes is None:
            return Folded(torch.randn(count, facts.width) * facts.width**-0.5)
        return Croppers(facts.width, count, self.queries, self.classes)

    def reduce(self, site: Site) -> Reduction:
        """Guess the targets while it learns, and keep the tokens of the highest scores, in their order."""
        module = site.learned.module
        if not isinstance(module, Croppers | Folded):
            raise MissingInputError(
                "this site does not supply 'module', by which cropr decides: give learned=Learned(module), with the "
                "module that Cropr.module makes"
            )
        if isinstance(module, Croppers) and module.training:
            # What the heads learn must not reach the model: the tokens come in without their history.
            site.learned.guesses.append(module(site.layer, site.x.detach(), site.mask))
        return self._kept(site, module)

    @torch.no_grad()
    def _kept(self, site: Site, module: Croppers | Folded) -> Reduction:
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        place = Place.of(site)
        left = self.tokens(n, place) - place.protected
        # Of all tokens, since a cut of them would have to be copied first.
        rows, _ = highest(module.scores(site.layer, site.x)[:, site.prefix : n - site.suffix], left)
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return Reduction.keep(torch.cat([lead, rows + site.prefix, tail], 1), n)

    def compare(self, guesses: Sequence[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss of the heads: the sum over the blocks of what the task's own loss would be.

        Args:
            guesses: ``(B, M, K)`` a block, of ``M`` queries and ``K`` classes.
            targets: ``(B,)`` integers or ``(B, K)`` shares for ``"class"``; ``(B, K)`` of zeros and ones for
                ``"labels"``; ``(B, H, W)`` integers for ``"map"``, of which the nearest to each query counts.

        Returns:
            ``{"heads": scalar}``, float32.

        Raises:
            ValueError: the targets have another shape, or are of other classes.
        """
        b, m, k = guesses[0].shape
        t = torch.as_tensor(targets).to(guesses[0].device)
        whole = not t.is_floating_point()
        allowed = {
            "class": ("(B,) integers or (B, K) shares", tuple(t.shape) == ((b,) if whole else (b, k))),
            "labels": ("(B, K) zeros and ones", tuple(t.shape) == (b, k)),
            "map": ("(B, H, W) integers", whole and t.ndim == 3 and len(t) == b),
        }
        words, fits = allowed[self.targets]
        if not fits:
            raise ValueError(
                f"targets of cropr(targets={self.targets!r}) must be {words} for B = {b} and K = {k}, got "
                f"{tuple(t.shape)} {t.dtype}"
            )
        if self.grid is not None:
            t = F.interpolate(t[:, None].double(), self.grid, mode="nearest")[:, 0].long()
        if whole and self.targets != "labels":
            check_classes(t, k, "cropr", self.ignore if self.targets == "map" else -100)
        total = guesses[0].new_zeros(())
        for guess in guesses:
            if self.grid is not None:
                one = F.cross_entropy(guess.reshape(b * m, k), t.reshape(-1), ignore_index=self.ignore, reduction="sum")
                # A batch of nothing but pixels that do not count has no loss, rather than none that is a number.
                total = total + one / (t != self.ignore).sum().clamp_min(1)
            elif self.targets == "labels":
                total = total + F.binary_cross_entropy_with_logits(guess[:, 0], t.to(guess.dtype))
            else:
                total = total + F.cross_entropy(guess[:, 0], t if whole else t.to(guess.dtype))
        return {"heads": self.weight * total}


class Folded(nn.Module):
    """One vector for each block: all that is left of the queries after training.

    Args:
        direction: ``(blocks, C)``; no parameter, since nothing teaches it.
    """

    direction: Tensor

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", direction)

    def scores(self, block: int, x: Tensor) -> Tensor:
        """``(B, N)`` float32 (float64 stays) of tokens ``(B, N, C)``: how much the task needs each."""
        return _scores(self.direction[block], x)


class Croppers(nn.Module):
    """Queries, what gathers by them, and heads that foretell the targets: one of each for every block.

    Args:
        width: channels ``C`` of a token.
        blocks: how many.
        queries: ``M``.
        classes: outputs ``K`` of a head.

    Source: Bergner et al., Token Cropr, CVPR 2025, section 3.1.
    """

    def __init__(self, width: int, blocks: int, queries: int, classes: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(blocks, queries, width))
        nn.init.trunc_normal_(self.queries, std=width**-0.5)
        self.heads = nn.ModuleList(Head(width, classes) for _ in range(blocks))

    def scores(self, block: int, x: Tensor) -> Tensor:
        """``(B, N)`` float32 (float64 stays) of tokens ``(B, N, C)``: the sum of the logits of all queries."""
        return _scores(_direction(self.queries[block]), x)

    def folded(self) -> Folded:
        """The module for inference, which keeps the very same tokens: apply ``cropr`` without ``classes`` with it."""
        return Folded(_direction(self.queries).detach().clone()).train(self.training)

    def gathered(self, block: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, M, C)`` float32: the mean of tokens ``(B, N, C)`` by what each query looks at; not at padding, where
        ``mask`` ``(B, N)`` is False."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x):
            logits = self.queries[block].to(x.dtype) @ x.mT * x.shape[-1] ** -0.5
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None], -torch.inf)
            gathered: Tensor = logits.softmax(-1) @ x
            return gathered

    def forward(self, block: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Answers of the head of a block: ``(B, M, K)`` float32 of tokens ``(B, N, C)``."""
        said: Tensor = self.heads[block](self.gathered(block, x, mask))
        return said


class Head(nn.Module):
    """A residual MLP, a norm and a layer that foretells, in float32.

    Args:
        width: channels ``C``.
        classes: outputs ``K``.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.before, self.wide = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width)
        self.narrow, self.after = nn.Linear(4 * width, width), nn.LayerNorm(width, eps=1e-6)
        self.classes = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.classes.weight, std=0.02)
        nn.init.zeros_(self.classes.bias)

    def forward(self, gathered: Tensor) -> Tensor:
        """``(B, M, K)`` of what was gathered, ``(B, M, C)``."""
        with without_autocast(gathered):
            more = F.gelu(linear(self.wide, norm(self.before, gathered)))
            return linear(self.classes, norm(self.after, gathered + linear(self.narrow, more)))


def _direction(queries: Tensor) -> Tensor:
    """``(..., C)``: the sum of queries ``(..., M, C)``, in their type."""
    if queries.shape[-2] == 1:
        return queries.squeeze(-2)
    return queries.to(torch.promote_types(queries.dtype, torch.float32)).sum(-2).to(queries.dtype)


def _scores(direction: Tensor, x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        found: Tensor = x @ direction.to(x.dtype)
        return found
