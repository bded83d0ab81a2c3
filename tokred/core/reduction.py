"""``Reduction``: which input token goes into which output slot, with what weight. Every method answers with one.

Stored in a compact form that costs as little as the method's own decision: for each of the ``M`` output slots the
input token that stands for it (``representative``), and for the other tokens that are not simply dropped, where they go
(``source``, ``target``). Tokens named by neither are dropped. The dense map ``index`` is derived when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.merge_rows import MODES, merge_rows, merge_sizes, merge_tokens, unmerge_rows

Gated = Literal["keys", "rows"]

# Modes for which merging twice equals merging once by the composed reduction.
_COMPOSABLE = ("mean", "sum", "max", "keep")


@dataclass(frozen=True, eq=False)
class Reduction:
    """A reduction of ``N`` input tokens to ``M`` output slots, for a batch.

    Leading dimensions are ``(B,)`` for token streams and ``(B, Hk)`` for caches; written ``...`` below.

    Attributes:
        representative: ``(..., M)`` int64, the input token that stands for each slot: what position ids, rotary tables
            and grids go on with.
        source: ``(..., R)`` int64, the other input tokens that live on in some slot.
        target: ``(..., R)`` int64 in ``[0, M)``: the slot that each source goes into; -1 drops it, which is also how
            the sources of an uneven batch are padded.
        length: ``N``.
        weight: ``(..., N)`` float, an extra weight per input token when slots are combined, or None for ones.
        mask: ``(..., M)`` bool, True where a slot is real. None: every slot of every sample is.
        mode: how the members of a slot are combined unless :meth:`merge` is told otherwise: ``"mean"`` (weighted by
            size), ``"sum"``, ``"max"``, ``"mlerp"`` (norm-preserving mean), ``"keep"`` (the representative alone).
        by_size: whether the sizes given to :meth:`merge` weigh the members; False makes ``"mean"`` the plain mean.
        trivial: made by :meth:`identity`: no token moves, and without a gate a host need not act on it.
        complete: promises that no target is -1, which spares the merge from looking.
        inherit: whether the size of a slot counts its sources; False where they were pruned and the slot only stands in
            for them when the full length is restored.
        composes: whether every token lives on in one slot, so that :meth:`then` undoes several at once; False in
            subclasses that hand tokens out in shares, which are undone one after the other.
        gate: ``(..., N)`` float, differentiable soft decisions about the input tokens while a method learns: 1 stays, 0
            is as good as gone. None in inference. Hosts let it into the forward; :meth:`merge` does not look at it.
        gated: what the gate does: ``"keys"`` weighs tokens as keys in the attention of all layers that follow,
            ``"rows"`` multiplies the features that this layer puts out.
    """

    composes: ClassVar[bool] = True

    representative: Tensor
    source: Tensor
    target: Tensor
    length: int
    weight: Tensor | None = None
    mask: Tensor | None = None
    mode: str = "mean"
    by_size: bool = True
    trivial: bool = False
    complete: bool = False
    inherit: bool = True
    gate: Tensor | None = None
    gated: Gated = "keys"

    # ------------------------------------------------------------------ makers

    @classmethod
    def identity(cls, batch: tuple[int, ...], length: int, device: torch.device | str | None = None) -> Reduction:
        """The reduction that changes nothing: ``M = N``, every token its own slot.

        Args:
            batch: leading dimensions, ``(B,)`` or ``(B, Hk)``.
            length: number of tokens ``N``.
            device: where the indices live.
        """
        rows = torch.arange(length, device=device).expand(*batch, length)
        none = torch.empty(*batch, 0, dtype=torch.int64, device=device)
        return cls(rows, none, none, length, trivial=True)

    @classmethod
    def soft(cls, gate: Tensor, gated: Gated) -> Reduction:
        """All tokens stay, and a soft decision about each goes into the forward.

        Args:
            gate: ``(B, N)`` float in 0..1; ones for protected tokens.
            gated: what it does, see the class.

        Raises:
            ValueError: ``gated`` is unknown, or ``gate`` is no matrix of floats.
        """
        if gated not in get_args(Gated):
            raise ValueError(f"gated is {gated!r}; allowed are {', '.join(map(repr, get_args(Gated)))}")
        if gate.ndim != 2 or not gate.is_floating_point():
            raise ValueError(f"gate must be (B, N) float, got {tuple(gate.shape)} {gate.dtype}")
        same = cls.identity((gate.shape[0],), gate.shape[1], gate.device)
        return replace(same, gate=gate, gated=gated)

    @classmethod
    def keep(cls, kept: Tensor, length: int, mask: Tensor | None = None) -> Reduction:
        """Keep some tokens, drop the others (pruning, eviction).

        Args:
            kept: ``(..., M)`` int64, the tokens that stay, in their new order.
            length: number of input tokens ``N``.
            mask: ``(..., M)`` bool, False on padding where samples keep different numbers.
        """
        none = kept.new_empty(*kept.shape[:-1], 0)
        return cls(kept, none, none, length, mask=mask, mode="keep")

    @classmethod
    def from_index(
        cls, index: Tensor, slots: int, *, weight: Tensor | None = None, mode: str = "mean", sure: bool = False
    ) -> Reduction:
        """A reduction from the dense map: the slot of each input token. The first member of a slot represents it.

        Args:
            index: ``(..., N)`` integer in ``[0, slots)``, or -1 for a dropped token.
            slots: number of output slots ``M``. Slots that no token of a sample goes into are masked in that sample.
            weight: ``(..., N)`` weights, or None.
            mode: see the class.
            sure: the index is known to be in range and to fill every slot: no value is looked at, which would wait for
                a device and break a trace.

        Raises:
            ValueError: ``index`` has values outside ``[-1, slots)``, is not an integer tensor, or ``mode`` is unknown.
        """
        if index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"index must be int64 or int32, got {index.dtype}")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
        index = index.long()
        n = index.shape[-1]
        if not sure and index.numel() and (int(index.max()) >= slots or int(index.min()) < -1):
            raise ValueError(f"index must lie in [-1, {slots}), got [{int(index.min())}, {int(index.max())}]")
        positions = torch.arange(n, device=index.device).expand_as(index)
        slot = torch.where(index < 0, slots, index)
        first = torch.full((*index.shape[:-1], slots + 1), n, device=index.device)
        first = first.scatter_reduce(-1, slot, positions, "amin")[..., :slots]
        real = first < n
        mask = None if sure or bool(real.all()) else real
        first = torch.where(real, first, 0)
        # A token that represents its own slot must not be counted again as a source.
        is_first = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=index.device)
        is_first.scatter_(-1, torch.where(real, first, n), 1)
        target = torch.where(is_first[..., :n], -1, index)
        return cls(first, positions.contiguous(), target, n, weight=weight, mask=mask, mode=mode)

    # ------------------------------------------------------------------ facts

    @property
    def slots(self) -> int:
        """``M``, the length of the reduced sequence (of the longest sample)."""
        return self.representative.shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.representative.shape[:-1])

    @property
    def index(self) -> Tensor:
        """``(..., N)`` int64: the slot of each input token, -1 where it was dropped. Derived anew at each access."""
        n, m = self.length, self.slots
        rep, slot = self.representative, torch.arange(m, device=self.representative.device).expand(*self.batch, m)
        # Column n collects what must not land anywhere: padded slots and padded sources.
        out = torch.full((*self.batch, n + 1), -1, dtype=torch.int64, device=rep.device)
        if self.source.shape[-1]:
            out = out.scatter(-1, torch.where(self.target < 0, n, self.source), self.target)
        if self.mask is not None:
            rep = torch.where(self.mask, rep, n)
        return out.scatter(-1, rep, slot)[..., :n]

    def sizes(self, size: Tensor | None = None) -> Tensor:
        """How many original tokens each slot stands for.

        Args:
            size: ``(..., N)`` sizes of the input tokens, or None where each is one original token.

        Returns:
            ``(..., M)`` float32; zero on masked slots.
        """
        if not self.inherit or self.source.shape[-1] == 0:
            # No slot has other members than the token that stands for it.
            rep = self.representative
            all_sizes = None if size is None else size.float().reshape(*self.batch, self.length)
            out = torch.ones_like(rep, dtype=torch.float32) if all_sizes is None else all_sizes.gather(-1, rep)
        else:
            flat = None if size is None else size.reshape(-1, self.length)
            out = merge_sizes(flat, *self._flat(), self.length).view(*self.batch, self.slots)
        return out if self.mask is None else out * self.mask

    def groups(self) -> list[list[list[int]]]:
        """For each sample (leading dimensions flattened) and slot, its input tokens in ascending order."""
        found: list[list[list[int]]] = []
        for row in self.index.reshape(-1, self.length).tolist():
            members: list[list[int]] = [[] for _ in range(self.slots)]
            for token, slot in enumerate(row):
                if slot >= 0:
                    members[slot].append(token)
            found.append(members)
        return found

    # ------------------------------------------------------------------ acting on tokens

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """Reduce features: each slot combines its members.

        Args:
            x: ``(..., N, C)``, any float type; half precision is accumulated in float32.
            size: ``(..., N)`` sizes of the input tokens: the weights of the mean. None: all one (the plain mean).
            mode: overrides :attr:`mode`.
            slot_size: ``(..., M)`` what :meth:`sizes` answered for ``size``, where it is at hand already.

        Returns:
            ``(..., M, C)`` of ``x``'s type. A slot with a single member (and no weight) holds that very row.

        Raises:
            ValueError: ``x`` does not fit the reduction, or ``mode`` is unknown.
        """
        if x.ndim < 2 or x.shape[-2] != self.length or tuple(x.shape[:-2]) != self.batch:
            raise ValueError(f"x must be {(*self.batch, self.length)} + (C,), got {tuple(x.shape)}")
        mode = mode or self.mode
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
        if mode == "keep":
            return self.gather(x)
        if not self.by_size:
            size = slot_size = None
        rep, source, target = self._flat()
        flat_size = None if size is None else size.reshape(-1, self.length)
        weight = None if self.weight is None else self.weight.reshape(-1, self.length)
        flat = x.reshape(-1, *x.shape[-2:])
        totals = None if slot_size is None or self.mask is not None else slot_size.reshape(-1, self.slots)
        out = merge_rows(flat, rep, source, target, size=flat_size, weight=weight, mode=mode, slot_size=totals)
        return out.view(*self.batch, self.slots, x.shape[-1])

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`merge` and :meth:`sizes` in one call: the tokens ``(B, M, C)`` after this reduction, and how many
        original ones each stands for ``(B, M)``."""
        plain = self.weight is None and self.mask is None and self.inherit
        if x.ndim == 3 and self.mode == "mean" and self.by_size and plain:
            if x.shape[1] != self.length:
                raise ValueError(f"x must have {self.length} tokens, got shape {tuple(x.shape)}")
            rows = (self.representative, self.source, self.target)
            return merge_tokens(x, *rows, size=size, complete=self.complete)
        slot_size = self.sizes(size)
        return self.merge(x, size, slot_size=slot_size), slot_size

    def gather(self, x: Tensor) -> Tensor:
        """The representatives' rows: ``(..., N, C)`` to ``(..., M, C)``. Positions and tables are reduced so."""
        rep = self.representative.reshape(-1, self.slots)
        out = gather_rows(x.reshape(-1, *x.shape[-2:]), rep)
        return out.view(*self.batch, self.slots, x.shape[-1])

    def unmerge(self, y: Tensor, fill: Tensor | None = None) -> Tensor:
        """Restore the full length: every input token takes the value of its slot.

        Args:
            y: ``(..., M, C)``.
            fill: ``(..., N, C)`` values of dropped tokens; None: zeros.

        Returns:
            ``(..., N, C)``. ``merge(unmerge(y)) == y`` for every mode that averages.
        """
        if y.ndim < 2 or y.shape[-2] != self.slots or tuple(y.shape[:-2]) != self.batch:
            raise ValueError(f"y must be {(*self.batch, self.slots)} + (C,), got {tuple(y.shape)}")
        index = self.index
        out = unmerge_rows(y.reshape(-1, *y.shape[-2:]), index.reshape(-1, self.length))
        out = out.view(*self.batch, self.length, y.shape[-1])
        return out if fill is None else torch.where((index < 0).unsqueeze(-1), fill.to(out.dtype), out)

    def then(self, other: Reduction) -> Reduction:
        """This reduction followed by ``other``, as one.

        Merging by the result equals merging twice when both are means with sizes handed on, or both sums, maxima or
        keeps; for other pairs the result still maps, un-merges and counts, and its ``merge`` has to name a mode.

        Raises:
            ValueError: ``other`` starts from another number of tokens or another batch.
        """
        if other.length != self.slots or other.batch != self.batch:
            raise ValueError(
                f"a reduction to {self.slots} slots of batch {self.batch} cannot be followed by one from "
                f"{other.length} tokens of batch {other.batch}"
            )
        first = self.index
        index = torch.where(first < 0, -1, other.index.gather(-1, first.clamp(min=0)))
        rep = self.representative.gather(-1, other.representative)
        positions = torch.arange(self.length, device=index.device).expand_as(index)
        is_rep = torch.zeros(*self.batch, self.length + 1, dtype=torch.bool, device=index.device)
        real = rep if other.mask is None else torch.where(other.mask, rep, self.length)
        target = torch.where(is_rep.scatter(-1, real, 1)[..., :-1], -1, index)
        weight = self.weight
        if other.weight is not None:
            carried = other.weight.gather(-1, first.clamp(min=0))
            weight = carried if weight is None else weight * carried
        same = self.mode == other.mode and self.mode in _COMPOSABLE
        moved = bool(self.source.shape[-1] or other.source.shape[-1])
        mode = self.mode if same else (other.mode if not moved else "mean")
        by_size = self.by_size and other.by_size
        gate = self.gate
        if other.gate is not None:
            later = torch.where(first < 0, 0, other.gate.gather(-1, first.clamp(min=0)))
            gate = later if gate is None else gate * later
        out = Reduction(rep, positions.contiguous(), target, self.length, weight, other.mask, mode, by_size)
        return out if gate is None else replace(out, gate=gate, gated=self.gated if other.gate is None else other.gated)

    def to(self, device: torch.device | str) -> Reduction:
        """The same reduction with its tensors on ``device``."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            representative=self.representative.to(device),
            source=self.source.to(device),
            target=self.target.to(device),
            weight=move(self.weight),
            mask=move(self.mask),
            gate=move(self.gate),
        )

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.representative.ndim == 2:
            return self.representative, self.source, self.target
        return self.representative.flatten(0, -2), self.source.flatten(0, -2), self.target.flatten(0, -2)
