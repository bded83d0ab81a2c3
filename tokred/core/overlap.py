"""``OverlapReduction``: slots that may share members: a token can go into several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import accumulator_dtype, without_autocast


@dataclass(frozen=True, eq=False)
class OverlapReduction(Reduction):
    """A reduction whose slots are weighted sums of members, and a token may be a member of several.

    :attr:`Reduction.target` holds, for every token that stands for no slot, the first slot that it is a member of:
    what sizes, drawings and compositions see.

    Attributes:
        member: ``(B, M, K)`` int64, the tokens that are added up in each slot.
        share: ``(B, M, K)`` float32, the factor of each; 0 on padding.
        rest: ``(B, N)`` float32, factors of one more sum over all tokens, which is added to the slot ``rest_slot``; or
            None.
        rest_slot: ``(B,)`` int64.
    """

    member: Tensor | None = None
    share: Tensor | None = None
    rest: Tensor | None = None
    rest_slot: Tensor | None = None

    def members(self) -> Tensor:
        """``(B, M, K)`` int64.

        Raises:
            ValueError: the reduction was made without.
        """
        if self.member is None or self.share is None:
            raise ValueError("an overlapping reduction needs its members and their shares")
        return self.member

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """The weighted sums, ``(B, N, C)`` to ``(B, M, C)`` of ``x``'s type; sizes play no part.

        Computed in float32 (float64 for float64 input).

        Raises:
            ValueError: ``x`` does not fit, or a mode other than ``"sum"`` and ``"keep"`` is asked for.
        """
        if x.ndim != 3 or x.shape[1] != self.length or x.shape[0] != self.representative.shape[0]:
            raise ValueError(f"x must be {(*self.batch, self.length)} + (C,), got {tuple(x.shape)}")
        mode = mode or self.mode
        if mode not in ("sum", "keep"):
            raise ValueError(f"mode is {mode!r}; an overlapping reduction allows 'sum' and 'keep'")
        if mode == "keep":
            return self.gather(x)
        member, (b, m) = self.members(), self.representative.shape
        dtype = accumulator_dtype(x.dtype)
        with without_autocast(x):
            wide = x.to(dtype)
            first = torch.arange(b, device=x.device).view(-1, 1, 1) * self.length
            assert self.share is not None
            out: Tensor = F.embedding_bag(
                (member + first).view(b * m, -1),
                wide.reshape(-1, x.shape[-1]),
                mode="sum",
                per_sample_weights=self.share.to(dtype).reshape(b * m, -1),
            ).view(b, m, -1)
            if self.rest is not None and self.rest_slot is not None:
                total = self.rest.to(dtype).unsqueeze(1) @ wide
                at = torch.arange(m, device=x.device) == self.rest_slot.unsqueeze(1)
                out = torch.where(at.unsqueeze(-1), out + total, out)
            return out.to(x.dtype)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)

    def to(self, device: torch.device | str) -> OverlapReduction:
        """The same reduction with its tensors on ``device``."""
        own = ("member", "share", "rest", "rest_slot")
        moved = {k: t.to(device) for k in own if (t := getattr(self, k)) is not None}
        return replace(super().to(device), **moved)  # type: ignore[return-value]

    @classmethod
    def stack(cls, whole: Reduction, parts: Sequence[Reduction]) -> OverlapReduction:
        """The batch ``whole`` with the members of its parts; a part without members keeps its tokens as they are."""
        slots = whole.slots
        widest = max(p.members().shape[2] for p in parts if isinstance(p, OverlapReduction))
        member, share, rest, rest_slot = [], [], [], []
        for part in parts:
            b = part.representative.shape[0]
            if isinstance(part, OverlapReduction) and part.share is not None:
                own, weight = part.members(), part.share
            else:
                own = part.representative.unsqueeze(-1)
                weight = torch.ones_like(own, dtype=torch.float32)
            pad = (0, widest - own.shape[2], 0, slots - own.shape[1])
            member.append(F.pad(own, pad))
            share.append(F.pad(weight, pad))
            extra = part.rest if isinstance(part, OverlapReduction) else None
            at = part.rest_slot if isinstance(part, OverlapReduction) else None
            rest.append(share[-1].new_zeros(b, whole.length) if extra is None else extra)
            rest_slot.append(torch.zeros(b, dtype=torch.int64, device=own.device) if at is None else at)
        values = {k: getattr(whole, k) for k in ("representative", "source", "target", "length", "weight", "mask")}
        return cls(
            **values,
            mode="sum",
            by_size=False,
            member=torch.cat(member),
            share=torch.cat(share),
            rest=torch.cat(rest),
            rest_slot=torch.cat(rest_slot),
        )
