# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Common pieces of loops over rows that numba compiles for a CPU: rows become arrays, and work is shared out."""

from __future__ import annotations

import numba
import torch
from torch import Tensor


def shares(pairs: int, units: int) -> int:
    """Shares of the units of each of ``pairs`` heads: enough for all threads, and none without work; 0 for a single
    thread, which does not wake others up."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if threads == 1:
        return 0
    numba.set_num_threads(threads)
    return max(1, min(units, -(-4 * threads // pairs)))  # type: ignore[no-any-return]


@numba.njit(inline="always")
def span(task, splits, count):
    """Of a task, one of ``splits`` shares of ``count`` units of each pair: its pair and share, its first unit and the
    one behind its last."""
    share = (count + splits - 1) // splits
    begin = (task % splits) * share
    return task // splits, task % splits, begin, min(begin + share, count)


def by_pair(x: Tensor) -> Tensor:
    """``[B * Hk, C, ...]`` without gaps: the buffer that ``x`` is the beginning of, if it is one, else a copy.

    With whatever stands behind the rows that are meant: loops over an array without gaps are those that become vector
    operations.
    """
    b, heads, _, *inner = x.shape
    sample, pair, *steps = x.stride()
    size = 1
    for n, step in zip(reversed(inner), reversed(steps), strict=False):
        if step != size:
            return x.contiguous().flatten(0, 1)
        size *= n
    room = pair // max(size, 1)
    fits = (
        steps[0] == size
        and pair == room * size
        and sample == heads * pair
        and x.untyped_storage().nbytes() >= (x.storage_offset() + b * heads * pair) * x.element_size()
    )
    return x.as_strided((b * heads, room, *inner), (pair, *steps)) if fits else x.contiguous().flatten(0, 1)
