"""``Rows``: keys and values ``[B, Hk, n, D]`` side by side, as shelves hold them; None where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def joined(*lots: Rows | None) -> Rows:
    """Several lots of rows, in one copy; of one, as they are."""
    keys, values = zip(*(rows for rows in lots if rows is not None), strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


def appended(rows: Rows | None, keys: Tensor, values: Tensor) -> Rows:
    """Rows with more behind, contiguous."""
    return (keys.contiguous(), values.contiguous()) if rows is None else joined(rows, (keys, values))


def counted(rows: Rows | None) -> int:
    """How many rows ``n`` there are."""
    return 0 if rows is None else rows[0].shape[2]


def selected(rows: Rows | None, index: Tensor) -> Rows | None:
    """The rows of other samples: ``index`` ``[B']`` of the old ones."""
    return None if rows is None else (rows[0].index_select(0, index), rows[1].index_select(0, index))
