"""Pictures of a prompt as grids of visual tokens, and the tokens that every decoder layer sees of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.adapters.vlm.sites import Shown, shown
from tokred.analysis.viz.recording import as_bytes

if TYPE_CHECKING:
    from tokred.adapters.vlm.forward import Forward
    from tokred.adapters.vlm.layout import Part


class View(NamedTuple):
    """One picture, a tile of it, or a frame of a clip.

    Attributes:
        sample: of the batch.
        name: of it.
        grid: rows and columns of its tokens.
        columns: ``(rows * columns,)`` int64, which token of the prompt each is; -1 where there is none.
        pixels: ``(1 or 3, H, W)`` uint8, what is drawn.
        frame: of a clip, from 1; 0: no frame.
    """

    sample: int
    name: str
    grid: tuple[int, int]
    columns: Tensor
    pixels: Tensor
    frame: int = 0


def held_by_layer(forward: Forward) -> Tensor:
    """``(1 + L, B, N)`` bool, on the CPU: whether each token of a prompt is there: in the prompt itself, padding apart,
    and in each decoder layer."""
    b, n = forward.batch, forward.length
    real = forward.real()
    found = [torch.ones(b, n, dtype=torch.bool) if real is None else real.cpu()]
    packed = forward.packed
    entering = found[0] if packed is None else _scattered(packed.columns, packed.valid, n)
    for layer in range(forward.settings.depth):
        inner = forward.inner
        step = None if inner is None or inner.start is None or layer == 0 else inner.at(layer)
        if step is None:
            found.append(entering)
            continue
        columns = step.columns if packed is None else packed.columns.gather(1, step.columns)
        found.append(_scattered(columns, step.valid, n))
    return torch.stack(found)


def _scattered(columns: Tensor, valid: Tensor, length: int) -> Tensor:
    """``(B, N)`` bool: the columns that are there; filler goes to a place that is cut off."""
    there = torch.zeros(columns.shape[0], length + 1, dtype=torch.bool)
    return there.scatter(1, torch.where(valid, columns, length).cpu(), True)[:, :length]


def views_of(forward: Forward, inputs: Mapping[str, Any], pixels: Sequence[Any] | None, core: Any) -> list[View]:
    """The pictures of a forward, each frame of a clip and each tile that has no place in a whole by itself.

    Args:
        forward: of the patched model.
        inputs: arguments of the model.
        pixels: what to draw, one a picture; None: the inputs.
        core: the model with vision.

    Raises:
        ValueError: ``pixels`` are not one a picture, or one is no picture.
    """
    found: list[View] = []
    number = 0
    for modality in forward.call.modalities:
        places = modality.visual.nonzero()[:, 1].cpu()
        frames = drawable(inputs, core)
        for order, one in enumerate(shown(modality)):
            given = None
            if pixels is not None:
                if number >= len(pixels):
                    raise ValueError(f"pixels must be one a picture: there are more than {len(pixels)} in the prompts")
                given = checked(pixels[number])
            found += _views(one, places, frames, given, order)
            number += 1
    if pixels is not None and number != len(pixels):
        raise ValueError(f"pixels must be one a picture: there are {number} in the prompts, got {len(pixels)}")
    return sorted(found, key=lambda view: view.sample)


def _views(one: Shown, places: Tensor, frames: Drawable, given: Tensor | None, order: int) -> list[View]:
    """The views of one picture, the ``order``-th of its kind."""
    name = f"picture {one.image + 1}"
    found: list[View] = []
    tiles = [part for part in one.picture.parts if part.corner is not None]
    for i, part in enumerate(one.picture.parts):
        if part.corner is not None or part.grid is None:
            continue
        columns = places[one.first + part.where.offsets(places.device)]
        count = part.frames or 1
        if columns.numel() != count * part.grid[0] * part.grid[1]:
            continue  # pooled to something that is no grid
        for t, own in enumerate(columns.view(count, -1)):
            more = f", frame {t + 1}" if part.frames else f", part {i + 1}" if part.tile or i else ""
            drawn = (
                frames.of(part, order, i, t) if given is None else given[min(t * len(given) // count, len(given) - 1)]
            )
            frame = t + 1 if part.frames else 0
            found.append(View(one.sample, name + more, part.grid, own, fitted(drawn, part.grid), frame))
    if tiles:
        assert tiles[0].corner is not None
        rows, columns_of = tiles[0].corner[2:]
        whole = torch.full((rows, columns_of), -1)
        for part in tiles:
            assert part.corner is not None
            assert part.grid is not None
            top, left = part.corner[:2]
            own = places[one.first + part.where.offsets(places.device)].view(part.grid)
            whole[top : top + part.grid[0], left : left + part.grid[1]] = own
        drawn = frames.row(tiles[0].whole) if given is None else given[0]
        found.append(
            View(one.sample, f"{name}, tiles", (rows, columns_of), whole.flatten(), fitted(drawn, (rows, columns_of)))
        )
    return found


class Drawable:
    """The inputs of a model as pictures.

    Args:
        rows: ``(1 or 3, H, W)`` each, in the order of the tower's batch.
        clips: ``(T, 1 or 3, H, W)`` each, of videos.
    """

    def __init__(self, rows: Sequence[Tensor] = (), clips: Sequence[Tensor] = ()) -> None:
        self.rows, self.clips = rows, clips

    def row(self, index: int) -> Tensor | None:
        """One row of the tower's batch; None where it is not known."""
        return self.rows[index] if 0 <= index < len(self.rows) else None

    def of(self, part: Part, order: int, i: int, frame: int) -> Tensor | None:
        """The picture under one frame of a part ``i``, of the picture ``order`` of its kind."""
        if part.clip:
            return self.row(part.clip[frame])
        if part.frames and order < len(self.clips):
            clip = self.clips[order]
            return clip[min(frame * len(clip) // part.frames, len(clip) - 1)]
        return self.row(part.tower if part.tower >= 0 else order + i)


def drawable(inputs: Mapping[str, Any], core: Any) -> Drawable:
    """The inputs as pictures: images as they are, patches of Qwen's put together again."""
    images, videos = words.PIXELS.of(dict(inputs)), words.VIDEO_PIXELS.of(dict(inputs))
    grids, of_videos = words.IMAGE_GRIDS.of(dict(inputs)), words.VIDEO_GRIDS.of(dict(inputs))
    rows: list[Tensor] = []
    clips: list[Tensor] = []
    if images is not None and grids is not None:
        rows = [clip[0] for clip in _joined(images, grids, core)]
    elif isinstance(images, Tensor) and images.ndim >= 4:
        rows = list(images.flatten(0, -4))
    if videos is not None and of_videos is not None:
        clips = _joined(videos, of_videos, core)
    elif isinstance(videos, Tensor) and videos.ndim == 5:
        clips = list(videos)
    return Drawable(rows, clips)


def _joined(patches: Tensor, grids: Tensor, core: Any) -> list[Tensor]:
    """``(T, 3, H, W)`` of each picture, from patches that lie in the order of the cells that become one token."""
    vision = words.VISION.need(words.CONFIG.need(core))
    side = int(words.PATCH.need(vision))
    deep = patches.shape[1] // (3 * side * side)  # frames of a patch, each of three colours
    cell = int(words.JOINED.need(members.TOWER.need(core)))
    found, start = [], 0
    for t, h, w in grids.tolist():
        own = patches[start : start + t * h * w]
        start += t * h * w
        x = own.view(t, h // cell, w // cell, cell, cell, -1, deep, side, side)
        # Frames, channels, then rows and columns from the coarse to the fine.
        x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * deep, -1, h * side, w * side)
        found.append(x)
    return found


def checked(given: Any) -> Tensor:
    """``(T, 1 or 3, H, W)`` uint8.

    Raises:
        ValueError: it is no picture.
    """
    x = torch.as_tensor(given)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"pixels must be (1 or 3, H, W) or (T, 1 or 3, H, W) each, got {tuple(torch.as_tensor(given).shape)}"
        )
    return as_bytes(x)


def fitted(picture: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """``(1 or 3, H, W)`` uint8: stretched to its own range where it is no picture yet; grey where there is none."""
    if picture is None or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        return torch.full((1, *grid), 128, dtype=torch.uint8)
    x = picture.detach().cpu()
    if x.dtype == torch.uint8:
        return x
    low, high = x.float().aminmax()
    return as_bytes((x.float() - low) / (high - low).clamp_min(1e-12))
