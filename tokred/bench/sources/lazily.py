"""Batches that are made when they are asked for, as often as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Lazily:
    """An iterable of batches over items: nothing but the items is held.

    Args:
        items: whatever ``make`` makes batches of.
        batch: of each at most.
        make: the batch of some items.
    """

    def __init__(self, items: Sequence[Any], batch: int, make: Callable[[Sequence[Any]], Any]) -> None:
        self.items, self.batch, self.make = items, batch, make

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.items), self.batch):
            yield self.make(self.items[start : start + self.batch])
