"""Batches whose samples keep different numbers of tokens: rows packed to the longest sample, a mask for the rest.

The length of the longest sample has to be known on the host, so each such step waits for the device once, unless the
method knows the numbers beforehand. Compiled and traced code cannot wait: there every sample is padded to the most
that it can have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.selection import protected_rows
from tokred.kernels.dispatch import traced


def bounds(count: Tensor, most: int) -> tuple[int, int]:
    """The smallest and the largest of ``(B,)`` numbers from 0 to ``most``, as integers; waits for the device.

    In compiled and traced code 0 and ``most``.
    """
    if traced():
        return 0, most
    if count.shape[0] == 0:
        return 0, 0
    low, high = torch.stack(torch.aminmax(count)).tolist()
    return low, high


def pack(
    rows: Tensor, stays: Tensor, known: tuple[int, int] | None = None, most: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Move the entries that stay to the front, in their order, and cut to the longest sample.

    Args:
        rows: ``(B, L)`` int64.
        stays: ``(B, L)`` bool.
        known: fewest and most entries that stay in any sample, where that is known; None asks the device.
        most: the most that can stay; None: all.

    Returns:
        ``(B, M)`` the entries, behind them as padding some that do not stay; ``(B, M)`` bool, False on padding, or None
        where every sample keeps ``M``.
    """
    if rows.shape[0] == 1 and known is None and not traced():  # a sample of its own has no padding
        return rows[stays].unsqueeze(0), None
    low, high = bounds(stays.sum(1), rows.shape[1] if most is None else most) if known is None else known
    if low == high and rows.device.type == "cpu" and not traced():  # on others this would wait
        return rows[stays].view(rows.shape[0], high), None
    order = stays.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :high]
    packed = rows.gather(1, order)
    return packed, None if low == high else stays.gather(1, order)


def with_protected(rows: Tensor, mask: Tensor | None, n: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor | None]:
    """Packed rows between the leading and the trailing protected tokens, which every sample has.

    Args:
        rows: ``(B, M)`` positions in the whole sequence.
        mask: ``(B, M)`` or None, as :func:`pack` returns it.
        n: length of the sequence.
        prefix, suffix: protected tokens.
    """
    b = rows.shape[0]
    lead, tail = protected_rows(b, n, prefix, suffix, rows.device)
    if mask is not None:
        mask = torch.cat([mask.new_ones(b, prefix), mask, mask.new_ones(b, suffix)], 1)
    return torch.cat([lead, rows, tail], 1), mask
