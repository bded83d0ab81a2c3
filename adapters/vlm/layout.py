"""How the visual tokens of each family stand: images, their tiles, videos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.vlm.before_llm import Tile
from tokred.vlm.tools.places import grid_places, sides
from tokred.vlm.tools.tiles import Tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

    from tokred.adapters.vlm.taps import Tap


@dataclass(frozen=True)
class Part:
    """Visual tokens that are judged together: an image, a tile of it, or a video.

    Attributes:
        where: which tokens of the picture, in order: their first and count, or rows of a larger grid.
        grid: rows and columns, of one frame; None where they form none.
        frames: of a video; None for an image.
        clip: rows of the tower's batch, one for each frame, where the frames came as images; empty elsewhere.
        pooled: the same rows of a video whose frames the model pools behind its tower, so that a token is several
            patches; empty elsewhere.
        tile: which tile; None: all of the image.
        tower: which row of the tower's batch; -1 where none fits.
        patches: which of the tower's patches they are; None: all, in order.
        skip: class tokens before the patches among the tower's features.
        corner: row and column of its first token among all of the image's, and how many of these there are, where it
            shows a part of the image; None: its grid is the image's.
        tiles: how all tiles of the image lie, where it has several that are judged apart.
        whole: row of the tower's batch that shows the whole image; -1 where none fits.
    """

    where: Span
    grid: tuple[int, int] | None = None
    frames: int | None = None
    clip: tuple[int, ...] = ()
    pooled: tuple[int, ...] = ()
    tile: Tile | None = None
    tower: int = -1
    patches: Span | None = None
    skip: int = 0
    corner: tuple[int, int, int, int] | None = None
    tiles: Tiles | None = None
    whole: int = -1

    @property
    def count(self) -> int:
        """How many tokens."""
        return self.where.rows * self.where.columns


@dataclass(frozen=True)
class Span:
    """Places of a rectangle in a sequence: ``rows`` of ``columns``, ``stride`` apart, from ``start``."""

    start: int
    rows: int
    columns: int
    stride: int

    @classmethod
    def line(cls, start: int, count: int) -> Span:
        """Consecutive places."""
        return cls(start, 1, count, count)

    def offsets(self, device: torch.device) -> Tensor:
        """``(rows * columns,)`` int64."""
        rows = torch.arange(self.rows, device=device).unsqueeze(1) * self.stride
        return (self.start + rows + torch.arange(self.columns, device=device)).flatten()


class Picture(NamedTuple):
    """One image or video, in the order of the placeholders.

    Attributes:
        tokens: how many.
        parts: what is judged.
        lines: rows of tokens that end in a newline, which leaves with the last token of its row; or None.
    """

    tokens: int
    parts: tuple[Part, ...]
    lines: Span | None = None


def pictures_of(picture: Picture) -> list[Picture]:
    """A picture for each part, where the tokens of all parts stand one after another (SmolVLM's samples); else it."""
    found, start = [], 0
    for part in picture.parts:
        if part.where != Span.line(start, part.count):
            return [picture]
        found.append(Picture(part.count, (replace(part, where=Span.line(0, part.count)),)))
        start += part.count
    return found if start == picture.tokens else [picture]


def clip_of(frames: list[Picture]) -> Picture:
    """The picture of successive images that are the frames of one clip.

    Raises:
        ValueError: they differ in size, or are cut into tiles.
    """
    if any(len(one.parts) != 1 or one.lines is not None for one in frames):
        raise ValueError("runs joins images that are cut into tiles, which is no clip: give frames as single images")
    part = frames[0].parts[0]
    for i, one in enumerate(frames):
        other = one.parts[0]
        if (one.tokens, other.where, other.grid) != (frames[0].tokens, part.where, part.grid):
            raise ValueError(
                f"runs joins images of different sizes, {part.count} and {other.count} visual tokens on grids "
                f"{part.grid} and {other.grid} (frames 0 and {i}): the frames of a clip have one size"
            )
    rows = tuple(one.parts[0].tower for one in frames)
    # Between the frames of a clip there may be tokens that belong to none (class tokens of the tower): a frame's tokens
    # are a row of a rectangle as wide as the image.
    where = Span(part.where.start, len(frames), part.count, frames[0].tokens)
    known = min(rows) >= 0
    joint = replace(part, where=where, frames=len(frames), tower=rows[0] if known else -1, clip=rows if known else ())
    return Picture(frames[0].tokens * len(frames), (joint,))


def lengths(output: Output) -> list[int]:
    """Tokens of each picture; a video's may come frame by frame."""
    return [one.shape[:-1].numel() for one in words.FEATURES.need(output)]


def square(n: int) -> tuple[int, int] | None:
    """The square grid of ``n`` tokens, if there is one."""
    side = round(n**0.5)
    return (side, side) if side * side == n and n else None


def fewer(grid: tuple[int, int], n: int) -> tuple[int, int] | None:
    """The grid of ``n`` tokens of the same proportions, each of them a square cell of ``grid``; None: there is none."""
    side = round((grid[0] * grid[1] / n) ** 0.5) if n else 0
    fits = side > 0 and grid[0] % side == grid[1] % side == 0 and grid[0] * grid[1] == n * side * side
    return (grid[0] // side, grid[1] // side) if fits else None


def places_in(picture: Picture, device: torch.device) -> Tensor | None:
    """``(tokens, 2)`` float32: row and column of each token in the image, in [0, 1]; None where a grid is not known.

    Tiles lie beside each other; newlines stand at the ends of their rows.
    """
    found = torch.zeros(picture.tokens, 2, device=device)
    for part in picture.parts:
        if part.grid is None:
            return None
        place = grid_places(*part.grid, device=device) if part.corner is None else _within(part, device)
        where = part.where.offsets(device)
        if len(where) % len(place):
            return None
        found[where] = place.repeat(len(where) // len(place), 1)
    if picture.lines is not None:
        ends = picture.lines.offsets(device).view(picture.lines.rows, picture.lines.columns)[:, -1]
        found[ends] = torch.stack([found[ends - 1, 0], torch.ones_like(found[ends, 1])], 1)
    return found


def _within(part: Part, device: torch.device) -> Tensor:
    """Places of a tile in the whole image, of which it shows the tokens from its corner on."""
    assert part.corner is not None
    assert part.grid is not None
    row, column, rows, columns = part.corner
    y = sides(rows, device)[row : row + part.grid[0]]
    x = sides(columns, device)[column : column + part.grid[1]]
    return torch.cartesian_prod(y, x).view(-1, 2)


def plain(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """One part each, on the grid of the tower's patches where the numbers agree, else on a square one. Where class
    tokens are among the features they are no part of anything, and stay."""
    pixels = words.PIXELS.of(given)
    counts, found = lengths(output), []
    for i, n in enumerate(counts):
        grid = _patches(core, pixels)
        start = 0
        if grid is not None and grid[0] * grid[1] == n - 1:
            start = 1
        else:
            grid = square(n) if grid is None else fewer(grid, n)
        fits = tap.inputs is not None and tap.inputs.ndim == 3 and tap.inputs.shape[:2] == (len(counts), n)
        found.append(Picture(n, (Part(Span.line(start, n - start), grid, tower=i if fits else -1, skip=start),)))
    return found


def _patches(core: PreTrainedModel, pixels: Tensor | None) -> tuple[int, int] | None:
    patch = words.PATCH.part(words.VISION.need(words.CONFIG.need(core)))
    sides = (patch, patch) if isinstance(patch, int) else patch
    if sides is None or pixels is None or pixels.ndim < 4:
        return None
    return int(pixels.shape[-2] // sides[0]), int(pixels.shape[-1] // sides[1])


def tiled(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then its tiles side by side, row by row, without padding and
    with a newline after each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    config = words.CONFIG.need(core)
    vision = words.VISION.need(config)
    side = words.IMAGE.need(vision) // words.PATCH.need(vision)
    base, rows, found = side * side, 0, []
    fits = tap.inputs is not None and tap.inputs.ndim == 3 and tap.inputs.shape[1] == base
    for n, size in zip(lengths(output), words.SIZES.at(given), strict=True):
        if n <= base + 1:
            whole = Part(Span.line(0, base), (side, side), tile=Tile(), tower=rows if fits else -1)
            found.append(Picture(n, (whole,) if n >= base else ()))
            rows += 1
            continue
        high, wide = get_anyres_image_grid_shape(
            size, words.TILINGS.need(words.CONFIG.need(core)), words.IMAGE.need(vision)
        )
        places = torch.arange(high * side * wide * side).view(1, high * side, wide * side)
        left = unpad_image(places, size)[0]
        tiles = 1 + high * wide
        parts = [Part(Span.line(0, base), (side, side), tile=Tile(0, tiles, True), tower=rows if fits else -1)]
        if left.numel() + left.shape[0] + base == n:
            columns = left.shape[1]
            top, start = divmod(int(left[0, 0]), wide * side)
            parts += _tiles(left.shape, (top, start), (high, wide), side, rows if fits else -1, base)
            layout = Tiles(high, wide, (side, side), (top, start))
            parts = [replace(one, tiles=layout, whole=rows if fits else -1) for one in parts]
        else:  # the tiles were scaled down together
            columns = _columns(n - base, left.shape)
            grid = ((n - base) // (columns + 1), columns)
            where = Span(base, grid[0], columns, columns + 1)
            parts.append(Part(where, grid, tile=Tile(1, 2, False)))
        lines = Span(base, (n - base) // (columns + 1), columns + 1, columns + 1)
        found.append(Picture(n, tuple(parts), lines))
        rows += tiles
    return found


def _tiles(
    shape: torch.Size, corner: tuple[int, int], count: tuple[int, int], side: int, first: int, base: int
) -> list[Part]:
    """A part for each tile: what padding has left of it.

    Args:
        shape: rows and columns of tokens that are left of all tiles together.
        corner: row and column of the first of them.
        count: rows and columns of tiles.
        side: tokens of a tile's side.
        first: row of the image in the tower's batch, or -1.
        base: tokens before.
    """
    # A tile that lies in the padding altogether is not there; one at its border has lost rows or columns, so that its
    # patches are a rectangle inside the tower's row.
    parts, columns = [], shape[1]
    for i in range(count[0]):
        for j in range(count[1]):
            top, bottom = max(i * side, corner[0]), min((i + 1) * side, corner[0] + shape[0])
            left, right = max(j * side, corner[1]), min((j + 1) * side, corner[1] + columns)
            if top >= bottom or left >= right:
                continue
            grid = (bottom - top, right - left)
            start = base + (top - corner[0]) * (columns + 1) + left - corner[1]
            patches = Span((top - i * side) * side + left - j * side, *grid, side)
            index = 1 + i * count[1] + j
            tile = Tile(index, 1 + count[0] * count[1], False)
            tower = -1 if first < 0 else first + index
            at = (top - corner[0], left - corner[1], *shape)
            where = Span(start, *grid, columns + 1)
            parts.append(Part(where, grid, tile=tile, tower=tower, patches=patches, corner=at))
    return parts


def _columns(n: int, shape: torch.Size) -> int:
    """Columns of ``n`` tokens with newlines, of about the proportions of ``shape``."""
    wanted = (n * shape[1] / shape[0]) ** 0.5
    fitting = [c for c in range(1, n) if n % (c + 1) == 0]
    return min(fitting, key=lambda c: abs(c - wanted))


def video(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """LLaVA-NeXT-Video: frames of pooled patches; in LLaVA-OneVision with a newline at the end."""
    # Older versions give videos to the getter under the name that images have.
    pixels = words.VIDEO_PIXELS.of(given)
    frames = int((words.PIXELS.at(given) if pixels is None else pixels).shape[1])
    found = []
    for i, n in enumerate(lengths(output)):
        # The grid of a frame is a square one; one token more is the newline.
        count, grid = next(
            ((m, square(m // frames)) for m in (n, n - 1) if m % frames == 0 and square(m // frames)), (n, None)
        )
        rows = tuple(range(i * frames, (i + 1) * frames)) if grid is not None and tap.heads else ()
        found.append(Picture(n, (Part(Span.line(0, count), grid, frames, pooled=rows),)))
    return found


def closed_video(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """LLaVA-OneVision's: the getters of older versions leave the newline to the forward, which puts it behind."""
    found = video(core, given, output, tap)
    return [p._replace(tokens=p.tokens + 1) if p.parts[0].count == p.tokens else p for p in found]


def by_grid(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """Qwen's: frames, rows and columns of patches are given, of which 2 x 2 make a token."""
    # Qwen 3 VL's getter of videos calls that of images, with the videos' grids.
    grids = words.IMAGE_GRIDS.of(given)
    kind = "image"
    if grids is None or words.VIDEO_PIXELS.of(given) is not None:
        grids, kind = words.VIDEO_GRIDS.at(given), "video"
    side, found = words.JOINED.need(members.TOWER.need(core)), []
    for i, (n, (t, h, w)) in enumerate(zip(lengths(output), grids.tolist(), strict=True)):
        frames = t if kind == "video" else None
        found.append(Picture(n, (Part(Span.line(0, n), (h // side, w // side), frames, tower=i),)))
    return found


def by_size(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """Mistral 3's: images of any size, whose patches are joined to cells."""
    side, found = (
        words.PATCH.need(words.VISION.need(words.CONFIG.need(core))) * words.JOINED.need(words.CONFIG.need(core)),
        [],
    )
    for n, (high, wide) in zip(lengths(output), torch.as_tensor(words.SIZES.at(given)).tolist(), strict=True):
        found.append(Picture(n, (Part(Span.line(0, n), (high // side, wide // side)),)))
    return found


def by_shape(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """LFM2-VL's: images, or tiles of them, of any shape, whose patches are joined to cells."""
    side, found = words.DOWNSAMPLED.need(words.CONFIG.need(core)), []
    for n, (high, wide) in zip(lengths(output), torch.as_tensor(words.SHAPES.at(given)).tolist(), strict=True):
        found.append(Picture(n, (Part(Span.line(0, n), (high // side, wide // side)),)))
    return found


def by_map(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """Florence-2's: the cells of the tower's map ``(B, C, H, W)``, row by row, behind the mean of all of them, which
    is no part of anything, and stays."""
    high, wide = words.LAST.need(output).shape[-2:]
    found = []
    for i, n in enumerate(lengths(output)):
        found.append(Picture(n, (Part(Span.line(n - high * wide, high * wide), (high, wide), tower=i),)))
    return found


def by_sample(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap) -> list[Picture]:
    """Idefics3 and SmolVLM: all tiles of a sample together."""
    vision = words.VISION.need(words.CONFIG.need(core))
    size = (words.IMAGE.need(vision) // words.PATCH.need(vision)) ** 2 // words.SHRINK.need(
        words.CONFIG.need(core)
    ) ** 2
    found = []
    for n in lengths(output):
        parts = [Part(Span.line(i, size), square(size)) for i in range(0, n, size)]
        found.append(Picture(n, tuple(parts)))
    return found
