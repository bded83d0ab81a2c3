# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Launch of the kernels: shapes of blocks, splits, and tuning. Imports triton, so it is itself imported late."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.similarity_rows import triton as kernels
from tokred.kernels.similarity_rows.torch_path import scale_of

# From this many programs on, each walking over all of ``b``, its norms are worth a pass of their own.
_SHARED_NORMS_FROM = 8
_MAX_SPLITS = 8


class Config(NamedTuple):
    """One way to cut the work."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


class Inputs(NamedTuple):
    """Inputs of all kernels: rows ``(B, G, N, D)``; with positions ``(B, 1, N, D)`` and ``(G, n)``."""

    a: Tensor
    b: Tensor
    metric: str
    a_mask: Tensor | None
    b_mask: Tensor | None
    a_positions: Tensor | None
    b_positions: Tensor | None

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Groups per sample, and the rows of ``a`` and ``b`` in each."""
        if self.a_positions is None or self.b_positions is None:
            return self.a.shape[1], self.a.shape[2], self.b.shape[2]
        return self.a_positions.shape[0], self.a_positions.shape[1], self.b_positions.shape[1]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def default_config(rows: int, columns: int, channels: int, itemsize: int, narrow: bool = False) -> Config:
    """Blocks that work untuned: rows of ``a`` stay in registers where they fit, and long walks use larger blocks.

    Args:
        rows: of ``a`` in one group.
        columns: rows of ``b`` in one group.
        channels: of each row.
        itemsize: bytes of one channel.
        narrow: whether the reduction needs registers of its own (top k).
    """
    whole = 128 if itemsize == 2 else 64
    block_d = max(16, triton.next_power_of_2(channels)) if channels <= whole else 64 if itemsize == 2 else 32
    if itemsize == 4 or narrow:  # float32 products run on the ordinary units, in registers
        return Config(32 if narrow else 64, 64, block_d, 4, 2)
    if rows > 1024 and columns > 1024:
        return Config(128, 256 if channels > whole else 128, block_d, 8, 3)
    return Config(64, 64 if columns <= 64 else 128, block_d, 4, 3)


def _candidates(config: Config) -> list[Config]:
    shapes = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8)]
    others = [Config(m, n, config.block_d, warps, stages) for m, n, warps in shapes for stages in (2, 3, 4)]
    return [config, *(other for other in others if other != config)]


def splits_for(programs: int, columns: int, block_n: int, processors: int) -> int:
    """In how many parts to walk over ``b`` so that the processors are busy; each part is at least four blocks long."""
    best, best_use = 1, 0.0
    for splits in range(1, min(_MAX_SPLITS, max(columns // (4 * block_n), 1)) + 1):
        waves = -(-programs * splits // processors)
        use = programs * splits / (waves * processors)
        if use > best_use + 0.05:
            best, best_use = splits, use
    return best


_TUNED: dict[tuple[Any, ...], Config] = {}


def _run(kernel: Any, inputs: Inputs, outputs: tuple[Tensor, ...], config: Config, splits: int, **meta: Any) -> None:
    a, b = inputs.a, inputs.b
    groups, rows, columns = inputs.lengths
    grouped = inputs.a_positions is not None
    batches = a.shape[0] * groups
    square = _squares(inputs, config)

    def outer(x: Tensor) -> tuple[int, int, int, int]:
        return (x.stride(0), 0 if grouped else x.stride(1), x.stride(2), x.stride(3))

    def mask(x: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if x is None else (x.stride(0), 0 if grouped else x.stride(1), x.stride(2))

    def data(x: Tensor | None) -> Tensor:
        if x is None:
            return a
        return x.view(torch.uint8) if x.dtype == torch.bool else x

    extra = [meta.pop(name) for name in ("margin", "alpha") if name in meta]
    per_split = -(-columns // splits)
    kernel[(triton.cdiv(rows, config.block_m) * splits * batches,)](
        a, b, data(inputs.a_mask), data(inputs.b_mask), data(inputs.a_positions), data(inputs.b_positions),
        data(square), *outputs, rows, columns, a.shape[-1], groups, b.shape[2], per_split,
        *outer(a), *outer(b), *mask(inputs.a_mask), *mask(inputs.b_mask), batches, *extra,
        METRIC=kernels.METRICS[inputs.metric], HAS_POSITIONS=grouped, HAS_A_MASK=inputs.a_mask is not None,
        HAS_B_MASK=inputs.b_mask is not None, HAS_SQUARE=square is not None,
        UPCAST=dispatch.interpreting() and a.dtype == torch.bfloat16, SPLITS=splits,
        ONE_CHUNK=a.shape[-1] <= config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=config.block_d, num_warps=config.warps, num_stages=config.stages, **meta,
    )  # fmt: skip


def _squares(inputs: Inputs, config: Config) -> Tensor | None:
    """Squared norms of ``b``, where enough programs share them; None leaves them to each program."""
    b = inputs.b
    if inputs.metric == "dot" or triton.cdiv(inputs.lengths[1], config.block_m) < _SHARED_NORMS_FROM:
        return None
    out = torch.empty(b.shape[:3], dtype=torch.float32, device=b.device)
    batches, n = b.shape[0] * b.shape[1], b.shape[2]
    kernels.row_square_kernel[(triton.cdiv(n, 32) * batches,)](
        b, out, n, b.shape[3], b.shape[1], *b.stride(), BLOCK_N=32, BLOCK_D=min(128, config.block_d * 2)
    )
    return out


def _chosen(kernel: Any, inputs: Inputs, make: Any, narrow: bool, **meta: Any) -> tuple[tuple[Tensor, ...], int]:
    """Run with the default configuration, or with the fastest one for sizes like these."""
    groups, rows, columns = inputs.lengths
    a = inputs.a
    config = default_config(rows, columns, a.shape[-1], a.element_size(), narrow)
    programs = a.shape[0] * groups

    def run(config: Config) -> tuple[tuple[Tensor, ...], int]:
        tiles = triton.cdiv(rows, config.block_m) * programs
        splits = 1 if narrow else splits_for(tiles, columns, config.block_n, _processors(a.device))
        outputs = make(splits, programs, rows)
        _run(kernel, inputs, outputs, config, splits, **dict(meta))
        return outputs, splits

    if dispatch.autotune() and not dispatch.interpreting() and not narrow:
        sizes = (dispatch.round_up_bucket(n) for n in (programs, rows, columns))
        key = (kernel, a.dtype, a.device, a.shape[-1], inputs.metric, inputs.a_positions is not None, *sizes)
        if key not in _TUNED:
            _TUNED[key] = _fastest(run, _candidates(config))
        config = _TUNED[key]
    return run(config)


def _fastest(run: Any, configs: list[Config]) -> Config:
    times: dict[Config, float] = {}
    for config in configs:
        try:
            times[config] = triton.testing.do_bench(functools.partial(run, config), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=lambda config: times[config])


def top(inputs: Inputs, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Scores float32 and indices int64, ``(B, G, n, k)``; with positions, indices are positions of ``b``."""
    a = inputs.a
    shape = (a.shape[0], *inputs.lengths[:2], k)

    def make(splits: int, batches: int, rows: int) -> tuple[Tensor, Tensor]:
        size = (splits, batches, rows * k)
        return (
            torch.empty(size, dtype=torch.float32, device=a.device),
            torch.empty(size, dtype=torch.int64, device=a.device),
        )

    if k > 1:
        slots = triton.next_power_of_2(k)
        kernel = kernels.topk_fwd_kernel
        (score, index), _ = _chosen(kernel, inputs, make, True, EXCLUDE_SELF=exclude_self, K=k, SLOTS=slots)
        return score.view(shape), index.view(shape)
    (score, index), splits = _chosen(kernels.best_match_fwd_kernel, inputs, make, False, EXCLUDE_SELF=exclude_self)
    if splits > 1:
        # max takes the first of equal values: the earlier split, so the lower index
        score, part = score.max(0, keepdim=True)
        index = index.gather(0, part)
    return score.view(shape), index.view(shape)


def total(inputs: Inputs, function: str, margin: float, alpha: float) -> Tensor:
    """Sums float32, ``(B, G, n)``."""
    a = inputs.a
    shape = (a.shape[0], *inputs.lengths[:2])

    def make(splits: int, batches: int, rows: int) -> tuple[Tensor]:
        return (torch.empty(splits, batches, rows, dtype=torch.float32, device=a.device),)

    (out,), splits = _chosen(
        kernels.row_sum_fwd_kernel, inputs, make, False,
        FUNCTION=kernels.FUNCTIONS[function], margin=float(margin), alpha=float(alpha),
    )  # fmt: skip
    result = (out.sum(0) if splits > 1 else out).view(shape)
    factor = scale_of(function, margin)
    return result if factor == 1 else result.mul_(factor)
