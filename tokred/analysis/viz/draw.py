"""Draw which patches were merged into which token: as arrays, as a matplotlib figure, as a page with a slider."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.analysis.viz.recording import Recording as Recording
from tokred.analysis.viz.recording import composed
from tokred.analysis.viz.recording import record as record
from tokred.core.method import Method
from tokred.core.reduction import Reduction
from tokred.errors import NothingRecordedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

Colour = tuple[int, int, int]
PATCH_PIXELS = 16  # a patch is drawn at least this large, so that an outline leaves room for its colour


def after(model: nn.Module, layer: int | None = None) -> Reduction:
    """The whereabouts of every token after a block of the last forward of a patched model.

    As :func:`tokred.trace`, but tokens that were pruned count as dropped also where a slot stands in for them when the
    full length is restored.

    Args:
        model: patched.
        layer: index of the block, from 0 as in ``tokred.report(model)`` and in methods' parameters; None: the last one.

    Raises:
        NothingRecordedError: the model is not patched, or no uncompiled forward has run since.
        ValueError: there is no such block.
    """
    from tokred.adapters.encoder.host import shared_of

    found = shared_of(model)
    if not found:
        raise NothingRecordedError("the model is not patched: call tokred.apply(model, ...) first")
    shared = found[0][2]
    state = shared.last()
    if layer is not None:
        if not 0 <= layer < shared.depth:
            raise ValueError(f"layer must lie in 0..{shared.depth - 1}, got {layer}")
        state = shared.records[layer].state
    total = composed(state.steps)
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
    index = _patches(reduction, grid[0] * grid[1], prefix, sample)
    return paint_groups(image, index, grid, reduction.slots, outline=outline)


def paint_groups(
    image: Tensor,
    index: Tensor,
    grid: tuple[int, int],
    slots: int | None = None,
    *,
    outline: bool = True,
    mean: bool = True,
) -> Picture:
    """:func:`paint` from the groups themselves.

    Args:
        image: ``(C, H, W)`` with 1 or 3 channels, uint8 or floats in 0..1.
        index: ``(P,)`` integer, the group of each patch in ``[0, slots)``, -1 where it was dropped.
        grid: rows and columns of patches.
        slots: how many groups there may be; None: as many as patches.
        outline: whether to outline the groups.
        mean: fill each group with its mean colour; else the image stays as it is, but for what was dropped.

    Raises:
        ValueError: the image is none, or the groups are not one a patch.
    """
    rows, columns = grid
    if tuple(index.shape) != (rows * columns,):
        raise ValueError(f"a grid of {rows} x {columns} needs {rows * columns} groups, got {tuple(index.shape)}")
    index = index.long().cpu()
    slots = len(index) if slots is None else slots
    canvas, high, wide = _enlarge(image, rows, columns)
    groups = index.view(rows, columns).repeat_interleave(high, 0).repeat_interleave(wide, 1)
    out = _fill(canvas, groups, slots) if mean else canvas
    out = torch.where((groups < 0)[..., None], _crossed(canvas, high, wide), out)
    if outline:
        colours = torch.tensor(palette(slots), dtype=torch.float32)
        alone = torch.bincount(index[index >= 0], minlength=slots) == 1
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


def figure(recording: Recording, blocks: Sequence[int] | None = None) -> Any:
    """A matplotlib figure: one row for each image and method, one column for the image and for each of some blocks.

    Args:
        recording: of :func:`record`.
        blocks: numbers of blocks, from 1; None: up to four, evenly spaced, the last one among them.

    Raises:
        ValueError: there is no such block.
    """
    shown = spaced(recording.depth) if blocks is None else list(blocks)
    if not shown or min(shown) < 1 or max(shown) > recording.depth:
        raise ValueError(f"blocks must lie in 1..{recording.depth}, got {shown}")
    pictures: list[list[Picture]] = []
    notes, names = list[list[str]](), list[str]()
    for i, name in enumerate(recording.names):
        image = recording.pixels[i]
        for run in recording.runs:
            painted = [paint_groups(image, run.groups[i, block], recording.grid) for block in shown]
            pictures.append([enlarge(image, recording.grid), *painted])
            notes.append([f"{int(run.tokens[i, stage])} tokens" for stage in (0, *shown)])
            if run.answers:
                notes[-1][0] += f"\n{recording.answers[i]}".replace("$", r"\$")
                notes[-1][-1] += f"\n{run.answers[i]}".replace("$", r"\$")
            text = f"{name}\n{run.label}" if len(recording.runs) > 1 else name
            names.append(text.replace("$", r"\$"))  # no formula
    rows, columns = recording.grid
    titles = [f"{rows} x {columns} patches", *(f"after block {block}" for block in shown)]
    drawn = sheet(pictures, titles, names, notes)
    text = "patches that became one token share colour and outline"
    alone = len(recording.runs) == 1
    drawn.suptitle(f"{recording.runs[0].label}: {text}" if alone else text.capitalize(), fontsize=11)
    return drawn


def spaced(depth: int, count: int = 4) -> list[int]:
    """Some blocks of ``depth``, numbered from 1, evenly spaced, the last one among them."""
    return sorted({-(-depth * i // count) for i in range(1, count + 1)})


def page(
    model: nn.Module,
    images: Tensor,
    methods: str | Method | Sequence[str | Method],
    path: Path | str,
    *,
    pixels: Tensor | None = None,
    names: Sequence[str] | None = None,
    forward: Callable[[Tensor], Any] | None = None,
    grid: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    title: str = "What became of every patch",
) -> Path:
    """Run methods on images and write one HTML page that needs nothing else, with a slider over the blocks.

    A recording that is there already is written by :func:`tokred.analysis.viz.pages.write`.

    Args:
        model: a supported model, unpatched; it is so again afterwards.
        images: ``(B, C, H, W)`` as the model takes them.
        methods: settings such as ``"tome r=13"``, method objects, or several of them, side by side.
        path: of the file.
        pixels: what to draw, see :func:`record`, as for ``names``, ``forward``, ``grid`` and ``classes``.
        title: of the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the file cannot be written.
        ValueError, TypeError, UnknownMethodError, MissingInputError, UnsupportedModelError: as :func:`record`.
    """
    from tokred.analysis.viz import pages

    given: dict[str, Any] = {"pixels": pixels, "names": names, "forward": forward, "grid": grid, "classes": classes}
    recording = record(model, images, methods, **given)
    return pages.write(recording, path, title=title)


def sheet(
    pictures: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    names: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
) -> Any:
    """A matplotlib figure: one row an image, one column a stage.

    Args:
        pictures: ``[row][column]``.
        titles: of the columns.
        names: of the rows.
        notes: ``[row][column]``, small, below each picture.
    """
    from tokred.analysis.viz import canvas

    figure, axes = canvas.grid(len(pictures), len(titles))
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
            if notes is not None:
                axis.set_xlabel(notes[i][j], fontsize=8)
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
    line = (y[:, None] * wide - x[None, :] * high).abs() < max(high, wide) * max(1, min(high, wide) // 12)
    return torch.where(line[..., None], canvas * 0.25 + 96, canvas * 0.25)
