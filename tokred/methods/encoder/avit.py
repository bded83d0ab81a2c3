"""A-ViT: tokens halt when what their first channel said in all blocks so far adds up to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokred.core.checks import check_number
from tokred.core.learned import Facts
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where
from tokred.kernels.dispatch import traced

SUM, LEFT, OUTPUT, SCORES = "avit.sum", "avit.left", "avit.output", "avit.scores"
# The sigmoid of less is no number of float32 but 0.
NEVER = -104.0


@register("avit")
@dataclass(frozen=True)
class AViT(BlockMethod):
    """Adaptive tokens: the first channel of each token says after every block how much of it is done.

    ``sigmoid(gamma * x[0] - beta)`` is the halting score of a token after a block. Once its scores add up to one (less
    ``eps``), the token leaves, the class token, too, which then is seen by nobody. What comes out of the last block is
    the sum of what each token was after each block, weighted by its scores, and by what was left to one where it
    halted. There are no weights beside the model's own, which have to be trained with this; two losses hold the number
    of blocks that tokens run through (``ponder``) and the blocks at which they halt (``prior``).

    Args:
        gamma: factor of the first channel.
        beta: what is taken from it: the larger, the later tokens halt.
        eps: a token has halted when its scores add up to ``1 - eps``.
        ponder: weight of the mean number of blocks, and what was left, of all tokens.
        prior: weight of the divergence of the mean scores of the blocks from a bell curve over them.
        centre: block at which that is highest, counted from 0; None: two thirds down, 8 of 12.
        spread: its standard deviation, in blocks.

    Source: Yin et al., A-ViT, CVPR 2022, section 3.
    """

    summary: ClassVar[str] = "tokens leave when scores that a channel of theirs gives add up to one; sum over blocks"
    source: ClassVar[str] = "Yin et al., CVPR 2022 (arXiv 2112.07658)"
    example: ClassVar[Parameters] = {"gamma": 4.0, "beta": 0.0}
    nothing: ClassVar[Parameters | None] = {"gamma": 0.0, "beta": 1000.0}
    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True
    by_mask: ClassVar[bool] = True
    gradients: ClassVar[bool] = True
    where: ClassVar[Where] = "end"
    sums: ClassVar[bool] = True

    gamma: float = 10.0
    beta: float = 30.0
    eps: float = 0.01
    ponder: float = 5e-4
    prior: float = 1e-3
    centre: float | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gamma", "beta", "eps", "ponder", "prior", "spread"):
            check_number(getattr(self, name), name)
        if self.centre is not None:
            check_number(self.centre, "centre")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must lie in (0, 1), got {self.eps!r}")
        if self.ponder < 0 or self.prior < 0:
            raise ValueError(f"ponder and prior must be at least 0, got {self.ponder!r} and {self.prior!r}")
        if self.spread <= 0:
            raise ValueError(f"spread must be above 0, got {self.spread!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens; what they carry from block to block; and a place for losses."""
        return frozenset({"x", "carried", "module"})

    def tokens(self, n: int, place: Place) -> int:
        """At most all of them: the count depends on the image."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """After every block, unless no token can ever halt."""
        return not (self.gamma == 0 and -self.beta < NEVER)

    def module(self, facts: Facts) -> nn.Module:
        """No weights: it says whether the model is in training."""
        return Halting()

    def reduce(self, site: Site) -> Reduction:
        """Add this block's scores, hand on what has halted, and give out the sums behind the last block."""
        self.its_module(site, Halting, "by which avit knows that a model learns")
        x, (b, n) = site.x, site.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        last, limit = site.layer == site.depth - 1, 1 - self.eps
        done, left = site.rows.get(SUM), site.rows.get(LEFT)
        done = x.new_zeros(b, n, dtype=wide) if done is None else done
        left = x.new_ones(b, n, dtype=wide) if left is None else left
        # Of a sample that is done its first token is still seen; it has halted all the same.
        real = done.detach() < limit if site.mask is None else site.mask & (done.detach() < limit)
        score = torch.sigmoid(self.gamma * x[..., 0].to(wide) - self.beta) * real
        step = Halt.of(real.to(wide) if last else score, done, left, real, limit)
        site.rows[SUM], site.rows[LEFT] = step.done, step.left
        given = x
        if site.mask is not None and x.dtype == torch.float16:  # rows that nobody sees may outgrow it
            given = x.masked_fill(~real.unsqueeze(-1), 0)
        output = _added(site, given, step.weight.unsqueeze(-1))
        site.notes[OUTPUT] = output
        if site.learned.training:
            self._learn(site, score, step, real)
        if last:
            return Given.make((output.flatten(0, 1)[_at(site)].view_as(x) if site.moved else output).to(x.dtype))
        return _gone(site, step.alive)

    def _learn(self, site: Site, score: Tensor, step: Halt, real: Tensor) -> None:
        """The two losses: a term of the first in every block, the second behind the last."""
        b, n = site.shape
        total = site.totals.sum() if site.totals is not None else b * site.length
        site.learned.losses["ponder"] = self.ponder * step.blocks.sum() / total
        free = slice(site.prefix, n - site.suffix)
        patches = total - b * (site.prefix + site.suffix)
        # Those that have halted score nothing.
        mean = score[:, free].sum(1) / patches
        before = site.notes.get(SCORES)
        scores = mean.unsqueeze(1) if before is None else torch.cat([before, mean.unsqueeze(1)], 1)
        site.notes[SCORES] = scores
        if site.layer == site.depth - 1:
            found = scores.sum(0)
            goal = bell(len(found), self.centre, self.spread, found)
            site.learned.losses["prior"] = self.prior * divergence(found, goal)


class Halting(nn.Module):
    """No weights: what a model that learns to halt is told by, as its mode is the model's."""


@dataclass(frozen=True, eq=False)
class Halt:
    """One step of the halting of some tokens; all ``(B, N)``, and floats unless it is said.

    Attributes:
        done: sum of the scores so far.
        left: what is left to one, for tokens that have not halted.
        weight: of what the token is after this block, in the sum that comes out.
        alive: bool, tokens that go on.
        reached: bool, tokens that halt here.
        before: what was left to one before this block.
        ran: bool, tokens that ran through it.
    """

    done: Tensor
    left: Tensor
    weight: Tensor
    alive: Tensor
    reached: Tensor
    before: Tensor
    ran: Tensor

    @classmethod
    def of(cls, score: Tensor, done: Tensor, left: Tensor, alive: Tensor, limit: float) -> Halt:
        """The step behind a block.

        Args:
            score: of the block; 1 behind the last one; 0 for tokens that did not run through it.
            done, left: before it; zeros and ones before the first.
            alive: bool, tokens that ran through it.
            limit: sum at which a token halts.

        Source: Yin et al., CVPR 2022, algorithm 1.
        """
        done = done + score
        reached = alive & (done >= limit)
        # The scores of those that had halted are 0, and what was left to them is asked for no more.
        return cls(done, left - score, torch.where(reached, left, score), alive ^ reached, reached, left, alive)

    @property
    def blocks(self) -> Tensor:
        """1 for a token that ran through this block, and what was left to it where it halted."""
        return self.ran.to(self.before.dtype) + torch.where(self.reached, self.before, 0.0)


@dataclass(frozen=True, eq=False)
class Given(Reduction):
    """All tokens stay, with features that a method gives them.

    Attributes:
        features: ``(B, N, C)``.
    """

    features: Tensor | None = None

    @classmethod
    def make(cls, features: Tensor) -> Given:
        """No token moves."""
        same = Reduction.identity((features.shape[0],), features.shape[1], features.device)
        return cls(same.representative, same.source, same.target, same.length, features=features)

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """``(B, N, C)``: the features, whatever ``x`` is."""
        return x if self.features is None else self.features

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)


def _at(site: Site) -> Tensor:
    """``(B * N,)`` int64: the rows of the original tokens, all samples in one, at which the tokens stand."""
    first = torch.arange(site.shape[0], device=site.device).unsqueeze(1) * site.length
    return (site.positions + first).flatten()


def _added(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """``(B, length, C)``: the sums so far and tokens ``(B, N, C)`` by their weights ``(B, N, 1)``, in their type."""
    before = site.notes.get(OUTPUT)
    more = x * weight
    if not site.moved:
        return more if before is None else before + more
    if before is None:
        before = more.new_zeros(len(x), site.length, x.shape[-1])
    # Padding repeats positions, and adds nothing there.
    return before.flatten(0, 1).index_add(0, _at(site), more.flatten(0, 1)).view_as(before)


def _gone(site: Site, alive: Tensor) -> Reduction:
    """Tokens that halted leave; protected ones keep their rows, which nobody sees."""
    b, n = site.shape
    if not traced() and site.mask is None and bool(alive.all()):  # a trace cannot ask, and pads
        return Reduction.identity((b,), n, site.device)
    with torch.no_grad():
        free = slice(site.prefix, n - site.suffix)
        rows = torch.arange(site.prefix, n - site.suffix, device=site.device).expand(b, -1)
        rows, mask = pack(rows, alive[:, free])
        kept, _ = with_protected(rows, mask, n, site.prefix, site.suffix)
        seen = alive.gather(1, kept)
        # Attention to nothing at all is no number: of a sample that is done, the first token goes on being seen. What
        # comes of it is added nowhere.
        seen[:, 0] |= ~seen.any(1)
        if not traced() and mask is None and bool(seen.all()):  # a trace cannot ask, and pads
            if kept.shape[1] == n:
                return Reduction.identity((b,), n, site.device)
            return Reduction.keep(kept, n)
    return Reduction.keep(kept, n, mask=seen)


def bell(depth: int, centre: float | None, spread: float, like: Tensor) -> Tensor:
    """``(depth,)`` the goal of the mean scores: a bell curve over the blocks, whose part before the centre sums to .98.

    Args:
        depth: blocks.
        centre: block of the highest value; None: two thirds down.
        spread: standard deviation.
        like: for device and type.

    Source: released code of A-ViT, for 12 blocks and a centre of 8.
    """
    middle = round(depth * 2 / 3) if centre is None else centre
    density = [math.exp(-0.5 * ((i - middle) / spread) ** 2) for i in range(depth)]
    before: Sequence[float] = density[: max(1, math.ceil(middle))]
    return torch.tensor([0.98 * value / sum(before) for value in density], dtype=like.dtype, device=like.device)


def divergence(scores: Tensor, goal: Tensor) -> Tensor:
    """A scalar: how far mean scores ``(L,)``, as shares of their sum held to .01 to .99, are from the goal ``(L,)``."""
    share = (scores / scores.sum().clamp_min(1e-12)).clamp(0.01, 0.99)
    return torch.xlogy(goal, goal / share).sum()
