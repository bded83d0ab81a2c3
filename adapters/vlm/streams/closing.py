"""``Closing``: the prompt of a stream moves up behind the frames that have left, so that no gap grows between the two.

Tokens keep the positions that they have in the whole video. The prompt's rows are turned to stand right before the
oldest frame of which something is left, where they would be had the video begun there.
"""

from __future__ import annotations

from torch import Tensor

from tokred.adapters.kv.cache import TokCache
from tokred.adapters.kv.front import Front


class Closing:
    """The frames of one stream, as far as rows of them are left.

    Args:
        front: moves rows of the stream's cache.
        prompt: tokens of the prompt, which are among the first rows.

    Attributes:
        by: positions that the first rows have moved.
    """

    def __init__(self, front: Front, prompt: int) -> None:
        self._front = front
        self._slots = self._end = prompt
        # Of each frame its first token's slot in the cache, and its place in the video.
        self._frames: list[tuple[int, int]] = []
        self.by = 0

    def came(self, position: int, places: Tensor) -> None:
        """A frame has gone in.

        Args:
            position: where it begins in the video.
            places: ``(n,)`` positions of its tokens that stay, one or more.
        """
        self._frames.append((self._slots, position))
        more = self._front.count - self._slots  # of the first rows, which are tokens of this frame then
        if more > 0:
            self._end = int(places[min(more, len(places)) - 1]) + 1
        self._slots += len(places)

    def close(self, cache: TokCache) -> None:
        """Let the first rows stand before the oldest frame that is left."""
        oldest = self._front.oldest(cache) if self._slots > self._front.count else None
        if oldest is None:
            return
        while len(self._frames) > 1 and self._frames[1][0] <= oldest:
            del self._frames[0]
        by = self._frames[0][1] - self._end
        if by > self.by:
            self._front.move(cache, by)
            self.by = by
