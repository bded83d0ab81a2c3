"""``SoftReduction``: tokens that are handed out in shares, a part of each to every slot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import accumulator_dtype, without_autocast
from tokred.kernels.gather_rows import gather_rows


@dataclass(frozen=True, eq=False)
class SoftReduction(Reduction):
    """A reduction whose sources are shared out over the slots, instead of going into one slot each.

    :attr:`Reduction.target` holds the slot that gets the largest share: what drawings, counts and compositions see.
    Shares do not compose: several soft reductions in a row are undone one after the other.

    Attributes:
        share: ``(B, M, R)`` float, the part of each source that each slot receives; the column of every real source
            sums to one, that of padding to zero.
    """

    composes: ClassVar[bool] = False
    share: Tensor | None = None

    @classmethod
    def make(
        cls,
        representative: Tensor,
        source: Tensor,
        share: Tensor,
        length: int,
        *,
        by_size: bool = True,
        mode: str = "mean",
        mask: Tensor | None = None,
    ) -> SoftReduction:
        """A reduction from the kept tokens, the shared ones, and their shares.

        Args:
            representative: ``(B, M)`` int64.
            source: ``(B, R)`` int64.
            share: ``(B, M, R)``; columns sum to one.
            length: number of input tokens ``N``.
            by_size: whether sizes weigh the members.
            mode: ``"mean"``, or ``"keep"``: features of the shared tokens go nowhere.
            mask: ``(B, M)`` bool, False on padding.

        Raises:
            ValueError: shapes do not fit together, or ``mode`` is neither of the two.
        """
        if share.shape != (*representative.shape, source.shape[-1]) or source.shape[0] != representative.shape[0]:
            raise ValueError(
                f"share must be (B, M, R) for {tuple(representative.shape)} slots and {tuple(source.shape)} sources, "
                f"got {tuple(share.shape)}"
            )
        if mode not in ("mean", "keep"):
            raise ValueError(f"mode is {mode!r}; a soft reduction allows 'mean' and 'keep'")
        target = share.argmax(dim=1)
        if mask is not None:
            target = target.masked_fill(share.sum(1) == 0, -1)
        return cls(representative, source, target, length, mask=mask, mode=mode, by_size=by_size, share=share)

    def sizes(self, size: Tensor | None = None) -> Tensor:
        """``(B, M)`` float32: own size and the received shares; fractions. Zero on masked slots."""
        share = self._share().float()
        if size is None:
            out = 1 + share.sum(-1)
        else:
            size = size.float()
            # Not a product of matrices, which autocast would run in half precision.
            received = (share * size.gather(1, self.source).unsqueeze(1)).sum(-1)
            out = size.gather(1, self.representative) + received
        return out if self.mask is None else out * self.mask

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """The mean of own and received features, weighted by shares (and sizes): ``(B, N, C)`` to ``(B, M, C)``.

        Computed in float32 (float64 for float64 input). A slot that receives nothing holds its very row.

        Raises:
            ValueError: ``x`` does not fit, or a mode other than mean or keep is asked for.
        """
        if x.ndim != 3 or x.shape[1] != self.length or x.shape[0] != self.representative.shape[0]:
            raise ValueError(f"x must be {(*self.batch, self.length)} + (C,), got {tuple(x.shape)}")
        mode = mode or self.mode
        if mode not in ("mean", "keep"):
            raise ValueError(f"mode is {mode!r}; a soft reduction allows 'mean' and 'keep'")
        own = self.gather(x)
        if mode == "keep":
            return own
        dtype = accumulator_dtype(x.dtype)
        with without_autocast(x):
            share = self._share().to(dtype)
            received = share.sum(-1, keepdim=True)
            total = 1 + received
            if self.by_size and size is not None:
                size = size.to(dtype)
                share = share * size.gather(1, self.source).unsqueeze(1)
                received = share.sum(-1, keepdim=True)
                total = size.gather(1, self.representative).unsqueeze(-1) + received
            own = own.to(dtype)
            # The difference, so that a slot without shares and equal tokens keep their very values.
            moved = (share @ gather_rows(x, self.source).to(dtype) - received * own) / total
            return (own + moved).to(x.dtype)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)

    def unmerge(self, y: Tensor, fill: Tensor | None = None) -> Tensor:
        """Full length again: a kept token takes its slot, a shared one the mean of the slots by its shares.

        Args:
            y: ``(B, M, C)``.
            fill: ``(B, N, C)`` values of tokens that are neither; None: zeros.

        Raises:
            ValueError: ``y`` does not fit.
        """
        if y.ndim != 3 or y.shape[:2] != self.representative.shape:
            raise ValueError(f"y must be {(*self.batch, self.slots)} + (C,), got {tuple(y.shape)}")
        b, m, c = y.shape
        dtype = accumulator_dtype(y.dtype)
        with without_autocast(y):
            shared = (self._share().to(dtype).mT @ y.to(dtype)).to(y.dtype)
            rows = torch.cat([y, shared, y.new_zeros(b, 1, c)], 1)
        known = m + self.source.shape[1]
        # One column more collects padding, which must not land on the token that it names.
        place = torch.full((b, self.length + 1), known, dtype=torch.int64, device=y.device)
        where = torch.cat([self.representative, self.source], 1)
        if self.mask is not None:
            real = torch.cat([self.mask, self.target >= 0], 1)
            where = torch.where(real, where, self.length)
        place = place.scatter(1, where, torch.arange(known, device=y.device).expand(b, -1))[:, :-1]
        out = gather_rows(rows, place)
        return out if fill is None else torch.where((place == known).unsqueeze(-1), fill.to(out.dtype), out)

    def to(self, device: torch.device | str) -> SoftReduction:
        """The same reduction with its tensors on ``device``."""
        moved = super().to(device)
        assert isinstance(moved, SoftReduction)
        return replace(moved, share=self._share().to(device))

    def _share(self) -> Tensor:
        if self.share is None:
            raise ValueError("a soft reduction needs its shares: make it with SoftReduction.make")
        return self.share
