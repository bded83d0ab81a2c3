"""Frames of clips on their way through the tower: those that became one run once in the blocks that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.vlm.layout import Picture, pictures_of, square
from tokred.errors import MissingInputError
from tokred.vlm.clips import said
from tokred.vlm.shots import FrameMerger, Shots

if TYPE_CHECKING:
    from tokred.adapters.encoder.packed.layout import Layout
    from tokred.adapters.vlm.taps import Tap


@dataclass(eq=False)
class Film:
    """The clips of one call of a feature getter.

    Attributes:
        method: decides.
        sizes: frames of each clip, and rows of the tower's input that a frame is.
        shots: what became of the frames of each.
        kept: ``(M,)`` int64 the rows that are left, ascending; None: all.
        back: ``(S,)`` int64 which of those that are left each row of the whole is; None: itself.
        layout: of the rows, where all stand in one sequence; None: nobody has asked yet.
    """

    method: FrameMerger
    sizes: tuple[tuple[int, int], ...]
    shots: list[Shots] = field(default_factory=list)
    kept: Tensor | None = None
    back: Tensor | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        self.shots = [Shots.begin(frames) for frames, _ in self.sizes]

    @property
    def counts(self) -> list[int]:
        """Frames of each clip that are left."""
        return [len(one.first) for one in self.shots]

    def clips(self, x: Tensor) -> list[Tensor]:
        """``(T', S, C)`` of each clip, of the rows ``(M, C)`` of all, or of frames ``(M, S, C)``."""
        found, start = [], 0
        for count, (_, rows) in zip(self.counts, self.sizes, strict=True):
            own = x[start : start + count * rows]
            found.append(own if x.ndim == 3 else own.view(count, rows, -1))
            start += count * rows
        return found

    def merge(self, x: Tensor, scores: list[Tensor] | None) -> Tensor:
        """Ask the method behind a block; the rows that are left then.

        Args:
            x: of the rows that are left, as :meth:`clips` has them.
            scores: ``(T', N)`` of each clip, what its tokens received in this block; None: of this block nobody asks.
        """
        found, moved = [], False
        for i, frames in enumerate(self.clips(x)):
            with torch.no_grad():
                step = self.method.merge_frames(frames.detach())
            if not step.trivial:
                moved = True
                frames = step.merge(frames.flatten(1).unsqueeze(0))[0].view(-1, *frames.shape[1:])
                self.shots[i] = self.shots[i].then(step)
            if scores is not None and not step.trivial:
                scores[i] = step.merge(scores[i].unsqueeze(0))[0]
            found.append(frames if x.ndim == 3 else frames.flatten(0, 1))
        if not moved:
            return x
        self._place(x.device)
        return torch.cat(found)

    def judge(self, x: Tensor, scores: list[Tensor]) -> None:
        """Note the scores, and the segments of the frames that are left, of ``x`` as :meth:`clips` has it."""
        for i, (frames, own) in enumerate(zip(self.clips(x), scores, strict=True)):
            found = self.method.segments(frames.detach())
            root, weight = (t.to(own.device) for t in (self.shots[i].root, self.shots[i].weight))
            self.shots[i] = Shots(root, weight, found, own)

    def _place(self, device: torch.device) -> None:
        kept, back, base, short = [], [], 0, 0
        for shots, (frames, rows) in zip(self.shots, self.sizes, strict=True):
            own = torch.arange(rows, device=device)
            kept.append((base + shots.first.to(device).unsqueeze(1) * rows + own).flatten())
            back.append((short + shots.slot.to(device).unsqueeze(1) * rows + own).flatten())
            base, short = base + frames * rows, short + len(shots.first) * rows
        self.kept, self.back = torch.cat(kept), torch.cat(back)


def film_of(method: FrameMerger, tap: Tap, rows: int) -> Film | None:
    """The film of a getter's call; None where it has no clips, or does not say which frames are one.

    Args:
        method: that decides.
        tap: of the call.
        rows: of the tower's input: frames, or patches where all stand in one sequence.
    """
    given, runs = tap.given, said()
    # A family that takes videos as what they are has no runs; one with runs has images alone.
    if tap.modality == "video":
        grids, pixels = words.VIDEO_GRIDS.of(given), words.VIDEO_PIXELS.of(given)
        if grids is not None:
            sizes = [(int(t), int(high * wide)) for t, high, wide in grids.tolist()]
        else:
            # Older versions give videos to the getter under the name that images have.
            batch, frames = (words.PIXELS.at(given) if pixels is None else pixels).shape[:2]
            sizes = [(int(frames), 1)] * int(batch)
    else:
        sizes = [] if runs is None else [(count, 1) for row in runs for count in row]
    # Runs that do not add up to the pictures are refused where the pictures are known.
    fits = sum(count * own for count, own in sizes) == rows
    return Film(method, tuple(sizes)) if sizes and fits else None


def located(film: Film, pictures: list[Picture]) -> dict[int, Shots]:
    """The shots of each clip, by the first of its tokens among all tokens of a getter's call."""
    # Frames that came as images are pictures of their own, a clip several of them.
    videos = len(pictures) == len(film.sizes)
    single = pictures if videos else [one for picture in pictures for one in pictures_of(picture)]
    found, picture, token = {}, 0, 0
    for shots, (frames, _) in zip(film.shots, film.sizes, strict=True):
        found[token] = shots
        some = 1 if videos else frames
        token += sum(one.tokens for one in single[picture : picture + some])
        picture += some
    return found


def shots_of(shots: Shots | None, frames: int, cells: int, grid: tuple[int, int] | None) -> Shots:
    """Shots with a score for each token.

    Args:
        shots: of the clip, with a score for each patch ``(T', P)``, or each token; None: none are known.
        frames, cells: of the clip, and tokens of a frame.
        grid: of a frame's tokens.

    Raises:
        MissingInputError: there are none, or patches do not fit the tokens.
    """
    if shots is None or shots.scores is None or len(shots.root) != frames:
        raise MissingInputError(
            "nothing is known of what became of the clip's frames in the tower: its features were made by something "
            "else than the getters of the patched model"
        )
    if shots.scores.shape[1] == cells:
        return shots
    return Shots(shots.root, shots.weight, shots.segments, as_pooled(shots.scores.unsqueeze(1), grid).squeeze(1))


def as_pooled(scores: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """``(frames, H, P)`` of a frame's patches, which stand on a square, to ``(frames, H, N)`` of its tokens.

    Raises:
        MissingInputError: they stand on no square, or the tokens on no grid.
    """
    side = square(scores.shape[-1])
    if side is None or grid is None:
        raise MissingInputError(
            f"the tower has {scores.shape[-1]} patches a frame, which are no square, so that what they receive says "
            "nothing about its tokens"
        )
    found = scores.view(*scores.shape[:-1], *side)
    # As the features are pooled: means of whole cells, or, where a side does not divide (27 to 14), in between.
    if side[0] % grid[0] == side[1] % grid[1] == 0:
        found = F.avg_pool2d(found, (side[0] // grid[0], side[1] // grid[1]))
    else:
        found = F.interpolate(found, size=grid, mode="bilinear")
    return found.flatten(-2)
