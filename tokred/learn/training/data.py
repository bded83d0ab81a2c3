"""Samples by their numbers, in an order that follows from the seed and the step alone, so that training can go on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tokred.learn.loop import logits_of

LABELS = ("labels", "label")


class Samples:
    """Labelled samples to train on.

    Args:
        found: a pair of tensors, images ``(N, ...)`` and labels ``(N, ...)``; or a data set with ``len`` and items by
            number.
        collate: makes a batch of a list of items: a pair, or a mapping with ``labels``; None: torch's own.

    Raises:
        TypeError: there are no items by number.
        ValueError: the tensors are of different lengths, or there are no samples.
    """

    def __init__(self, found: Any, collate: Callable[[Sequence[Any]], Any] | None = None) -> None:
        self.found, self.collate = found, collate
        self.tensors = isinstance(found, tuple | list) and len(found) == 2 and all(torch.is_tensor(t) for t in found)
        if self.tensors and len(found[0]) != len(found[1]):
            raise ValueError(f"as many labels as images are needed, got {len(found[0])} images, {len(found[1])} labels")
        if not self.tensors and not (hasattr(found, "__len__") and hasattr(found, "__getitem__")):
            raise TypeError(
                "the samples must be a pair of tensors, or a data set with a length and items by number, got a "
                f"{type(found).__name__}"
            )
        if not len(self):
            raise ValueError("there are no samples to train on")

    def __len__(self) -> int:
        return len(self.found[0]) if self.tensors else len(self.found)

    def batch(self, rows: Sequence[int]) -> tuple[Any, Tensor]:
        """Inputs (a tensor, or a mapping of keywords) and labels of some samples.

        Raises:
            ValueError: the samples have no labels.
        """
        if self.tensors:
            index = torch.as_tensor(rows, device=self.found[0].device)
            return self.found[0][index], self.found[1][index]
        made = (self.collate or default_collate)([self.found[i] for i in rows])
        if isinstance(made, Mapping):
            name = next((name for name in LABELS if name in made), None)
            if name is not None:
                return {key: value for key, value in made.items() if key != name}, made[name]
        elif isinstance(made, tuple | list) and len(made) == 2:
            return made[0], made[1]
        kind = f"a mapping of {', '.join(made)}" if isinstance(made, Mapping) else f"a {type(made).__name__}"
        raise ValueError(f"a batch must be a pair of inputs and labels, or a mapping with 'labels', got {kind}")

    def rows(self, step: int, size: int, seed: int) -> list[int]:
        """The samples of a step, counted from 0, in batches of ``size``: every epoch in an order of its own, whose last
        samples are left out where they fill no batch.

        Raises:
            ValueError: there are fewer samples than that.
        """
        each = len(self) // size
        if not each:
            raise ValueError(f"a batch of {size} needs as many samples, got {len(self)}")
        epoch, place = divmod(step, each)
        found: list[int] = _order(len(self), seed, epoch)[place * size : (place + 1) * size].tolist()
        return found

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """All samples once, in their order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """``(count,)`` int64 the order of an epoch; kept for its next step, as it is drawn whole."""
    # Two numbers mixed, lest the second epoch of one seed be the first of the next.
    draws = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) % 2**63)
    return torch.randperm(count, generator=draws)


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, or a mapping of some, on a device."""
    if isinstance(value, Mapping):
        return {name: moved(one, device) for name, one in value.items()}
    return value.to(device) if torch.is_tensor(value) else value


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples, size: int = 50, *, first: int = 1) -> float:
    """Share of samples whose class is the model's highest output.

    Args:
        model: in evaluation mode; returns logits ``(B, K)``, or what has them as ``logits``.
        samples: with integers as labels.
        size: of a batch.
        first: how many of the highest outputs count.

    Raises:
        ValueError: the labels are others, such as maps.
    """
    device, hits = next(model.parameters()).device, 0
    for x, y in samples.batches(size):
        if y.ndim != 1:
            raise ValueError(
                f"top-1 is measured on labels (B,), one class a sample, got {tuple(y.shape)}: hold no samples out "
                "(held 0)"
            )
        best = logits_of(model, moved(x, device)).topk(first, -1).indices
        hits += int((best == y.to(device)[:, None]).any(-1).sum())
    return hits / len(samples)
