"""Columns that are left: how shorter sequences are packed, and what is known of tokens that never reached the layers of
a cache. The record is kept on the cache itself, see :mod:`tokred.adapters.vlm.tokens.recorded`."""

# Why pruned prompts have a ledger of their own (Track) beside that of cache layers under a policy (kv.layer.TokLayer:
# positions and slots seen). One ledger was tried on paper; for it to serve both,
# - a TokLayer would have to take rows from any attention. It takes them from a patched one alone, since its rows differ
#   by head and it makes its masks itself; a pruned prompt leaves attention, and whatever kernel it is, to the host;
# - its positions would have to be shared: by sample and group of layers, not by layer and head. After a prompt of 422
#   tokens of which 122 are left (16 layers, 4 key/value heads) Track holds 1 KB and is reordered by 2 operations, the
#   layers hold 34 KB and are reordered by 16; a decode step has 1,181 operations with Track, 1,175 without anything;
# - hosts would have to take padding by row. They index the mask of the caller by one offset a layer, as if rows stood
#   together, so MaskMaker would stay, and so would sizes that tell of the first layer of a kind;
# - sliding layers, which are the host's own, would need positions too: their windows count places in the conversation;
# - crop would have to go back behind an eviction where the newest columns are all there, as Track does.
# Gained would be Clock.behind and the engine's count of the prompt, which the two ledgers tell each other.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction

if TYPE_CHECKING:
    from tokred.adapters.vlm.calibration import Rows
    from tokred.adapters.vlm.tokens.steps import Chosen


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
        """True where some sample has filler."""
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
    """``(B, 1)`` int64: the last real column ``(B, L)`` of every sample before ``end``."""
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
    # Slots come in the order of the method's groups. Decoders need tokens in the order of the prompt, and the newest
    # one of every sample in the last column, from which the next token is told; filler therefore stands left.
    rep, slot_real = step.representative, step.mask
    if real is not None:
        alive = real.gather(1, rep)
        slot_real = alive if slot_real is None else slot_real & alive
    if slot_real is None:
        order = rep.argsort(dim=1, stable=True)
        left = (step.slots,) * rep.shape[0]
        columns = rep.gather(1, order)
        return Packed(columns, torch.ones_like(columns, dtype=torch.bool), left), order
    # Counts are known without waiting for the device where neither side has padding.
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


@dataclass(frozen=True)
class Group:
    """Layers that hold the same columns.

    Attributes:
        first: the first of these layers; 0 for what left before the language model.
        columns: ``(B, P)`` int64, which of the tokens that came to layer 0 (for group 0: to the model) each row is.
        valid: ``(B, P)`` bool, False on filler and padding.
        ragged: whether any is False.
        width: columns of layer 0 (for group 0: tokens of the prompt) that ``columns`` selects from.
    """

    first: int
    columns: Tensor
    valid: Tensor
    ragged: bool
    width: int

    @property
    def dropped(self) -> int:
        """Columns that these layers lack."""
        return self.width - self.columns.shape[1]

    def pick(self, index: Tensor) -> Group:
        """The group of other samples."""
        index = index.to(self.columns.device)
        return replace(self, columns=self.columns.index_select(0, index), valid=self.valid.index_select(0, index))

    def cut(self, count: int) -> Group:
        """Without the newest ``count`` columns, which are all there."""
        if count == 0:
            return self
        return Group(self.first, self.columns[:, :-count], self.valid[:, :-count], self.ragged, self.width - count)

    def ends_with(self, count: int) -> bool:
        """True where the newest ``count`` columns of every sample are there (waits for the device)."""
        if count > self.columns.shape[1]:
            return False
        wanted = torch.arange(self.width - count, self.width, device=self.columns.device)
        tail = slice(self.columns.shape[1] - count, None)
        return bool((self.columns[:, tail] == wanted).all() & self.valid[:, tail].all())


def extended(
    old: Group | None, first: int, past: int, columns: Tensor, width: int, valid: Tensor, ragged: bool
) -> Group:
    """A group after a further forward.

    Args:
        old: the group before, if there was one; columns that came after it are all there.
        first: its first layer.
        past: columns to select from before this forward.
        columns: ``(B, m)`` those of this forward that are left, of ``width``.
        valid: ``(B, P + m)`` bool, for all rows; ``ragged`` whether any may be False.
    """
    b = columns.shape[0]
    if old is None:
        parts = [torch.arange(past, device=columns.device).expand(b, -1)]
    else:
        parts = [old.columns, torch.arange(old.width, past, device=columns.device).expand(b, -1)]
    return Group(first, torch.cat([*parts, columns + past], 1), valid, ragged, past + width)


@dataclass
class Track:
    """The tokens of the conversation that rows of one cache stand for.

    Attributes:
        covered: tokens of the conversation, counted from its begin, that the groups tell about; later ones are in all
            layers.
        groups: by first layer; none of layer 0 where nothing left before the language model.
        behind: ``(B,)`` int64, how many positions each sample lags behind where positions are counted anew.
        calibration: of the rows of layer 0, where attention to them is calibrated.
        chosen: their visual ones, where generated tokens choose which they attend to.
    """

    covered: int
    groups: list[Group] = field(default_factory=list)
    behind: Tensor | None = None
    calibration: Rows | None = None
    chosen: Chosen | None = None

    @property
    def outer(self) -> Group | None:
        """The group of layer 0, where something left before the language model; else None."""
        return self.groups[0] if self.groups and self.groups[0].first == 0 else None

    @property
    def dropped(self) -> int:
        """Tokens of the conversation that layer 0 lacks."""
        return 0 if self.outer is None else self.outer.dropped

    @property
    def entered(self) -> int:
        """Columns of layer 0 that the groups tell about."""
        return self.covered - self.dropped

    def inner(self, layer: int) -> Group | None:
        """The group that ``layer`` belongs to, where it holds other columns than layer 0."""
        found = [g for g in self.groups if 0 < g.first <= layer]
        return found[-1] if found else None

    def copy(self) -> Track:
        """One that is set apart from this."""
        return replace(self, groups=list(self.groups))

    def pick(self, index: Tensor) -> None:
        """Go on with other samples."""
        self.groups = [g.pick(index) for g in self.groups]
        if self.behind is not None:
            self.behind = self.behind.index_select(0, index.to(self.behind.device))
        self.calibration = None if self.calibration is None else self.calibration.pick(index)
        self.chosen = None if self.chosen is None else self.chosen.pick(index)

    def cut(self, count: int) -> None:
        """Forget the newest ``count`` covered tokens.

        Raises:
            ValueError: some of them have been dropped from some layer, so that taking them back would take others.
        """
        if not all(g.ends_with(count) for g in self.groups):
            raise ValueError(
                f"cannot crop the cache into what was pruned: of the newest {count} tokens of the prompt some were "
                "dropped; crop to the end of the prompt, or copy the cache before it"
            )
        self.groups = [g.cut(count) for g in self.groups]
        self.calibration = None if self.calibration is None else self.calibration.cut(count)
        self.chosen = None if self.chosen is None else self.chosen.cut(count)
        self.covered -= count
