"""The rows of the GPU benchmark as data: kernel, size, floor and goal; and how they are printed.

Floors are counted bytes, operations and exponentials over what an H100 reaches: 3.0 TB/s of a copy, 800 TFLOP/s in
bfloat16, 3.7e12 exponentials a second. Below 5 us only launches count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernels import decode, matching, rows, scores
from benchmarks.kernels.case import Case, Sizes, Work, size_text

COPY_BANDWIDTH = 3.0e12
MATMUL_RATE = 800e12
EXP_RATE = 3.7e12


@dataclass(frozen=True)
class Goal:
    """What a kernel must reach: all of what is given.

    Attributes:
        times: multiple of the floor.
        microseconds: time of a call.
        speedup: times as fast as the plain torch chain.
        memory: share of the plain chain's peak memory.
    """

    times: float | None = None
    microseconds: float | None = None
    speedup: float | None = None
    memory: float | None = None

    def text(self) -> str:
        """``2x``, ``8 us, 4x chain``."""
        parts = []
        if self.times is not None:
            parts.append(f"{self.times:g}x")
        if self.microseconds is not None:
            parts.append(f"{self.microseconds:g} us")
        if self.speedup is not None:
            parts.append(f"{self.speedup:g}x chain")
        if self.memory is not None:
            parts.append(f"{self.memory:g} mem")
        return ", ".join(parts) or "-"

    def met(self, microseconds: float, floor: float | None, speedup: float, memory: float = 0.0) -> bool:
        """Whether a measurement reaches it."""
        return (
            (self.times is None or floor is None or microseconds <= self.times * floor)
            and (self.microseconds is None or microseconds <= self.microseconds)
            and (self.speedup is None or speedup >= self.speedup)
            and (self.memory is None or memory <= self.memory)
        )


NONE = Goal()


@dataclass(frozen=True)
class Row:
    """A case at one size.

    Attributes:
        case: the operator.
        sizes: of its inputs.
        floor: in microseconds; None: from the case's count of work.
        goal: what must be reached.
    """

    case: Case
    sizes: Sizes
    floor: float | None = None
    goal: Goal = NONE

    @property
    def size(self) -> str:
        """The sizes as text."""
        return size_text(self.sizes)

    def floor_us(self) -> float | None:
        """The given floor, or the counted one."""
        if self.floor is not None or self.case.work is None:
            return self.floor
        return floor_of(self.case.work(self.sizes))


def floor_of(
    work: Work, bandwidth: float = COPY_BANDWIDTH, matmul: float = MATMUL_RATE, exps: float = EXP_RATE
) -> float:
    """Microseconds of the least work at given rates."""
    return max(work.bytes / bandwidth, work.flops / matmul, work.exps / exps) * 1e6


GOALS = (
    Row(matching.alternate, {"B": 256, "N": 197, "C": 64}, 2.2, Goal(microseconds=8, speedup=4)),
    Row(matching.alternate, {"B": 256, "N": 577, "C": 64}, 6.5, Goal(times=2)),
    Row(matching.everywhere, {"B": 2, "N": 16384, "C": 320}, 81, Goal(times=2)),
    Row(matching.windowed, {"B": 2, "N": 65536, "C": 320, "window": 16}, 28, Goal(times=2)),
    Row(rows.merge, {"B": 256, "N": 197, "M": 181, "C": 768}, 50, Goal(times=1.3)),
    Row(rows.merge_norm, {"B": 256, "N": 197, "M": 181, "C": 768}, 73, Goal(times=1.3)),
    Row(scores.columns, {"B": 8, "H": 16, "N": 577, "D": 64}, 11.5, Goal(times=2)),
    Row(scores.columns, {"B": 8, "H": 16, "N": 4096, "D": 64}, 580, Goal(times=1.3)),
    Row(scores.window, {"B": 1, "H": 32, "Hk": 8, "M": 64, "N": 32768, "D": 128}, 23, Goal(times=2)),
    Row(rows.cache, {"B": 1, "Hk": 8, "N": 32768, "K": 16384, "D": 128}, 45, Goal(times=1.3)),
    # The floor is that of 32768 rows per head: 134 MB.
    Row(decode.flat_weights, {"H": 32, "Hk": 8, "T": 8 * 32768, "D": 128}, 45, Goal(times=1.5)),
)
# Timed without a goal.
OTHERS = (
    Row(decode.flat_weights, {"H": 32, "Hk": 8, "T": 32768, "D": 128}),
    Row(decode.flat, {"H": 32, "Hk": 8, "T": 8 * 32768, "D": 128}),
    Row(decode.rectangular, {"B": 1, "H": 32, "Hk": 8, "K": 32768, "D": 128}),
    Row(scores.window_twice, {"B": 1, "H": 32, "Hk": 8, "M": 64, "N": 32768, "D": 128}),
    Row(scores.columns_twice, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(scores.statistics, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(scores.attend, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(scores.attend_lse, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(scores.attend_scores, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(matching.energy, {"B": 256, "N": 197, "C": 64}),
    Row(matching.topk, {"B": 256, "N": 197, "C": 64, "k": 8}),
    Row(rows.merge, {"B": 256, "N": 577, "M": 554, "C": 1024}),
    Row(rows.unmerge, {"B": 256, "N": 197, "M": 181, "C": 768}),
    Row(rows.gather, {"B": 256, "N": 197, "M": 99, "C": 768}),
)
# Checked and not timed, at sizes that fill no block evenly.
CHECKS = (
    Row(matching.count, {"B": 5, "N": 301, "C": 72}),
    Row(matching.nearest, {"B": 3, "N": 203, "C": 40}),
    Row(rows.merge_sum, {"B": 7, "N": 203, "M": 150, "C": 136}),
    Row(rows.merge_max, {"B": 7, "N": 203, "M": 150, "C": 136}),
    Row(rows.merge_long, {"B": 7, "N": 203, "M": 150, "C": 136}),
    Row(rows.merge_back, {"B": 7, "N": 203, "M": 150, "C": 136}),
    Row(rows.sizes, {"B": 7, "N": 203, "M": 150, "C": 8}),
    Row(rows.cache_in_place, {"B": 2, "Hk": 3, "N": 1013, "K": 507, "D": 80}),
    Row(scores.lse_only, {"B": 2, "H": 3, "N": 333, "D": 80}),
    Row(scores.options, {"B": 2, "H": 6, "Hk": 2, "M": 45, "N": 333, "D": 64, "back": 100}),
    Row(scores.attend_channel, {"B": 2, "H": 3, "N": 333, "D": 64}),
    Row(decode.rectangular_weights, {"B": 3, "H": 6, "Hk": 2, "K": 1013, "D": 80}),
)


def render(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """A plain table; the first ``left`` columns and the last one are aligned to the left."""
    grid = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(header))]

    def row(line: Sequence[str]) -> str:
        last = len(line) - 1
        cells = [
            c.ljust(w) if i < left or i == last else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([row(grid[0]), "  ".join("-" * w for w in widths), *(row(line) for line in grid[1:])])
