"""PixelPrune: patches that their neighbours already tell never enter the encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_flags, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import bounds, pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import whole
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where
from tokred.encoder.padding import reduce_each

Distance = Literal["max", "mae", "rmse"]
Scan = Literal["loco", "raster"]


@register("pixelprune")
@dataclass(frozen=True)
class PixelPrune(BlockMethod):
    """PixelPrune: predictive coding decides which patches enter the first block of a vision transformer.

    A patch is predicted from the reconstruction of those to its left, above it and between (the edge detector of
    JPEG-LS); where the prediction is within ``tau``, the patch is left out. At 0 the picture can be rebuilt from what
    is left; the model's answer still changes, since what is left out takes no part in attention. Towers that join
    patches behind their blocks (Qwen's and their kin) are asked about whole cells of joined patches, and about whole
    clips, where a patch that stands still is left out, too.

    Args:
        tau: tolerance of pixels in [0, 1].
        metric: of a patch's difference: its ``"max"``, its mean (``"mae"``), or its root mean square (``"rmse"``).
        scan: ``"loco"``, as above; ``"raster"``: each patch is predicted from the one before it in reading order.
        anchored: compare with the reconstruction, which keeps every patch within ``tau``; False: with the neighbours as
            they are, so that errors add up.
        mass: attention weighs a patch by how many it stands for.
        min_keep: share of the patches that stay at least, those that differ most first; 1: all.
        std: of the channels, by which the pixels were divided, one number or one a channel; where ``tau`` is 0 it does
            not matter.

    Source: PixelPrune, 2026 (arXiv 2604.00886), sections on the predictor and on thresholds; plain transformers,
        clips, mass and the least share are ours.
    """

    summary: ClassVar[str] = "leave out patches that their neighbours predict, before the first block"
    source: ClassVar[str] = "2026 (arXiv 2604.00886)"
    example: ClassVar[Parameters] = {"tau": 0.9, "metric": "mae", "min_keep": 0.3}
    nothing: ClassVar[Parameters | None] = {"min_keep": 1.0}
    where: ClassVar[Where] = "before"
    uneven: ClassVar[bool] = True

    tau: float = 0.0
    metric: Distance = "max"
    scan: Scan = "loco"
    anchored: bool = True
    mass: bool = False
    min_keep: float = 0.0
    std: float | Sequence[float] = 0.5

    def __post_init__(self) -> None:
        check_flags(anchored=self.anchored, mass=self.mass)
        check_choice(self.metric, "metric", get_args(Distance))
        check_choice(self.scan, "scan", get_args(Scan))
        check_share(self.min_keep, "min_keep", zero=True)
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau < 1:
            raise ValueError(f"tau must lie in [0, 1), got {self.tau!r}")
        given = list(self.std) if isinstance(self.std, Sequence) else [self.std]
        if not given or any(isinstance(s, bool) or not isinstance(s, int | float) or not s > 0 for s in given):
            raise ValueError(f"std must be a number above 0, or one a channel, got {self.std!r}")
        if isinstance(self.std, Sequence):
            object.__setattr__(self, "std", tuple(map(float, given)))

    @property
    def reads(self) -> frozenset[str]:
        """The patches' pixels and their grid, and that tokens may leave before a block."""
        return frozenset({"x", "grid", "pixels", "entry"})

    @property
    def proportional(self) -> bool:
        return self.mass

    def tokens(self, n: int, place: Place) -> int:
        """At most all of them: the count depends on the picture."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """True before the first block."""
        return place.layer == 0 and self.min_keep < 1 and place.free(n) > 1

    def reduce(self, site: Site) -> Reduction:
        """Predict every patch, and keep those that were not foreseen; each of the others goes where it came from."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        rows, columns = map(whole, site.grid)  # traced sides are tensors
        frames = (whole(site.frames),) if site.frames is not None else ()
        total = rows * columns * (frames[0] if frames else 1)
        if b == 0:
            return Reduction.identity((b,), n, site.device)
        with torch.no_grad():
            kept, source = self.predict(site.pixels.reshape(b, *frames, rows, columns, -1))
            kept, source = kept.flatten(1), source.flatten(1)
            free = torch.arange(total, device=site.device).expand(b, -1)
            fewest, most = bounds(kept.sum(1), total)
            if fewest == total:
                return Reduction.identity((b,), n, site.device)
            left, mask = pack(free, kept, (fewest, most))
            gone, known = pack(free, ~kept, (total - most, total - fewest))
            slot = (kept.long().cumsum(1) - 1).gather(1, source.gather(1, gone)) + site.prefix
            target = slot if known is None else slot.masked_fill(~known, -1)
            stands, real = with_protected(left + site.prefix, mask, n, site.prefix, site.suffix)
        return Reduction(
            stands, gone + site.prefix, target, n, mask=real, mode="keep", inherit=self.mass, complete=known is None
        )

    # ------------------------------------------------------------------ the predictor

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The patches that stay, and for every patch the one that stands for it.

        Args:
            x: ``(B, rows, columns, F)`` float32 pixels as the model is given them, channel after channel; of clips
                ``(B, frames, rows, columns, F)``, where a patch that stands still since the frame before is left out.

        Returns:
            Without the last dimension of ``x``: bool, and int64 numbers of patches in reading order, frame after frame.
        """
        shape = x.shape[:-1]
        x = self._scaled(x.float())
        x = x.unsqueeze(1) if x.ndim == 4 else x
        b, (frames, rows, columns) = x.shape[0], map(whole, x.shape[1:4])
        n = frames * rows * columns
        number = torch.arange(n, device=x.device).view(frames, rows, columns).expand(b, -1, -1, -1)
        if self.scan == "raster":
            x, number = x.flatten(2, 3).unsqueeze(2), number.reshape(b, frames, 1, -1)
        kept, source, error = (t.reshape(b, -1) for t in self._walk(x, number))
        least = math.ceil(round(self.min_keep * n, 6))
        if least:
            # Those that stay anyway come first, then what is farthest from its prediction.
            first = ranked(error.masked_fill(kept, torch.inf))[:, :least]
            more = kept.scatter(1, first, 1)
            source = torch.where(more, number.reshape(b, -1), source)
            kept = more
        return kept.view(shape), source.view(shape)

    def _scaled(self, x: Tensor) -> Tensor:
        if not isinstance(self.std, tuple):
            assert not isinstance(self.std, Sequence)  # which __post_init__ made a tuple
            return x * self.std
        if x.shape[-1] % len(self.std):
            raise ValueError(f"std has {len(self.std)} numbers, but a patch has {x.shape[-1]} pixels: one a channel")
        std = torch.tensor(self.std, device=x.device)
        return x * std.repeat_interleave(x.shape[-1] // len(std))

    def _far(self, a: Tensor, b: Tensor) -> Tensor:
        d = (a - b).abs()
        if self.metric == "max":
            return d.amax(-1)
        return d.mean(-1) if self.metric == "mae" else d.square().mean(-1).sqrt()

    def _walk(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, rows, columns)`` each: what stays, by whom it is told, and how far it is from its prediction."""
        # Where nothing is tolerated the reconstruction is the picture, and all patches are predicted at once.
        if self.tau == 0 or not self.anchored:
            return self._at_once(x, number)
        frames: list[tuple[Tensor, ...]] = []
        for t in range(whole(x.shape[1])):
            frames.append(self._by_diagonals(x[:, t], number[:, t], frames[-1] if frames else None))
        kept, source, error = (torch.stack([one[i] for one in frames], 1) for i in range(3))
        return kept, source, error

    def _prediction(self, left: Tensor, up: Tensor, corner: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True where a patch is predicted from the one above it, else from the one at its left."""
        edge = (self._far(corner, left) <= self.tau) & (self._far(corner, up) > self.tau)
        return (i > 0) & ((j == 0) | edge)

    def _at_once(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frames, rows, columns = (whole(n) for n in x.shape[1:4])
        i = torch.arange(rows, device=x.device).unsqueeze(1)
        j = torch.arange(columns, device=x.device)
        left, up = x.roll(1, 3), x.roll(1, 2)
        above = self._prediction(left, up, up.roll(1, 3), i, j)
        error = self._far(x, torch.where(above.unsqueeze(-1), up, left))
        kept = (error > self.tau) | ((i == 0) & (j == 0))
        parent = torch.where(above, number - columns, number - 1)
        if frames > 1:
            # What stands still needs nothing of its own frame.
            moved = self._far(x, x.roll(1, 1))
            still = (moved <= self.tau) & (torch.arange(frames, device=x.device)[:, None, None] > 0)
            kept, error = kept & ~still, torch.where(still, moved, error)
            parent = torch.where(still, number - rows * columns, parent)
        parent = torch.where(kept, number, parent).flatten(1)
        # Chains of patches that were left out end at one that stays; each round halves what is left of them.
        for _ in range((frames * rows * columns).bit_length()):
            parent = parent.gather(1, parent)
        return kept, parent.view_as(number), error

    def _by_diagonals(self, x: Tensor, number: Tensor, before: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """One frame ``(B, rows, columns, F)``, after ``before``: what this answered for the frame before it. The last
        one of the answer is the reconstruction."""
        rows, columns = whole(x.shape[1]), whole(x.shape[2])
        # All are made of the pixels: under torch.func.vmap what is written into has to have the samples itself.
        error = torch.zeros_like(x[..., 0], dtype=torch.float32)
        rec, source = x.clone(), number + torch.zeros_like(error, dtype=number.dtype)
        kept, still = torch.ones_like(error, dtype=torch.bool), torch.zeros_like(error, dtype=torch.bool)
        if before is not None:
            _, told_before, _, known_before = before
            moved = self._far(x, known_before)
            still = moved <= self.tau
            rec = torch.where(still.unsqueeze(-1), known_before, rec)
            source, kept = torch.where(still, told_before, source), ~still
            error = torch.where(still, moved, error)
        for s in range(1, rows + columns - 1):
            i = torch.arange(max(0, s - columns + 1), min(rows, s + 1), device=x.device)
            j = s - i
            # What lies outside of the grid is never asked: indices of the other side stand in for it.
            above = self._prediction(rec[:, i, j - 1], rec[:, i - 1, j], rec[:, i - 1, j - 1], i, j)
            known = torch.where(above.unsqueeze(-1), rec[:, i - 1, j], rec[:, i, j - 1])
            far, fixed = self._far(x[:, i, j], known), still[:, i, j]
            error[:, i, j] = torch.where(fixed, error[:, i, j], far)
            stays = (far > self.tau) & ~fixed
            told = torch.where(above, source[:, i - 1, j], source[:, i, j - 1])
            goes = ~stays & ~fixed
            kept[:, i, j] = stays
            rec[:, i, j] = torch.where(goes.unsqueeze(-1), known, rec[:, i, j])
            source[:, i, j] = torch.where(goes, told, source[:, i, j])
        return kept, source, error, rec
