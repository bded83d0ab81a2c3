"""``Controller``: a small recurrent network that says how much each past token matters to the newest one.

It reads the embeddings of tokens, and remembers of each as much as it needs to judge it later, whether its rows are
still held or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokred.core.checks import is_count
from tokred.core.schedules import kept_ceil
from tokred.kv.select import kept_mask, largest, rows_of

# Numbers inside of the judgement of pairs at a time, in training.
_BLOCK = 1 << 22


class Controller(nn.Module):
    """A GRU over the embeddings, and a judgement of pairs of its states.

    It stays in float32 whatever type the model has.

    Args:
        width: channels ``C`` of an embedding.
        size: channels of the states.
        hidden: channels inside of the judgement.
    """

    def __init__(self, width: int, size: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.gru = nn.GRU(width, size, batch_first=True)
        # The first map of two states side by side, in two: what it makes of a past one is made once.
        self.now, self.then = nn.Linear(size, hidden), nn.Linear(size, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)

    def read(self, x: Tensor, state: Tensor | None = None, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States after each token, and after the last.

        Args:
            x: ``[B, M, C]`` embeddings of the newest tokens.
            state: ``[B, size]`` after the token before them; None: they are the first.
            real: ``[B, M]`` bool, False on padding, which is not read; None: all are tokens.

        Returns:
            ``[B, M, size]`` (anything on padding) and ``[B, size]``, float32.

        Raises:
            ValueError: embeddings are of another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"the controller takes {self.width} channels, and embeddings have {x.shape[-1]}")
        x = x.float()
        begun = x.new_zeros(len(x), self.gru.hidden_size) if state is None else state
        if real is None:
            states, last = self.gru(x, begun[None].contiguous())
            return states, last[0]
        # Tokens first, so that what is read behind them is of no account.
        order = real.byte().sort(dim=1, descending=True, stable=True).indices[..., None]
        found, _ = self.gru(x.gather(1, order.expand_as(x)), begun[None].contiguous())
        count = real.sum(1)
        last = found.gather(1, (count - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, found.shape[2]))[:, 0]
        states = torch.empty_like(found).scatter(1, order.expand_as(found), found)
        return states, torch.where(count[:, None] > 0, last, begun)

    def importance(self, now: Tensor, then: Tensor) -> Tensor:
        """``[B, n, N]`` of past tokens for some states.

        Args:
            now: ``[B, n, size]`` states of those that ask.
            then: ``[B, N, hidden]`` what :attr:`then` makes of the states of those that are asked about.
        """
        inside = F.relu(self.now(now)[:, :, None] + then[:, None])
        found: Tensor = self.out(inside)[..., 0]
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Goes where the model goes, and stays in float32.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]


def returning(importance: Tensor, released: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Tokens that come back: the most important of those that were released, ties to the older one; None: none does.

    Args:
        importance: ``[B, N]`` float32.
        released: ``[B, N]`` bool.
        count: how many at most.

    Returns:
        ``[B, r]`` int64 ascending, and ``[B, r]`` bool, which of them are meant.
    """
    counts = released.sum(1, keepdim=True).clamp(max=count)
    most = largest(counts)
    if most == 0:
        return None
    kept = kept_mask(importance[:, None], released[:, None], None, counts)
    index, meant = rows_of(kept, most)
    return index[:, 0], meant[:, 0]


def labels(attention: Tensor, seen: Tensor, positives: float | int) -> tuple[Tensor, Tensor, Tensor]:
    """Which past tokens have the largest weights of each query.

    Args:
        attention: ``[B, N, N]`` float32 weights, by query and key.
        seen: ``[B or 1, N, N]`` bool: which keys are past tokens of each query, itself left out.
        positives: how many a query has, or which share of its past.

    Returns:
        ``[B, N, N]`` bool labels; which pairs count, those of queries that have others too; and ``[B, N, 1]`` by how
        much a positive one counts, so that both kinds count alike.
    """
    past = seen.expand_as(attention).sum(-1)
    if is_count(positives, 1):
        counts = past.clamp(max=int(positives))
    else:
        known = [kept_ceil(n, positives) for n in range(int(past.max()) + 1)]
        counts = torch.tensor(known, device=past.device)[past]
    found = kept_mask(attention, seen.expand_as(attention), None, counts)
    both = (counts > 0) & (counts < past)
    weight = (past - counts).float() / counts.clamp(min=1).float()
    return found, seen & both[..., None], weight[..., None]


def judged(sigma: Tensor, wanted: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    """Sum of the binary cross-entropy of labels over the pairs that count.

    Args:
        sigma: ``[B, n, N]`` importance.
        wanted: bool labels.
        counted: bool, which pairs count.
        weight: ``[B, n, 1]`` of positive ones.
    """
    each = F.binary_cross_entropy_with_logits(sigma, wanted.to(sigma.dtype), pos_weight=weight, reduction="none")
    return each.masked_fill(~counted, 0.0).sum()


def lesson(controller: Controller, states: Tensor, attention: Tensor, seen: Tensor, positives: float | int) -> Tensor:
    """Loss of a controller, a scalar: how far it is from telling the tokens with the largest weights from the others.

    Args:
        controller: in training.
        states: ``[B, N, size]`` with gradients.
        attention, seen, positives: as :func:`labels` has them.

    Raises:
        ValueError: no query has more past tokens than it has positive ones.
    """
    wanted, counted, weight = labels(attention, seen, positives)
    pairs = counted.sum()
    if not bool(pairs):
        raise ValueError(
            f"a text of {states.shape[1]} tokens teaches the controller nothing: with {positives} that are to be kept, "
            "no token has one to be released; give longer texts, or a smaller budget"
        )
    then, total = controller.then(states), states.new_zeros(())
    step = max(1, _BLOCK // (then.shape[0] * then.shape[1] * then.shape[2]))

    def part(now: Tensor, then: Tensor, some: slice) -> Tensor:
        return judged(controller.importance(now, then), wanted[:, some], counted[:, some], weight[:, some])

    for start in range(0, states.shape[1], step):
        some = slice(start, start + step)
        # What is inside of the judgement of all pairs would be as many numbers as pairs times channels.
        total = total + checkpoint(part, states[:, some], then, some, use_reentrant=False)
    return total / pairs
