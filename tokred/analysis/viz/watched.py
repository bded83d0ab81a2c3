"""Streams: over every frame of a video the tokens that went into the memory, and those that are still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokred import adapters
from tokred.adapters.contract import words
from tokred.adapters.vlm.streams.families import looks_of
from tokred.analysis.viz.seen import View, checked, drawable, fitted
from tokred.analysis.viz.settings import Several, settings
from tokred.analysis.viz.visual import HANDLING, VisualDrawing, VisualRun
from tokred.settings.streams import stream as opened

if TYPE_CHECKING:
    from tokred.adapters.vlm.streams.stream import Frame, Stream

STAGES = ("the frames", "entry", "the end of the stream")


@dataclass(frozen=True)
class StreamDrawing(VisualDrawing):
    """Settings on one running video: which tokens of each frame went in, and which are remembered at the end.

    Stages of :attr:`~tokred.analysis.viz.visual.VisualRun.held` are the frames, what went in, and what some layer's
    cache still has a row of behind the last frame.
    """

    heading: ClassVar[str] = "What a stream remembers"
    stage_axis: ClassVar[str] = "Seen at"
    whole: ClassVar[str] = "Answer where everything stays"

    def intro(self) -> tuple[str, ...]:
        """Paragraphs above the pictures of the page."""
        return (
            f"{self.family}: {self.frames} frames, one by one.",
            "Tokens that did not go in, and at the end those that no layer holds any more, are dark and struck "
            f"through. {HANDLING}",
        )

    def stage(self, number: int, *, full: bool = False) -> str:
        """The name of a stage."""
        return STAGES[number]

    def gone(self, number: int) -> tuple[str, str]:
        """The meaning of a token that is not there."""
        return "did not go in", "went in, and are forgotten at the end"


def stream(
    model: nn.Module,
    frames: Sequence[Tensor] | Tensor,
    methods: Several,
    *,
    prompt: Any = (),
    question: Any = None,
    tokenizer: Any = None,
    pixels: Any = None,
    tokens: int = 32,
    **options: Any,
) -> StreamDrawing:
    """Let a model watch a video frame by frame under each setting, and note which tokens it is left with.

    Args:
        model: as :func:`tokred.stream` takes it.
        frames: ``(3, H, W)`` floats each, or what else the stream of this model takes, all of one size.
        methods: settings such as ``"stc budget=60 + streaming_llm budget=4096"``, or several of them, side by side.
        prompt: the text before the first frame.
        question: asked behind the last frame, of each setting and of a stream that keeps everything; None: nothing is.
        tokenizer: of the model; without one, texts are ids, and shown as numbers.
        pixels: what to draw, ``(T, 1 or 3, H, W)``, uint8 or floats in 0..1; None: the frames, each stretched to its
            own range.
        tokens: of an answer, at most.
        options: more of :func:`tokred.stream` (``reuse``, ``seconds``).

    Raises:
        ValueError: there is no frame, ``tokens`` is less than 1, or ``pixels`` are not one a frame.
        UnsupportedModelError, MissingInputError, UnknownMethodError, TypeError: as :func:`tokred.stream`.
    """
    if not len(frames):
        raise ValueError("frames is empty: at least one is needed")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    drawn = None if pixels is None else checked(pixels)
    if drawn is not None and len(drawn) != len(frames):
        raise ValueError(f"pixels must be one a frame: there are {len(frames)} frames, got {len(drawn)}")
    given = {"prompt": prompt, "tokenizer": tokenizer, **options}
    chosen = settings(methods)
    # All of them first: what is wrong with the last one is said before anything runs.
    streams = [(label, opened(model, several, **given)) for label, several in chosen]
    answer = None
    if question is not None:
        plain = opened(model, None, **given)
        plain.frames(frames)
        answer = _said(plain, question, tokens)
    runs, seen, family = list[VisualRun](), list["Frame"](), ""
    for label, one in streams:
        seen = one.frames(frames)
        answered = None if question is None else _said(one, question, tokens)
        runs.append(VisualRun(label, _held(one, seen), (answered,)))
        family = one.report().family
    views, start = list[View](), 0
    for t, frame in enumerate(seen):
        own = torch.arange(start, start + frame.tokens)
        start += frame.tokens
        picture = frames[t] if drawn is None else drawn[t]
        picture = picture if picture.ndim == 3 else picture[0]  # of several that the tower takes together
        views.append(View(0, f"frame {t + 1}", frame.grid, own, fitted(picture, frame.grid), t + 1))
    return StreamDrawing(family, (_words(question),), (answer,), tuple(views), tuple(runs))


class Apart(NamedTuple):
    """A prompt with one clip, as a stream takes it: ids ``(P,)`` before it, its frames, ids ``(Q,)`` behind it."""

    prompt: Tensor
    frames: list[Tensor]
    question: Tensor


def taken_apart(model: nn.Module, inputs: Mapping[str, Any]) -> Apart:
    """Take the arguments of ``generate`` for one prompt with one clip apart.

    Args:
        model: with vision.
        inputs: as the model's processor makes them of a chat: ids ``(1, N)``, pixels, grids.

    Raises:
        ValueError: there are several prompts, or the prompt has no clip.
        UnsupportedModelError: the model takes no frames one by one.
    """
    host = adapters.find(model, "projector")
    core: Any = host.core
    looks = looks_of(core)
    ids = inputs[words.INPUT_IDS.name]
    if len(ids) != 1:
        raise ValueError(f"a stream is one prompt with one clip, got {len(ids)} prompts")
    config = words.CONFIG.need(core)
    places = (ids[0] == words.MODALITY_TOKENS[looks.modality].need(config)).nonzero().flatten().tolist()
    found = drawable(inputs, core)
    frames = list(found.clips[0]) if looks.modality == "video" and found.clips else list(found.rows)
    if not places or not frames:
        raise ValueError("the prompt has no clip that a stream could be made of")
    if looks.axes:
        # Its tower takes several frames together.
        deep = int(words.TOWER_DEPTH.need(words.VISION.need(config)))
        frames = [torch.stack(frames[i : i + deep]) for i in range(0, len(frames), deep)]
    return Apart(ids[0, : places[0]], frames, ids[0, places[-1] + 1 :])


def _said(one: Stream, question: Any, tokens: int) -> str:
    answer = one.ask(question, max_new_tokens=tokens)
    return _words(answer.ids) if answer.text is None else answer.text.strip()


def _words(text: Any) -> str:
    """A text, or its ids as numbers."""
    if text is None or isinstance(text, str):
        return text or ""
    return " ".join(map(str, torch.as_tensor(text).flatten().tolist()))


def _held(one: Stream, frames: Sequence[Frame]) -> Tensor:
    """``(3, 1, N)`` bool: all tokens of all frames, those that went in, and those that are remembered."""
    total = sum(frame.tokens for frame in frames)
    found = torch.zeros(3, 1, total, dtype=torch.bool)
    found[0] = True
    there = one.remembered()
    place = len(there) - sum(len(frame.kept) for frame in frames)  # behind the prompt
    start = 0
    for frame in frames:
        columns = start + frame.kept
        found[1, 0, columns] = True
        found[2, 0, columns] = there[place : place + len(columns)]
        start, place = start + frame.tokens, place + len(columns)
    return found
