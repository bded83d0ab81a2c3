"""``Queue``: steps in which one row goes for the one that comes, of policies that need no whole site for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.budgets import Uniform
from tokred.kv.parts import Pair, Score
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
        self._known: dict[tuple[int, ...], tuple[int, int, int]] = {}

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
        guards = self.due(engine, layer, before, after)
        return guards is not None and self.act(layer, q, scale, after, guards, None)

    def due(self, engine: Engine, layer: Layer, before: int, after: int) -> tuple[int, int] | None:
        """First and newest tokens that stay, if this forward is a step; arguments as for :meth:`step`."""
        clock = layer.clock
        if engine.probe is not None or engine.drafting or (engine.frames and engine.when.turns):
            return None
        if engine.when.every == 1 and self.parts.score.oldest and layer.turned == before:
            return self._rows(clock.base, after)[1:]  # nothing else has changed since the step before
        if not clock.lengths or not 0 <= clock.prompt <= before == after - 1:
            return None
        if not engine.when.due(clock.prompt, before, after):
            return None
        if layer.ragged or layer.weights is not None or not layer.swaps:
            return None
        left = layer.width - 1
        rows, *guards = self._rows(clock.base, after)
        return (guards[0], guards[1]) if left and left == rows else None

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Pair | None:
        """The attention ``[B, H, 1, Dv]`` of a step that is :meth:`due`, and the score ``[B, Hk, K]`` that has noted it
        in passing; None: it has not, and both are to be asked for as ever.

        Args:
            layer: of the rows.
            q: ``[B, H, 1, D]``.
            k, v: ``[B, Hk, K, D]``, all rows.
            scale: of the logits.
        """
        # In half precision the host's own attention sums more exactly, and on other devices it is the faster.
        wide = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
        if not wide or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        return self.parts.score.attend(q, k, v, scale, layer.rows)

    def act(
        self, layer: Layer, q: Tensor, scale: float | None, after: int, guards: tuple[int, int], score: Tensor | None
    ) -> bool:
        """Take a step that is :meth:`due`, by the score of :meth:`attend` or None. False if nothing was done."""
        kind = self.parts.score
        # What the oldest row is needs no tensor, and so nothing that gradients would have to be kept from.
        if kind.oldest and layer.turn(guards[0]):
            return True
        with torch.no_grad():
            slots, keys = layer.slots, layer.shown()[0] if score is None else None
            if slots is None or slots.shape[0] == 0:
                return False
            if isinstance(keys, Tensor):
                score = kind.quick(q, keys, slots, scale, layer.rows)
            if score is None:
                return False
            layer.swap(worst(score, slots, *guards, after))
        return True

    def _rows(self, base: tuple[int, ...], seen: int) -> tuple[int, int, int]:
        """Rows that every sample keeps of enough, -1 where they differ, and how many of them are the first and the
        newest: the same at every step, since shares are those of ``base`` and numbers stay."""
        found = self._known.get(base)
        if found is None:
            budget = self.parts.budget
            lengths = set(base) if budget.shares else {seen}
            if len(lengths) != 1:
                return -1, 0, 0
            rows = budget.share(lengths.pop(), None, 0, self.depth)
            rows = max(rows, sum(self.policy.guards(seen, rows)), 1)
            found = self._known[base] = rows, *self.policy.guards(seen, rows)
        return found


def queue_of(policy: CachePolicy, depth: int) -> Queue | None:
    """The policy's queue; None where its score wants a site, or more than one row may go."""
    parts = policy.parts
    score = parts.score
    # A step hands over queries and keys alone.
    quick = policy.swaps and _quick(type(score)) and not score.window and score.needs <= {"q", "k"}
    return Queue(policy, depth) if quick and type(parts.budget) is Uniform else None


def _quick(kind: type[Score]) -> bool:
    """True for a kind of score that has a quick answer, whose meaning no subclass has changed."""
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
