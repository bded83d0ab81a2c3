"""``Queue``: steps in which one row goes for the one that comes, of policies that need no whole site for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.budgets import Uniform
from tokred.kv.parts import Score
from tokred.kv.policy import CachePolicy
from tokred.kv.select import lowest

if TYPE_CHECKING:
    from tokred.kv.engine import Engine, Layer


class Queue:
    """A policy whose score can be asked quickly, at its steps.

    Args:
        policy: one of :func:`queue_of`.
        depth: compressed layers.
    """

    def __init__(self, policy: CachePolicy, depth: int) -> None:
        self.policy = policy
        self.parts = policy.parts
        self.depth = depth

    def step(self, engine: Engine, layer: Layer, q: Tensor, scale: float | None, before: int, after: int) -> bool:
        """Act on a layer as the engine would have done with a site of it.

        Args:
            engine: of the cache.
            layer: that has attended, with logits that are products alone, to rows of which none is padding.
            q: ``[B, H, M, D]`` the queries.
            scale: of the logits.
            before, after: slots before and after the forward.

        Returns:
            False if nothing was done, since there is more to ask.
        """
        clock, slots = layer.clock, layer.slots
        if not clock.lengths or not 0 <= clock.prompt <= before == after - 1:
            return False
        if engine.probe is not None or engine.drafting or not engine.when.due(clock.prompt, before, after):
            return False
        if slots is None or slots.shape[0] == 0 or layer.ragged or layer.weights is not None or not layer.swaps:
            return False
        left = slots.shape[2] - 1
        if left == 0 or left != self._rows(clock.base, after):
            return False
        keys = layer.shown()[0]
        score = self.parts.score.quick(q, keys, slots, scale, layer.rows) if isinstance(keys, Tensor) else None
        if score is None:
            return False
        layer.swap(worst(score, slots, *self.policy.guards(after, left), after))
        return True

    def _rows(self, base: tuple[int, ...], seen: int) -> int:
        """Rows that every sample keeps; -1 where they differ."""
        budget = self.parts.budget
        lengths = set(base) if budget.shares else {seen}
        if len(lengths) != 1:
            return -1
        rows = budget.share(lengths.pop(), None, 0, self.depth)
        return min(seen, max(rows, sum(self.policy.guards(seen, rows)), 1))


def queue_of(policy: CachePolicy, depth: int) -> Queue | None:
    """The policy's queue; None where its score wants a site, or more than one row may go."""
    parts = policy.parts
    quick = policy.swaps and _quick(type(parts.score)) and not parts.score.window
    return Queue(policy, depth) if quick and type(parts.budget) is Uniform else None


def _quick(kind: type[Score]) -> bool:
    """Whether a kind of score has a quick answer, which no subclass has changed the meaning of."""
    for cls in kind.__mro__:
        own = vars(cls)
        if cls is Score or "quick" in own:
            return cls is not Score
        if "__call__" in own or "observe" in own:
            return False
    return False


def worst(score: Tensor, slots: Tensor, first: int, newest: int, seen: int) -> Tensor:
    """``[B, Hk, 1]`` int64: the row of the lowest score ``[B, Hk, K]``, the newest of equals.

    Args:
        score: of rows that are all real; the slots themselves where the oldest goes.
        slots: ``[B, Hk, K]``.
        first, newest: how many of the ``seen`` slots are never given up.
    """
    if score is slots:  # of more rows than are guarded, so that the oldest is none of the newest
        return (slots.masked_fill(slots < first, SENTINEL) if first else slots).argmin(-1, keepdim=True)
    guard = slots >= seen - newest if newest else None
    if first:
        guard = slots < first if guard is None else guard | (slots < first)
    return lowest(score, guard, slots)
