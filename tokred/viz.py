"""Draw which patches were merged into which token."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.errors import NothingRecordedError
from tokred.reduction import Reduction

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

Colour = tuple[int, int, int]
PATCH_PIXELS = 16  # a patch is drawn at least this large, so that an outline leaves room for its colour


def after(model: nn.Module, layer: int | None = None) -> Reduction:
    """What has become of every token after block ``layer`` in the last forward of a patched model; None: at the end.

    Raises:
        NothingRecordedError: the model is not patched, or no uncompiled forward has run since.
        ValueError: there is no such block.
    """
    from tokred.adapters.host import shared_of

    found = shared_of(model)
    if not found:
        raise NothingRecordedError("the model is not patched: call tokred.apply(model, ...) first")
    shared = found[0][2]
    state = shared.last()
    if layer is not None:
        if not 0 <= layer < shared.depth:
            raise ValueError(f"layer must lie in 0..{shared.depth - 1}, got {layer}")
        state = shared.records[layer].state
    total = state.composed()
    return Reduction.identity((1,), state.length) if total is None else total


def paint(
    image: Tensor,
    reduction: Reduction,
    grid: tuple[int, int],
    prefix: int = 1,
    *,
    sample: int = 0,
    outline: bool = True,
) -> Picture:
    """Colour each group of merged patches with its mean colour, and outline it.

    Patches of one token share the colour of their outline, also where they do not touch; a patch that is still alone
    has none. Dropped patches are darkened and crossed out.

    Args:
        image: ``(C, H, W)`` with 1 or 3 channels, uint8 or floats in 0..1.
        reduction: of the patched model: :func:`after`, or :func:`tokred.trace`.
        grid: rows and columns of patches.
        prefix: leading tokens that are no patches.
        sample: which one of the reduction's batch.
        outline: whether to outline the groups.

    Returns:
        ``(H', W', 3)`` uint8: a whole multiple of the grid, at least as large as the image.

    Raises:
        ValueError: image, reduction and grid do not fit each other.
    """
    rows, columns = grid
    index = _patches(reduction, rows * columns, prefix, sample)
    canvas, high, wide = _enlarge(image, rows, columns)
    groups = index.view(rows, columns).repeat_interleave(high, 0).repeat_interleave(wide, 1)
    out = _fill(canvas, groups, reduction.slots)
    out = torch.where((groups < 0)[..., None], _crossed(canvas, high, wide), out)
    if outline:
        colours = torch.tensor(palette(reduction.slots), dtype=torch.float32)
        alone = torch.bincount(index[index >= 0], minlength=reduction.slots) == 1
        edge = edges(groups, max(1, min(high, wide) // 8)) & (groups >= 0)
        edge &= ~alone[groups.clamp(min=0)]
        out = torch.where(edge[..., None], colours[groups.clamp(min=0)], out)
    picture: Picture = out.round().to(torch.uint8).numpy()
    return picture


def enlarge(image: Tensor, grid: tuple[int, int]) -> Picture:
    """The image at the size that :func:`paint` gives it, pixels kept as squares."""
    picture: Picture = _enlarge(image, *grid)[0].round().to(torch.uint8).numpy()
    return picture


def edges(groups: Tensor, width: int = 1) -> Tensor:
    """Pixels of ``(H, W)`` groups within ``width`` of another group or the border: a region less its erosion."""
    padded = F.pad(groups[None].float(), (1, 1, 1, 1), value=-2)[0]
    h, w = groups.shape
    edge = torch.zeros_like(groups, dtype=torch.bool)
    for dy in range(3):
        for dx in range(3):
            edge |= padded[dy : dy + h, dx : dx + w] != groups
    if width > 1:
        # Pixels near an edge pixel of their own group; those of other groups have edge pixels of their own as near.
        edge = F.max_pool2d(edge[None].float(), 2 * width - 1, 1, width - 1)[0] > 0
    return edge


def palette(count: int) -> list[Colour]:
    """Clear colours that differ most between neighbours in the list."""
    out = []
    for i in range(count):
        hue = (0.12 + i * 0.618034) % 1
        r, g, b = colorsys.hls_to_rgb(hue, (0.5, 0.62, 0.42)[i % 3], 0.9)
        out.append((round(255 * r), round(255 * g), round(255 * b)))
    return out


def sheet(pictures: Sequence[Sequence[Picture]], titles: Sequence[str], names: Sequence[str] | None = None) -> Any:
    """A matplotlib figure: one row an image, one column a stage.

    Args:
        pictures: ``[row][column]``.
        titles: of the columns.
        names: of the rows.
    """
    from tokred import plots

    figure, axes = plots.grid(len(pictures), len(titles))
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            axis = axes[i][j]
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(titles[j], fontsize=10)
            if j == 0 and names is not None:
                axis.set_ylabel(names[i], fontsize=10)
    return figure


def _patches(reduction: Reduction, count: int, prefix: int, sample: int) -> Tensor:
    index = reduction.index.reshape(-1, reduction.length)
    if not prefix <= prefix + count <= reduction.length:
        raise ValueError(
            f"{prefix} prefix tokens and {count} patches do not fit a reduction of {reduction.length} tokens"
        )
    if not 0 <= sample < len(index):
        raise ValueError(f"sample must lie in 0..{len(index) - 1}, got {sample}")
    return index[sample, prefix : prefix + count].cpu()


def _enlarge(image: Tensor, rows: int, columns: int) -> tuple[Tensor, int, int]:
    """The image as ``(H', W', 3)`` floats in 0..255, and height and width of a patch in it."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be (1 or 3, H, W), got {tuple(image.shape)}")
    x = image.detach().cpu().float() * (1 if image.dtype == torch.uint8 else 255)
    high, wide = (max(PATCH_PIXELS, -(-image.shape[1] // rows)), max(PATCH_PIXELS, -(-image.shape[2] // columns)))
    mode = "nearest" if image.shape[1] < rows * PATCH_PIXELS else "bilinear"
    x = F.interpolate(x[None], size=(rows * high, columns * wide), mode=mode)[0]
    return x.clamp(0, 255).expand(3, -1, -1).permute(1, 2, 0).contiguous(), high, wide


def _fill(canvas: Tensor, groups: Tensor, slots: int) -> Tensor:
    """Each group's mean colour."""
    flat, slot = canvas.reshape(-1, 3), torch.where(groups < 0, slots, groups).reshape(-1)
    total = torch.zeros(slots + 1, 3).index_add_(0, slot, flat)
    count = torch.bincount(slot, minlength=slots + 1).clamp_min(1)
    return (total / count[:, None])[slot].view_as(canvas)


def _crossed(canvas: Tensor, high: int, wide: int) -> Tensor:
    """The image darkened, with a diagonal through every patch."""
    h, w, _ = canvas.shape
    y, x = torch.arange(h) % high, torch.arange(w) % wide
    line = (y[:, None] * wide - x[None, :] * high).abs() < max(high, wide)
    return torch.where(line[..., None], canvas * 0.25 + 96, canvas * 0.25)
