"""Records of the last forward, kept by thread: several threads may use one patched model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from tokred.adapters.passes import recomputed

K = TypeVar("K")
V = TypeVar("V")


class _Own(threading.local, Generic[K, V]):
    """Records of one thread."""

    def __init__(self) -> None:
        self.found: dict[K, V] = {}


class Records(Mapping[K, V]):
    """Records of the last forward of this thread; of the thread that ran last, where this one has run none.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._own: _Own[K, V] = _Own()
        self._last: dict[K, V] = {}

    def begin(self) -> None:
        """A forward begins: nothing is recorded of it yet."""
        self._own.found = self._last = {}

    def put(self, key: K, record: V) -> None:
        """Note what a place did. A checkpoint's recomputation in a thread of autograd belongs to the last forward."""
        own = self._own.found
        if own or not recomputed():
            self._last = own
        self._last[key] = record

    def _found(self) -> dict[K, V]:
        return self._own.found or self._last

    def __getitem__(self, key: K) -> V:
        return self._found()[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
