"""``SoftReduction``: tokens that are handed out in shares, a part of each to every slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.reduction import Reduction


@dataclass(frozen=True, eq=False)
class SoftReduction(Reduction):
    """A reduction whose sources are shared out over the slots, instead of going into one slot each.

    :attr:`Reduction.target` holds the slot that gets the largest share: what drawings, counts and compositions see.

    Attributes:
        share: ``(B, M, R)`` float, the part of each source that each slot receives; every column sums to one.
    """

    share: Tensor | None = None

    @classmethod
    def make(
        cls, representative: Tensor, source: Tensor, share: Tensor, length: int, *, by_size: bool = True
    ) -> SoftReduction:
        """From the kept tokens, the shared ones, and their shares.

        Args:
            representative: ``(B, M)`` int64.
            source: ``(B, R)`` int64.
            share: ``(B, M, R)``; columns sum to one.
            length: number of input tokens ``N``.
            by_size: whether sizes weigh the members.
        """
        target = share.argmax(dim=1)
        return cls(representative, source, target, length, by_size=by_size, share=share)

    def sizes(self, size: Tensor | None = None) -> Tensor:
        """``(B, M)`` float32: own size and the received shares; fractions."""
        share = self._share().float()
        if size is None:
            return 1 + share.sum(-1)
        size = size.float()
        received = share @ size.gather(1, self.source).unsqueeze(-1)
        return size.gather(1, self.representative) + received.squeeze(-1)

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """The mean of own and received features, weighted by shares (and sizes): ``(B, N, C)`` to ``(B, M, C)``.

        A slot that receives nothing holds its very row.

        Raises:
            ValueError: ``x`` does not fit, or a mode other than mean or keep is asked for.
        """
        if x.ndim != 3 or x.shape[1] != self.length or x.shape[0] != self.representative.shape[0]:
            raise ValueError(f"x must be {(*self.batch, self.length)} + (C,), got {tuple(x.shape)}")
        if mode not in (None, "mean", "keep"):
            raise ValueError(f"mode is {mode!r}; a soft reduction allows 'mean' and 'keep'")
        own = self.gather(x)
        if mode == "keep":
            return own
        share = self._share().float()
        if self.by_size and size is not None:
            share = share * size.float().gather(1, self.source).unsqueeze(1)
            weight = size.float().gather(1, self.representative)
        else:
            weight = torch.ones_like(share[..., 0])
        shared = x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1])).float()
        received = share.sum(-1)
        moved = (share @ shared - received.unsqueeze(-1) * own.float()) / (weight + received).unsqueeze(-1)
        return (own.float() + moved).to(x.dtype)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`merge` and :meth:`sizes`."""
        return self.merge(x, size), self.sizes(size if self.by_size else None)

    def unmerge(self, y: Tensor, fill: Tensor | None = None) -> Tensor:
        """Full length again: a kept token takes its slot, a shared one the mean of the slots by its shares."""
        share = self._share().to(y.dtype)
        b, c = y.shape[0], y.shape[-1]
        out = y.new_zeros(b, self.length, c)
        out = out.scatter(1, self.representative.unsqueeze(-1).expand(-1, -1, c), y)
        return out.scatter(1, self.source.unsqueeze(-1).expand(-1, -1, c), share.mT @ y)

    def _share(self) -> Tensor:
        if self.share is None:
            raise ValueError("a soft reduction needs its shares: make it with SoftReduction.make")
        return self.share
