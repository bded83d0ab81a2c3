"""``Stream``: a running video that a model watches, and that it can be asked about at any time.

A frame goes through the tower; a causal method leaves some of its tokens, knowing the frames before; these are
prefilled behind what the cache holds, where they would stand in the whole video. A policy of the cache says what old
frames become: rows leave, or are held in fewer bits. A question goes in behind the last frame, is answered, and is
taken back: the stream goes on as if nobody had asked. What is held is the cache, the method's state, and, where
features of the tower are used again, those of one reference frame.

The model is touched only while it looks or answers, see :mod:`tokred.adapters.vlm.streams.again`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.contract import attention_of, cache_kwargs, members, set_attention, words
from tokred.adapters.kv.cache import TokCache, holds_of, layers_of, make_cache, rows_of, set_states, states_of
from tokred.adapters.kv.reuse.layers import plain_cache
from tokred.adapters.vlm.streams.again import Again
from tokred.adapters.vlm.streams.closing import Closing
from tokred.adapters.vlm.streams.families import newline_of
from tokred.adapters.vlm.streams.given import as_ids, ends_of, named
from tokred.adapters.vlm.streams.looked import features_of, look
from tokred.adapters.vlm.streams.parts import Parts
from tokred.adapters.vlm.streams.report import StreamReport
from tokred.core.method import Method
from tokred.errors import TokredWarning
from tokred.vlm.causal import State


class Frame(NamedTuple):
    """A frame that went in.

    Attributes:
        number: of it, from 0.
        tokens: ``N`` of the frame before any left.
        kept: ``(M,)`` int64 on the CPU, the places that stayed.
        grid: rows and columns that the places lie in, row by row.
    """

    number: int
    tokens: int
    kept: Tensor
    grid: tuple[int, int]


class Answer(NamedTuple):
    """An answer.

    Attributes:
        ids: of the tokens, without that which ends the text.
        text: of them, where the stream has a tokenizer; None: it has none.
        logits: ``(n, V)`` float32 on the CPU, of each step, that which ended it included; None: nobody asked.
    """

    ids: tuple[int, ...]
    text: str | None
    logits: Tensor | None


class Stream:
    """A running video, in front of one model; ``len`` is the number of frames so far.

    Made by :func:`tokred.stream`. Several streams can share a model.

    Args:
        parts: see there.
        prompt: ``(P,)`` int64, the text before the first frame.
    """

    def __init__(self, parts: Parts, prompt: Tensor) -> None:
        self._parts = parts
        self._model: Any = parts.host.model
        core: Any = parts.host.core
        self._core = core
        self._changes = Again()
        self._patch()
        config, policy = parts.cache_host.config, parts.policy
        made = plain_cache(config) if policy is None else make_cache(config, policy, parts.cache_host.compressed)
        self._cache: Any = made
        if isinstance(made, TokCache):
            made.watch()
            made.engine.front = 0 if parts.front is None else parts.front.count
        self._shape: tuple[int, ...] | None = None
        self._state: State = ()
        self._frames = self._seen = self._kept = 0
        self._grid = (1, 1)
        self._next = 0  # position of what comes next
        self._warned = False
        self._closing = None if parts.front is None else Closing(parts.front, len(prompt))
        embed = members.EMBED.need(self._model)()
        self._device = embed.weight.device
        self._embed = embed
        if len(prompt):
            with self._at_work():
                self._feed(embed(prompt[None].to(self._device)), self._line(len(prompt)), len(prompt) - 1)
        self._next = self._start = len(prompt)

    # ------------------------------------------------------------------ what users call

    def __len__(self) -> int:
        return self._frames

    def __repr__(self) -> str:
        return f"Stream({self._frames} frames, {self.report().rows} rows, {self.nbytes} bytes)"

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that act, in the order of their stages."""
        return tuple(one for one in (self._parts.method, self._parts.policy) if one is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held between two frames: rows, the method's state, features of the tower."""
        return self.report().nbytes

    def frame(self, pixels: Tensor) -> Frame:
        """Watch the next frame.

        Args:
            pixels: ``(3, H, W)`` as the model's processor makes them of one picture; of models whose tower takes
                several frames together (Qwen: two) either that, which then stands for all of them, or ``(2, 3, H, W)``.

        Raises:
            TypeError: it is no tensor of floats.
            ValueError: of another shape than the frames before, or one that the model does not take.
        """
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            raise TypeError(f"pixels must be a tensor of floats, got {named(pixels)}")
        if self._shape is not None and tuple(pixels.shape) != self._shape:
            raise ValueError(
                f"pixels of frame {self._frames} are {tuple(pixels.shape)}, those of the frames before {self._shape}: "
                "the frames of a stream have one size"
            )
        parts = self._parts
        some = next(self._core.get_submodule(parts.host.facts.tower).parameters())
        given = parts.looks.given(self._core, pixels.to(some.device, some.dtype))
        given = {name: value.to(some.device) for name, value in given.items()}
        # The state is taken over when the language model has run: a frame goes in as a whole or not at all.
        with self._at_work(), self._unless_it_fails():
            with contextlib.nullcontext() if parts.tower is None else parts.tower.frame(self._frames):
                found = features_of(self._core, parts.looks, given)
            n = found.x.shape[1]
            left = look(parts.method, self._state, found)
            self._grid = found.part.grid or (1, n)
            if len(left.kept):
                x, places = left.x.to(self._device, self._embed.weight.dtype), self._places(left.kept, n)
                self._feed(x, places, self._last(n, len(left.kept)))
                if self._closing is not None:
                    self._closing.came(self._next, places[0])
                    self._closing.close(self._cache)
            self._state = left.state
        self._shape = tuple(pixels.shape)
        self._next += self._advance(n, len(left.kept))
        self._frames, self._seen, self._kept = self._frames + 1, self._seen + n, self._kept + len(left.kept)
        return Frame(self._frames - 1, n, left.kept.cpu(), self._grid)

    def frames(self, pixels: Sequence[Tensor] | Tensor) -> list[Frame]:
        """Watch several frames, one after the other; the same as :meth:`frame` for each."""
        return [self.frame(one) for one in pixels]

    def ask(self, question: str | Tensor | Sequence[int], *, max_new_tokens: int = 20, logits: bool = False) -> Answer:
        """Answer a question from what is remembered now; afterwards the stream is as it was before.

        The most likely token is taken at each step, until one ends the text.

        Args:
            question: the prompt behind the last frame, with all that the chat's form wants there: ids ``(n,)`` or
                ``(1, n)``, or text, where the stream has a tokenizer.
            max_new_tokens: at most so many tokens are written.
            logits: whether to hand over the logits of each step.

        Raises:
            ValueError: no frame has come yet, the question is empty, or ``max_new_tokens`` is less than 1.
            TypeError: it is text and there is no tokenizer, or it is something else.
        """
        if not self._frames:
            raise ValueError("no frame has come yet, so there is nothing to ask about: call stream.frame(pixels) first")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}")
        ids = as_ids(question, "question", self._parts.tokenizer)
        if not len(ids):
            raise ValueError("question is empty: the answer is told from its last token")
        found: list[int] = []
        rows: list[Tensor] = []
        ends = ends_of(self._model)
        with self._at_work(), self._kept_as_it_was():
            x = self._embed(ids[None].to(self._device))
            newline = newline_of(self._core, self._parts.looks)
            if newline is not None:
                x = torch.cat([newline.to(x)[None], x], 1)
            # Text behind a video with several axes goes on where the longest side of a frame ends.
            start = self._start + max(self._grid) if self._parts.looks.axes else self._next
            while True:
                place, start = self._line(x.shape[1], start), start + x.shape[1]
                out = self._feed(x, place, start - 1)
                if logits:
                    rows.append(out.float().cpu())
                token = int(out.argmax())
                if token in ends:
                    break
                found.append(token)
                if len(found) == max_new_tokens:
                    break
                x = self._embed(torch.tensor([[token]], device=self._device))
        tokenizer = self._parts.tokenizer
        text = None if tokenizer is None else str(members.DECODE.need(tokenizer)(found))
        return Answer(tuple(found), text, torch.stack(rows) if logits else None)

    def report(self) -> StreamReport:
        """A report of what has been seen, and what is held."""
        tower = self._parts.tower
        return StreamReport(
            self._parts.host.family,
            self.methods,
            self._frames,
            self._seen,
            self._kept,
            rows_of(layers_of(self._cache)),
            sum(x.untyped_storage().nbytes() for x in self._state),
            0 if tower is None else tower.nbytes,
        )

    def remembered(self) -> Tensor:
        """``(P + kept,)`` bool on the CPU: of each token of the prompt and the frames, in the order that they went in,
        whether some layer still has a row of it."""
        found = torch.zeros(self._start + self._kept, dtype=torch.bool)
        for there in holds_of(layers_of(self._cache)):
            if there.numel():
                found |= there.any(0).any(0)
        return found

    # ------------------------------------------------------------------ the model

    def _patch(self) -> None:
        """Make the changes once, so that they are known, and take them back."""
        parts, changes = self._parts, self._changes
        try:
            if parts.policy is not None:
                config = parts.cache_host.config
                parts.cache_host.patch(parts.policy, None, "auto", changes)
                # Its undo comes with the patch; made anew, the name has to be set again.
                name = attention_of(config)
                changes.add(partial(set_attention, config, name))  # no closure: a copy of the stream has its own
            if parts.method is not None:
                parts.host.tap(parts.method, changes)
            if parts.tower is not None:
                parts.tower.hang(changes)
        finally:
            changes.undo()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Inside, the model is patched, and in evaluation; no gradients are recorded."""
        self._parts.free()
        training = [m for m in self._model.modules() if m.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad(), self._changes.in_force():
                yield
        finally:
            for module in training:
                module.training = True

    def _feed(self, x: Tensor, positions: Tensor, last: int) -> Tensor:
        """Run the model on ``(1, n, C)`` embeddings behind what the cache holds; ``(V,)`` logits of the last. None of
        the positions is larger than ``last``."""
        given = {
            words.EMBEDS.name: x, words.POSITIONS.name: positions, words.CACHED.name: True, words.KEPT_LOGITS.name: 1,
        }  # fmt: skip
        self._check_range(positions, last)
        out = self._model(**given, **cache_kwargs(self._cache))
        found: Tensor = words.LOGITS.need(out)[0, -1]
        return found

    def _check_range(self, positions: Tensor, last: int) -> None:
        most = words.MOST_POSITIONS.part(self._parts.cache_host.config)
        moved = 0 if self._closing is None else self._closing.by
        if self._warned or not isinstance(most, int) or last - moved < most:
            return
        last = int(positions.max()) - moved  # which waits for the device, and is asked for near the end alone
        if last >= most:
            self._warned = True
            warnings.warn(
                f"the stream has come to position {last}, and {self._parts.host.family} was made for {most}: its "
                "answers may go astray. A method with positions='repack' counts only the tokens that stay",
                TokredWarning,
                stacklevel=4,
            )

    # ------------------------------------------------------------------ positions

    def _line(self, count: int, start: int | None = None) -> Tensor:
        """Positions of text: ``(1, n)``, or ``(3, 1, n)`` where there are several axes."""
        start = self._next if start is None else start
        line = torch.arange(start, start + count, device=self._device)[None]
        return line.expand(3, 1, -1) if self._parts.looks.axes else line

    def _places(self, kept: Tensor, n: int) -> Tensor:
        """Positions of the tokens of a frame that stay."""
        kept = kept.to(self._device)
        if self._parts.looks.axes:
            columns = self._grid[1]
            time = torch.full_like(kept, self._time())
            return torch.stack([time, kept // columns, kept % columns])[:, None] + self._start
        if self._repacks:
            return self._line(len(kept))
        return self._next + kept[None]

    def _last(self, n: int, kept: int) -> int:
        """No position of a frame of ``n`` tokens, of which ``kept`` stay, is larger."""
        if self._parts.looks.axes:
            return self._start + max(self._time(), *self._grid)
        return self._next + (kept if self._repacks else n) - 1

    def _time(self) -> int:
        """The place of this frame on the axis of time."""
        vision = words.VISION.need(words.CONFIG.need(self._core))
        ticks = words.TICKS.part(vision)
        return self._frames if ticks is None else int(self._frames * (ticks * self._parts.seconds))

    def _advance(self, n: int, kept: int) -> int:
        """Positions that a frame takes up."""
        if self._parts.looks.axes:
            return 0  # all frames begin where the video does, and differ in time
        return kept if self._repacks else n

    @property
    def _repacks(self) -> bool:
        method = self._parts.method
        return method is not None and method.positions == "repack"

    # ------------------------------------------------------------------ taking back

    @contextlib.contextmanager
    def _kept_as_it_was(self) -> Iterator[None]:
        """Behind it the cache is what it was."""
        before, cache = self._snapshot(), self._cache
        try:
            if isinstance(cache, TokCache):
                cache.ask()
            yield
        finally:
            self._restore(before)

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        """Inside, an error leaves the cache as it was."""
        before = self._snapshot()
        try:
            yield
        except BaseException:
            self._restore(before)
            raise

    def _snapshot(self) -> Any:
        cache = self._cache
        # Layers of transformers make new tensors of the old and the new rows; the old ones stay as they are.
        return cache.snapshot() if isinstance(cache, TokCache) else states_of(layers_of(cache))

    def _restore(self, before: Any) -> None:
        cache = self._cache
        if isinstance(cache, TokCache):
            cache.restore(before)
        else:
            set_states(layers_of(cache), before)
