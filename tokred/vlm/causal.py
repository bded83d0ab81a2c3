"""Causal methods: frames of a video one by one, each reduced by what came before it and by nothing that comes later.

A state goes from frame to frame. It is explicit, belongs to one stream (or to the streams of one batch, row by row),
and is never changed in place, so that whoever keeps an old one can go on from there. A clip that is there as a whole is
a loop over its frames, and what comes out is the same however the frames are handed over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.vlm.before_llm import ProjectorMethod, VisualSite
from tokred.vlm.frames import ClipMethod, cells_of
from tokred.vlm.tools.budget import Budget, as_budget, count_of

# Tensors ``(B, ...)`` that a method keeps between two frames; empty before the first.
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class CausalMethod(ClipMethod):
    """Base of methods that see a frame, a state, and nothing else; every frame leaves one number of tokens.

    A subclass answers :meth:`step`. :func:`tokred.stream` hands it frames as they come; on a clip it goes through them.

    Args:
        budget: tokens of each frame that stay, a number or a share, at least one; frames that have no more stay whole.
    """

    causal: ClassVar[bool] = True
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)

    @abstractmethod
    def step(self, state: State, site: VisualSite) -> tuple[State, Reduction]:
        """Decide about one frame.

        Args:
            state: after the frame before; empty for the first.
            site: the frame's ``(B, N, C)``, with ``frames`` 1.

        Returns:
            The state after this frame, and the reduction of its ``N`` tokens.
        """

    def count(self, n: int) -> int:
        """Of ``n`` tokens of a frame; a share of less than one is one."""
        if isinstance(self.budget, float) and n and self.budget * n < 1:
            return 1
        return count_of(self.budget, n)

    def kept(self, frames: int, cells: int) -> int:
        """The same number of each frame."""
        return frames * self.count(cells)

    def leaving(self, count: int, frames: int, cells: int) -> ProjectorMethod:
        """The same number of each frame, rounded down, one at least."""
        return self.with_budget(max(1, count // frames))

    def tokens(self, n: int, place: Any) -> int:
        """Of a clip, whose frames are not told: at most all of it where the budget is a number."""
        return super().tokens(n, place) if isinstance(self.budget, float) else n

    def choose(self, site: VisualSite) -> Reduction:
        """Go through the frames of a clip."""
        state: State = ()
        found = []
        for one in single_frames(site, self.reads):
            state, step = self.step(state, one)
            found.append(step)
        return in_a_row(found)


def is_causal(method: object) -> bool:
    """True for a method whose decision about a frame depends on no later one."""
    return bool(getattr(method, "causal", False))


def single_frames(site: VisualSite, reads: frozenset[str]) -> Iterator[VisualSite]:
    """A site for each frame of a clip, in order.

    Args:
        site: with frames.
        reads: what of the clip the frames hand on beside their features: ``"attention"``, ``"class_attention"``.
    """
    frames, cells = site.frames or 1, cells_of(site)
    received = site.column_scores() if "attention" in reads else None
    looked = site.class_attention_heads if "class_attention" in reads else None

    def cut(values: Tensor | None, t: int) -> Tensor | None:
        return None if values is None else values[..., t * cells : (t + 1) * cells]

    for t in range(frames):
        x = site.x[:, t * cells : (t + 1) * cells]
        grid = site.known_grid
        yield VisualSite(x=x, received=cut(received, t), class_attention=cut(looked, t), grid=grid, frames=1)


def in_a_row(parts: Sequence[Reduction]) -> Reduction:
    """The reduction of a sequence whose stretches were decided apart, one after the other.

    Args:
        parts: of one batch, without padding; at least one.
    """
    if all(one.trivial for one in parts):
        first = parts[0]
        return Reduction.identity(first.batch, sum(p.length for p in parts), first.representative.device)
    rows, sources, targets, tokens, slots = [], [], [], 0, 0
    for one in parts:
        rows.append(one.representative + tokens)
        sources.append(one.source + tokens)
        targets.append(torch.where(one.target < 0, -1, one.target + slots))
        tokens, slots = tokens + one.length, slots + one.slots
    merges = any(one.source.shape[-1] for one in parts)
    return Reduction(
        torch.cat(rows, -1), torch.cat(sources, -1), torch.cat(targets, -1), tokens,
        mode="mean" if merges else "keep", by_size=not merges,
    )  # fmt: skip
