"""Clips whose frames come as images: which pictures of a prompt are the frames of one video.

Some families take a video as what it is (``pixel_values_videos``, ``video_grid_thw``), and nothing has to be said.
Others (InternVL, SmolVLM, LLaVA, ...) take its frames as images, one after another, and neither their processors nor
the models tell them from images of their own: four images of a prompt may be four frames, or four photographs. tokred
does not guess; :func:`clips` says it, for the calls inside it (and in its thread).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

Runs = tuple[tuple[int, ...], ...]


class _Said(threading.local):
    """Runs that the innermost :func:`clips` of this thread says; None outside of all."""

    runs: Runs | None = None


_said = _Said()


def said() -> Runs | None:
    """Runs of pictures of each sample that this thread is inside :func:`clips` of; None outside."""
    return _said.runs


def _counts(given: object) -> bool:
    return isinstance(given, list | tuple) and all(type(n) is int and n >= 1 for n in given)


@contextlib.contextmanager
def clips(runs: Sequence[Sequence[int]]) -> Iterator[None]:
    """Inside, runs of pictures are clips: each reaches a method as one site with ``frames``.

    Args:
        runs: for each prompt of the batch, how many successive pictures belong together, all of its pictures counted:
            1 for an image by itself, ``T`` for the frames of a clip. Pictures are what the vision tower sees: an image
            that a processor cuts into tiles is as many pictures, each by itself. ``[[4], [1, 4]]`` is one clip of four
            frames in the first prompt, and an image before one in the second.

    A later turn on the same cache names its own pictures alone; beams and several sequences of a prompt share its row.

    Raises:
        ValueError: ``runs`` is no such thing. The forward raises it where the pictures of a prompt do not add up to it,
            where frames of a clip differ in size, or where a family takes videos as what they are.

    Example:
        >>> with clips([[4]]):  # one prompt with a video of four frames
        ...     pass  # model.generate(**inputs)
    """
    if not isinstance(runs, list | tuple) or not runs or not all(map(_counts, runs)):
        raise ValueError(
            f"runs is {runs!r}, but has to name, for each prompt of the batch, how many successive pictures belong "
            "together, such as [[4], [1, 4]]"
        )
    before, _said.runs = _said.runs, tuple(map(tuple, runs))
    try:
        yield
    finally:
        _said.runs = before
