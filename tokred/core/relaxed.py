"""``Relaxed``: a merge with a gradient. All tokens stay, and parts of some of them go into others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import accumulator_dtype, without_autocast

EMPTY = 1e-6  # what a token is left with at least, so that the log of its size stays a number


@dataclass(frozen=True, eq=False)
class Relaxed(Reduction):
    """A merge while a method learns: each token of one side gives parts of itself to tokens of the other.

    No token leaves. Sizes carry what was given: a token that gave all of itself weighs next to nothing in attention by
    size, where hosts add the log of the sizes. Gradients pass through the parts.

    Attributes:
        givers: ``(A,)`` int64 positions of those that give.
        takers: ``(T,)`` int64 positions of those that take.
        part: ``(B, A, T)`` float in 0..1: which part of each giver goes to each taker; rows add up to at most one.
    """

    givers: Tensor | None = None
    takers: Tensor | None = None
    part: Tensor | None = None

    @classmethod
    def make(cls, givers: Tensor, takers: Tensor, part: Tensor, length: int) -> Relaxed:
        """A relaxed merge among ``length`` tokens.

        Raises:
            ValueError: the shapes do not fit together.
        """
        if part.ndim != 3 or tuple(part.shape[1:]) != (len(givers), len(takers)):
            raise ValueError(f"part must be (B, {len(givers)}, {len(takers)}), got {tuple(part.shape)}")
        same = Reduction.identity((part.shape[0],), length, part.device)
        made = cls(same.representative, same.source, same.target, length)
        return replace(made, givers=givers, takers=takers, part=part)

    def sizes(self, size: Tensor | None = None) -> Tensor:
        """``(B, N)`` float32: own and what was given to a taker, less what a giver gave, at least a millionth."""
        givers, takers, part = self._parts()
        m = part.new_ones(self.representative.shape) if size is None else size.to(part.dtype)
        with without_autocast(m):
            given = part * m[:, givers].unsqueeze(-1)
            left = (m[:, givers] - given.sum(2)).clamp_min(EMPTY)
            out = m.index_copy(1, givers, left).index_copy(1, takers, m[:, takers] + given.sum(1))
        return out.float()

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """``(B, N, C)`` features: takers become the mean, by size, of themselves and what they are given.

        Raises:
            ValueError: ``x`` does not fit, or a mode other than the mean is asked for.
        """
        if x.ndim != 3 or tuple(x.shape[:2]) != tuple(self.representative.shape):
            raise ValueError(f"x must be {tuple(self.representative.shape)} + (C,), got {tuple(x.shape)}")
        if mode not in (None, "mean"):
            raise ValueError(f"mode is {mode!r}; a relaxed merge allows 'mean'")
        givers, takers, part = self._parts()
        dtype = accumulator_dtype(x.dtype)
        with without_autocast(x):
            own = x[:, takers].to(dtype)
            m = part.new_ones(self.representative.shape, dtype=dtype) if size is None else size.to(dtype)
            given = part.to(dtype) * m[:, givers].unsqueeze(-1)
            received = given.sum(1).unsqueeze(-1)
            # The difference, so that a taker that is given nothing keeps its very row.
            moved = (given.mT @ x[:, givers].to(dtype) - received * own) / (m[:, takers].unsqueeze(-1) + received)
            return x.index_copy(1, takers, (own + moved).to(x.dtype))

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.givers is None or self.takers is None or self.part is None:
            raise ValueError("a relaxed merge needs its parts: make it with Relaxed.make")
        return self.givers, self.takers, self.part


@dataclass(frozen=True, eq=False)
class Absorbed(Reduction):
    """A merge while a method learns whose members stay in the sequence, though a gate hides them from all that follows.

    Tokens that others go into become the plain mean of themselves and those; all other rows, and all sizes, stay.

    Attributes:
        into: ``(B, N)`` int64: the token that each goes into; itself where it goes nowhere.
    """

    into: Tensor | None = None

    @classmethod
    def make(cls, into: Tensor, gate: Tensor) -> Absorbed:
        """A merge of tokens into others, and the soft decisions that go with it.

        Args:
            into: ``(B, N)`` int64.
            gate: ``(B, N)`` float in 0..1, how far attention sees each token from here on.

        Raises:
            ValueError: the shapes differ.
        """
        if into.shape != gate.shape:
            raise ValueError(f"into {tuple(into.shape)} and gate {tuple(gate.shape)} must be alike (B, N)")
        same = Reduction.soft(gate, "keys")
        made = cls(same.representative, same.source, same.target, same.length, gate=gate, gated=same.gated)
        return replace(made, into=into)

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """``(B, N, C)`` features.

        Raises:
            ValueError: ``x`` does not fit, or a mode other than the mean is asked for.
        """
        if self.into is None:
            raise ValueError("an absorbing merge needs to know what goes where: make it with Absorbed.make")
        if x.ndim != 3 or tuple(x.shape[:2]) != tuple(self.into.shape):
            raise ValueError(f"x must be {tuple(self.into.shape)} + (C,), got {tuple(x.shape)}")
        if mode not in (None, "mean"):
            raise ValueError(f"mode is {mode!r}; an absorbing merge allows 'mean'")
        moves = (self.into != self.representative).to(accumulator_dtype(x.dtype))
        given = x.to(moves.dtype) * moves.unsqueeze(-1)
        count = torch.ones_like(moves).scatter_add(1, self.into, moves)
        total = x.to(moves.dtype).scatter_add(1, self.into.unsqueeze(-1).expand_as(x), given)
        return (total / count.unsqueeze(-1)).to(x.dtype)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)


def relaxed_top(score: Tensor, r: int, tau: float) -> Tensor:
    """Soft membership of each entry in the ``r`` highest of a matrix; hard as ``tau`` falls.

    ``r`` times a softmax of ``score / tau`` over the whole matrix is added up, and the log of what it left of each
    entry is added to the scores.

    Args:
        score: ``(B, A, T)`` float32.
        r: how many.
        tau: temperature, above 0.

    Returns:
        ``(B, A, T)``, which adds up to ``r`` for each sample.
    """
    logits = (score / tau).flatten(1)
    total = torch.zeros_like(logits)
    for _ in range(r):
        chosen = logits.softmax(1)
        total = total + chosen
        # An entry that was taken whole is out; the log of nothing would have no gradient.
        whole = chosen.detach() > 1 - 1e-6
        left = torch.log1p(-chosen.masked_fill(whole, 0.0))
        logits = (logits + left).masked_fill(whole, -torch.inf)
    return total.view_as(score)
