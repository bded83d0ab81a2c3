"""A benchmark in several processes at once, as ``accelerate launch`` begins them: each measures its share of the data.

All processes go through the same rows. Of each row they pool the samples and the times, and the first process writes
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tokred.bench.engine import Engine, reason
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Batches
from tokred.bench.scoring import Tally
from tokred.bench.timing import Memory

T = TypeVar("T")


def count() -> int:
    """How many processes measure together; 1 where there is only this one.

    Raises:
        ImportError: they were launched together, and accelerate, by which they find each other, is not installed.
    """
    if not dist.is_available():
        return 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError(
                "several processes were launched, which find each other by accelerate: pip install accelerate"
            ) from error
        PartialState()
    return dist.get_world_size() if dist.is_initialized() else 1


class OtherProcessError(RuntimeError):
    """A row failed in another process."""


def gather(found: T) -> list[T]:
    """The objects of all processes, in their order."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, found)
    return out


def _outcome(do: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return do(), ""
    except Exception as error:
        return None, reason(error)


class RankEngine(Engine):
    """An engine of one of several processes."""

    def __init__(self, *given: Any) -> None:
        batches: Batches = given[4]
        prints = gather(batches.prints)
        if all(one == prints[0] for one in prints):
            batches.share(dist.get_rank(), len(prints))
        else:  # a loader that accelerate has prepared yields each process its own batches
            batches.prints = [text for one in prints for text in one]
        super().__init__(*given)
        # One reader and one writer of the table.
        self.there, self.stored = gather((self.there, self.stored))[0]
        if dist.get_rank():
            self.path = None

    def cases(self, one: Entry) -> list[str]:
        """The first process's, so that all find the same rows."""
        if one.label not in self._cases:
            self._cases[one.label] = gather(super().cases(one))[0]
        return self._cases[one.label]

    @property
    def first(self) -> bool:
        """True in the process that speaks and writes."""
        return dist.get_rank() == 0

    def cost(self, one: Entry, single: bool = False) -> Cost:
        """Cost of a row as the first process finds it, so that all choose the same rows."""
        mine = _outcome(lambda: Engine.cost(self, one, single)) if self.first else (None, "")
        found, why = gather(mine)[0]
        if found is None:
            raise OtherProcessError(why) if not self.first else ValueError(why)
        return found

    def measured(self, one: Entry) -> dict[str, Any]:
        """Quality and times of a row over the samples of all processes; a row that fails in one fails in all."""
        self._pooled = False
        try:
            return super().measured(one)
        except Exception as error:
            if not self._pooled:  # the others wait for the samples of this one
                gather(reason(error))
            raise

    def everywhere(self, found: list[Any]) -> list[Any]:
        """The lists of all processes as one."""
        return [item for one in gather(found) for item in one]

    def pooled(
        self, tallies: list[Tally], times: list[list[float]], memory: Memory, lengths: list[float]
    ) -> tuple[Any, ...]:
        """Samples, times and lengths of all processes; the memory of the one that took most.

        Raises:
            OtherProcessError: one of them failed.
        """
        self._pooled = True
        found: list[Any] = gather((tallies, times, memory, lengths))
        wrong = next((one for one in found if isinstance(one, str)), None)
        if wrong is not None:
            raise OtherProcessError(wrong)
        values, several, memories, written = zip(*found, strict=True)
        joined = [Tally.joined(parts) for parts in zip(*values, strict=True)]
        all_times = [[t for process in several for t in process[i]] for i in range(len(times))]
        return joined, all_times, max(memories), [n for one in written for n in one]
