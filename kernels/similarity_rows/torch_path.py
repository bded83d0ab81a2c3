"""The path that runs without a kernel: few torch operations, over blocks of rows where the matrix would be large.

Everything here works on three-dimensional tensors ``(B, N, D)`` and in place, on inputs that record no gradient;
``autograd`` has the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype, without_autocast
from tokred.kernels.similarity_rows.reference import NORM_FLOOR

# Blocks of the matrix stay in the second-level caches of a CPU, where the passes after the product are cheap.
CPU_BLOCK_BYTES = 4 << 20
GPU_BLOCK_BYTES = 256 << 20
# Column numbers up to twice this are exact in float32.
_EXACT_INTEGERS = 1 << 23
# Below this size the fixed cost of five operations is more than what vectors save.
_FEW = 1 << 17


def block_sizes(batch: int, rows: int, columns: int, x: Tensor) -> tuple[int, int]:
    """How many samples and how many rows of each go into one block of the matrix."""
    budget = (GPU_BLOCK_BYTES if x.is_cuda else CPU_BLOCK_BYTES) // x.element_size()
    # An export has one path for batches of every size.
    if torch.compiler.is_exporting() or batch * rows * columns <= budget:
        return batch, rows
    if rows * columns <= budget:
        return budget // (rows * columns), rows
    return 1, max(budget // columns, 1)


Body = Callable[..., tuple[Tensor, ...]]


def over_blocks(
    body: Body, columns: int, by_row: tuple[Tensor | None, ...], by_sample: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """``body(first_row, *by_row, *by_sample)`` for every block, put together again along both dimensions.

    Args:
        body: answers with tensors ``(samples, rows, ...)``.
        columns: width of the matrix.
        by_row: ``(B, Na, ...)`` tensors cut to the block's samples and rows; the first is not None.
        by_sample: ``(B, ...)`` tensors cut to the block's samples.
    """
    first = by_row[0]
    assert first is not None
    batch, rows = first.shape[0], first.shape[1]
    step, row_step = block_sizes(batch, rows, columns, first)
    if step == batch and row_step == rows:
        return body(0, *by_row, *by_sample)
    samples: list[list[Tensor]] = []
    for i in range(0, batch, step):
        fixed = [None if x is None else x[i : i + step] for x in by_sample]
        blocks = []
        for j in range(0, rows, row_step):
            cut = [None if x is None else x[i : i + step, j : j + row_step] for x in by_row]
            blocks.append(body(j, *cut, *fixed))
        samples.append([torch.cat(parts, 1) for parts in zip(*blocks, strict=True)])
    return tuple(torch.cat(parts) for parts in zip(*samples, strict=True))


def norms(x: Tensor) -> Tensor:
    """``max(|x|, 1e-6)`` of every row, ``(B, N, 1)``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_min_(NORM_FLOOR)


def _ranked(b: Tensor, metric: str, b_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``b`` scaled and a bias per column, such that ``a @ scaled.mT + bias`` orders the columns of each row.

    The norm of ``a`` scales a whole row and its square shifts it: neither changes which column is best, so both are
    applied to the best scores alone. Columns that take no part have a bias of -inf.
    """
    bias: Tensor | None = None
    if metric == "cosine":
        b = b / norms(b)
    elif metric == "distance":
        bias = b.square().sum(-1).neg_().unsqueeze(1)
        b = b * 2
    if b_mask is not None:
        bias = b.new_zeros(b.shape[0], 1, b.shape[1]) if bias is None else bias
        bias = bias.masked_fill(~b_mask.unsqueeze(1), -torch.inf)
    return b, bias


def _scores(best: Tensor, a: Tensor, metric: str) -> Tensor:
    """Undo what `_ranked` left out: ``best`` is ``(B, Na, k)``."""
    # Not in place: torch 2.11 compiles gradients wrong where an output of `max` is changed (see test_compiles_whole).
    if metric == "cosine":
        return best / norms(a)
    if metric == "distance":
        return a.square().sum(-1, keepdim=True).sub(best).clamp_min_(0).sqrt_().neg_()
    return best


def top(
    a: Tensor, b: Tensor, k: int, metric: str, a_mask: Tensor | None, b_mask: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The ``k`` best columns of every row: scores and indices ``(B, Na, k)``.

    Args:
        a: ``(B, Na, D)``, any float type and strides.
        b: ``(B, Nb, D)``.
        k: how many; at most ``Nb``, except that ``k = 1`` is fine with ``Nb = 0``.
        metric: cosine, dot or distance.
        a_mask: ``(B, Na)``, rows that look for a partner.
        b_mask: ``(B, Nb)``, rows that may be one.
        exclude_self: row ``i`` of ``a`` is not compared with row ``i`` of ``b``.
    """
    dtype = accumulator_dtype(a.dtype)
    if b.shape[1] == 0:
        shape = (*a.shape[:2], k)
        return a.new_full(shape, -torch.inf, dtype=dtype), torch.zeros(shape, dtype=torch.int64, device=a.device)
    with without_autocast(a):
        a, b = a.to(dtype), b.to(dtype)
        scaled, bias = _ranked(b, metric, b_mask)

        def body(start: int, a: Tensor, columns: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            s = torch.bmm(a, columns) if bias is None else torch.baddbmm(bias, a, columns)
            if exclude_self:
                s.diagonal(start, 1, 2).fill_(-torch.inf)
            return _best(s, k)

        score, index = over_blocks(body, b.shape[1], (a,), (scaled.mT, bias))
        score = _scores(score, a, metric)
        if a_mask is not None:
            unused = ~a_mask.unsqueeze(-1)
            score, index = score.masked_fill(unused, -torch.inf), index.masked_fill(unused, 0)
        return score, index


def _best(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, lower index first; overwrites ``s``.

    One pass per result: ``torch.topk`` does not promise an order among equal values, and is no faster for few ``k``.
    """
    if k == 1:
        return _first_largest(s)
    score, index = _first_largest(s.clone())
    found = [(score, index)]
    for _ in range(k - 1):
        s.scatter_(-1, index, -torch.inf)
        score, index = _first_largest(s.clone())
        found.append((score, index))
    return torch.cat([x[0] for x in found], -1), torch.cat([x[1] for x in found], -1)


def _first_largest(s: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and the first column that has it; overwrites ``s``.

    On a CPU ``torch.max`` with indices is not vectorised. Four passes that are take less than half of its time: the
    largest value, then the smallest column number after all lesser values have been pushed past the last one.
    """
    plain = not s.is_cpu or torch.compiler.is_exporting()  # which has one path for batches of every size
    if plain or s.numel() <= _FEW or s.shape[-1] > _EXACT_INTEGERS:
        return s.max(-1, keepdim=True)
    score = s.amax(-1, keepdim=True)
    columns = torch.arange(s.shape[-1], dtype=s.dtype, device=s.device)
    torch.add(columns, s.lt_(score), alpha=s.shape[-1], out=s)
    return score, s.amin(-1, keepdim=True).to(torch.int64)


def apply_(s: Tensor, function: str, margin: float, alpha: float) -> Tensor:
    """`reference.transform` in place, up to the constant factor of `scale_of`."""
    if function == "count":
        return s.ge_(margin)  # the comparison in the type of s: summing booleans is many times slower
    if function == "gaussian":
        return s.sub_(1).square_().mul_(-0.5 / (1 - margin) ** 2).exp_()
    if margin != 0:
        s.sub_(margin)
    if function == "elu":
        return torch.nn.functional.elu_(s, alpha)
    return s.relu_() if function == "relu" else s


def scale_of(function: str, margin: float) -> float:
    """The constant factor that `apply_` leaves out."""
    return 1 / ((1 - margin) * math.sqrt(2 * math.pi)) if function == "gaussian" else 1.0


def operands(a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``x, y, row, column`` with ``s = x @ y.mT`` and, for distances, ``-sqrt(row + column - x @ y.mT)``."""
    if metric == "cosine":
        return a / norms(a), b / norms(b), None, None
    if metric == "dot":
        return a, b, None, None
    return a, b * 2, a.square().sum(-1, keepdim=True), b.square().sum(-1).unsqueeze(1)


def similarities(x: Tensor, columns: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """One block of the matrix, from what `operands` returned (``columns`` is the transposed ``y``)."""
    if row is None or column is None:
        return torch.bmm(x, columns)
    return torch.baddbmm(column, x, columns, alpha=-1).add_(row).clamp_min_(0).sqrt_().neg_()


def total(
    a: Tensor,
    b: Tensor,
    function: str,
    margin: float,
    alpha: float,
    metric: str,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
) -> Tensor:
    """The sum of a function of the similarities of every row, ``(B, Na)``; arguments as in `top`."""
    dtype = accumulator_dtype(a.dtype)
    with without_autocast(a):
        x, y, row, column = operands(a.to(dtype), b.to(dtype), metric)
        weight = None if b_mask is None else b_mask.to(dtype).unsqueeze(1)
        if function == "identity" and row is None:
            result = _sum_of_products(x, y, margin, weight)
        else:

            def body(_: int, x: Tensor, row: Tensor | None, columns: Tensor, *rest: Tensor | None) -> tuple[Tensor]:
                s = apply_(similarities(x, columns, row, rest[0]), function, margin, alpha)
                return ((s if rest[1] is None else s.mul_(rest[1])).sum(-1),)

            (result,) = over_blocks(body, y.shape[1], (x, row), (y.mT, column, weight))
        factor = scale_of(function, margin)
        result = result if factor == 1 else result.mul_(factor)
        return result if a_mask is None else result.masked_fill_(~a_mask, 0)


def _sum_of_products(x: Tensor, y: Tensor, margin: float, weight: Tensor | None) -> Tensor:
    """Sum of ``s - margin`` without any matrix: the product with the sum of the columns."""
    if weight is None:
        column_sum, count = y.sum(1, keepdim=True), float(y.shape[1])
        return torch.bmm(x, column_sum.mT).squeeze(-1).sub_(margin * count)
    column_sum = torch.bmm(weight, y)
    return torch.bmm(x, column_sum.mT).squeeze(-1).sub_(weight.sum(-1), alpha=margin)
