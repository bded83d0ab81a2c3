"""Shorter sequences: kept columns right-aligned, and masks at the columns that are left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction

PAIRS = (
    "a mask for each pair of tokens does not fit a cache whose prompt was pruned: give attention_mask as [B, L] with "
    "zeros on padding, or none"
)


class Packed(NamedTuple):
    """Columns that are left, right-aligned.

    Attributes:
        columns: ``(B, M)`` int64, which column each was; filler on the left repeats columns that are gone.
        valid: ``(B, M)`` bool, False on filler.
        counts: real columns of each sample.
    """

    columns: Tensor
    valid: Tensor
    counts: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        """Whether there is filler."""
        return min(self.counts) < self.columns.shape[1]


def left_pack(keep: Tensor, counts: tuple[int, ...]) -> Packed:
    """Right-align the kept columns of every sample.

    Args:
        keep: ``(B, L)`` bool.
        counts: how many each sample keeps.
    """
    most = max(counts)
    columns = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - most :]
    return Packed(columns, keep.gather(1, columns), counts)


def last_real(real: Tensor, end: int) -> Tensor:
    """``(B, 1)`` int64: the last real column of every sample before ``end``.

    Args:
        real: ``(B, L)`` bool.
        end: columns of the prompt.
    """
    return real[:, :end].long().cumsum(1).argmax(1, keepdim=True)


def pack_slots(step: Reduction, real: Tensor | None, counts: tuple[int, ...]) -> tuple[Packed, Tensor]:
    """The slots of a reduction in the order of their representatives, right-aligned, without padding.

    Args:
        step: of ``L`` columns.
        real: ``(B, L)`` bool, the columns that are no padding; None: all.
        counts: real columns before.

    Returns:
        Where each kept slot's representative stood, and which slot it is, ``(B, M)``.
    """
    rep, slot_real = step.representative, step.mask
    if real is not None:
        alive = real.gather(1, rep)
        slot_real = alive if slot_real is None else slot_real & alive
    if slot_real is None:
        order = rep.argsort(dim=1, stable=True)
        left = (step.slots,) * rep.shape[0]
        columns = rep.gather(1, order)
        return Packed(columns, torch.ones_like(columns, dtype=torch.bool), left), order
    if step.mask is None and all(c == step.length for c in counts):
        left = (step.slots,) * rep.shape[0]
    else:
        left = tuple(slot_real.sum(1).tolist())
    order = torch.where(slot_real, rep, -1).argsort(dim=1, stable=True)[:, step.slots - max(left) :]
    return Packed(rep.gather(1, order), slot_real.gather(1, order), left), order


def gather_columns(t: Tensor, columns: Tensor, dim: int = 1) -> Tensor:
    """``t`` at the columns of each sample: ``(B or 1, L, ...)`` for ``dim=1``, ``(..., B or 1, L)`` for ``dim=-1``."""
    b, m = columns.shape
    if dim == 1:
        t = t.expand(b, *t.shape[1:])
        index = columns.reshape(b, m, *(1,) * (t.ndim - 2)).expand(b, m, *t.shape[2:])
        return t.gather(1, index)
    t = t.expand(*t.shape[:-2], b, t.shape[-1])
    return t.gather(-1, columns.expand(*t.shape[:-2], b, m))


def gather_mask(mask: Tensor, rows: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """A mask for every pair of tokens, at the rows and columns that are left.

    Args:
        mask: ``(B or 1, H or 1, Q, K)`` bool or additive.
        rows: ``(B, q)``, columns: ``(B, k)`` int64.
        valid: ``(B, k)`` bool, False columns are hidden; a row that would see nothing sees itself.
    """
    b, q = rows.shape
    mask = mask.expand(b, -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], q, -1))
    return hide(mask, valid[:, None, None, :])


def hide(mask: Tensor, seen: Tensor) -> Tensor:
    """``mask`` (``(B, H or 1, q, k)``, bool or additive) without what is not ``seen`` (bool, broadcast); a row that
    would see nothing sees itself."""
    q, k = mask.shape[-2:]
    itself = torch.arange(k, device=mask.device) == torch.arange(k - q, k, device=mask.device).unsqueeze(1)
    if mask.dtype == torch.bool:
        found = mask & seen
        return found | (itself & ~found.any(-1, keepdim=True))
    least = torch.finfo(mask.dtype).min
    found = torch.where(seen, mask, least)
    blind = (found <= least).all(-1, keepdim=True)
    return torch.where(itself & blind, torch.zeros_like(found), found)


def uncut(mask: Any) -> ValueError:
    """The refusal of a mask that is no tensor (flex attention's)."""
    return ValueError(
        f"a {type(mask).__name__} cannot be cut down to the tokens that are left: load the model with "
        "attn_implementation='sdpa' or 'eager'"
    )


def gather_any_mask(mask: Any, packed: Packed, before: Tensor, length: int) -> Any:
    """A mask of whatever shape the model was given, at the columns that are left.

    Args:
        mask: for the rows that layers hold (sliding ones hold the newest alone), then the ``length`` columns of this
            forward.
        packed: of these.
        before: ``(B, P)`` bool, which of the rows that layer 0 holds are real.
        length: columns of this forward.

    Raises:
        ValueError: the mask does not fit these rows.
    """
    if isinstance(mask, dict):
        return {name: gather_any_mask(one, packed, before, length) for name, one in mask.items()}
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise uncut(mask)
    if mask.ndim == 2:
        return torch.cat([before, packed.valid], 1)
    held = mask.shape[-1] - length
    if held < 0 or held > before.shape[1]:
        raise ValueError(PAIRS)
    rows = torch.arange(held, device=mask.device).expand(len(before), -1)
    valid = torch.cat([before[:, before.shape[1] - held :], packed.valid], 1)
    return gather_mask(mask, packed.columns, torch.cat([rows, packed.columns + held], 1), valid)
