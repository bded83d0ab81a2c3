"""Models with vision: over every picture, and every frame of a clip, the tokens that each decoder layer still sees."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokred import adapters, api
from tokred.adapters.contract import words
from tokred.analysis.viz import pages
from tokred.analysis.viz.drawing import Axis, Drawing, Page, answered, evenly, table
from tokred.analysis.viz.seen import View, held_by_layer, views_of
from tokred.analysis.viz.settings import Several, settings
from tokred.errors import MissingInputError, NothingRecordedError
from tokred.patch import parts_of

if TYPE_CHECKING:
    from tokred.adapters.vlm.forward import Forward
    from tokred.adapters.vlm.hooks import VisualSettings

STAGES = ("projector", "layer")
HANDLING = (
    "Point at a token to see where it left. Arrow keys move the slider; on a picture they go from token to token."
)


@dataclass(frozen=True)
class VisualRun:
    """One setting on a batch of prompts.

    Attributes:
        label: method or methods and their parameters.
        held: ``(1 + L, B, N)`` bool, whether each token of the prompt is there: at first in the prompt itself, padding
            apart, then in each of ``L`` decoder layers.
        answers: of each sample; None where nothing was asked.
    """

    label: str
    held: Tensor
    answers: tuple[str | None, ...]

    def mask(self, view: View) -> Tensor:
        """``(1 + L, rows * columns)`` bool: whether the tokens of a picture are there, row by row of its grid."""
        known = view.columns >= 0
        return self.held[:, view.sample, view.columns.clamp(min=0)] & known


@dataclass(frozen=True)
class VisualDrawing(Drawing):
    """Settings on a batch of prompts with pictures: which visual tokens stay, and what the model then answers.

    Attributes:
        family: of the model.
        questions: the text of each prompt.
        answers: of the unpatched model; None where nothing was asked.
        views: the pictures and frames of all prompts.
        runs: one a setting.
    """

    heading: ClassVar[str] = "What the model still sees"
    stage_axis: ClassVar[str] = "Seen by"
    whole: ClassVar[str] = "Answer of the unpatched model"

    family: str
    questions: tuple[str, ...]
    answers: tuple[str | None, ...]
    views: tuple[View, ...]
    runs: tuple[VisualRun, ...]

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.runs[0].held.shape[0] - 1

    def page(self) -> Page:
        """The pictures of each prompt, once for each setting, with a slider over the decoder layers."""
        labels = tuple(self.stage(i, full=True) for i in range(self.depth + 1))
        maps, panels, notes, sections = list[Any](), list[Any](), list[list[str]](), list[str]()
        for sample, question in enumerate(self.questions):
            mine = [i for i, view in enumerate(self.views) if view.sample == sample]
            figures, left = [], [self._notes(run, mine) for run in self.runs]
            for run, own in zip(self.runs, left, strict=True):
                figures.append(self._figure(run, sample, mine, len(notes), len(panels)))
                notes.append(own)
                for i in mine:
                    at = _maps(run.mask(self.views[i]), self.views[i].grid, maps)
                    panels.append({"picture": i, "shape": self.views[i].grid, "at": at})
            sections.append(self._section(sample, question, figures, left))
        data = {
            "merges": False, "pictures": [pages.picture(view.pixels) for view in self.views], "maps": maps,
            "panels": panels, "notes": notes,
        }  # fmt: skip
        # Where most is to be seen: what the last layer is left with.
        axis = Axis(self.stage_axis, labels, self.depth)
        return Page(self.intro(), (axis,), "", "\n".join(sections), data, "map")

    def intro(self) -> tuple[str, ...]:
        """Paragraphs above the pictures of the page."""
        return (
            f"{self.family}: {self.depth} decoder layers. Layers are numbered from 1.",
            "Tokens that a layer does not see any more are dark and struck through; one that was merged into another "
            f"counts as gone. {HANDLING}",
        )

    def stage(self, number: int, *, full: bool = False) -> str:
        """The name of a stage: 0 is the picture, ``i`` the decoder layer ``i``, from 1; with ``full``, of how many."""
        if number == 0:
            return "the picture"
        return f"layer {number} of {self.depth}" if full else f"layer {number}"

    def gone(self, number: int) -> tuple[str, str]:
        """Meanings of a token that is not there at a stage: where it was not in stage 1 either, and where it was."""
        return "left before the language model", f"left inside it, up to layer {number}"

    @property
    def frames(self) -> int:
        """Frames of the longest clip among the views; 0: there is none."""
        return max((view.frame for view in self.views), default=0)

    def changes(self) -> list[int]:
        """Stages at which something has left in any run: 0 is the picture, ``i`` the decoder layer ``i``, from 1."""
        found = [0]
        for stage in range(1, self.depth + 1):
            if any(not torch.equal(run.held[stage], run.held[stage - 1]) for run in self.runs):
                found.append(stage)
        return found

    def figure(self, stages: Sequence[int] | None = None) -> Any:
        """One row for each picture and setting, one column for the picture and for each stage; of a clip of more than
        two frames the :meth:`sheet`, unless ``stages`` are given.

        Args:
            stages: numbers of decoder layers, from 1; 0 is the untouched picture. None: up to five of :meth:`changes`.

        Raises:
            ValueError: there is no such layer.
            ImportError: matplotlib is not installed.
        """
        from tokred.analysis.viz.printed import draw_visual

        if stages is None and self.frames > 2:
            return self.sheet()
        shown = evenly(self.changes(), 5) if stages is None else list(stages)
        if not shown or min(shown) < 0 or max(shown) > self.depth:
            raise ValueError(f"stages must lie in 0..{self.depth} (0 is the picture, then layers from 1), got {shown}")
        return draw_visual(self, shown)

    def sheet(self, stage: int | None = None, *, columns: int = 8) -> Any:
        """A contact sheet: the frames side by side, below them for each setting the tokens that stayed of each.

        Tokens that are gone at the stage are dark and struck through where they left before stage 1, and tinted where
        they left later. A prompt with several pictures is laid out in the same way.

        Args:
            stage: of :attr:`VisualRun.held`, from 1: a decoder layer. None: the last one.
            columns: frames at most, evenly spaced, the first and the last among them.

        Raises:
            ValueError: there is no such stage, or ``columns`` is less than 1.
            ImportError: matplotlib is not installed.
        """
        from tokred.analysis.viz.printed import draw_sheet

        shown = self.depth if stage is None else stage
        if not 1 <= shown <= self.depth:
            raise ValueError(f"stage must lie in 1..{self.depth}, got {stage}")
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        return draw_sheet(self, shown, columns)

    def _notes(self, run: VisualRun, mine: Sequence[int]) -> list[str]:
        """How many tokens of some views are left at each stage."""
        left = torch.zeros(self.depth + 1, dtype=torch.long)
        for i in mine:
            left += run.mask(self.views[i]).sum(1)
        return [f"{count} of {left[0]} visual tokens" for count in left.tolist()]

    def _section(self, sample: int, question: str, figures: Sequence[str], left: Sequence[Sequence[str]]) -> str:
        said = self.answers[sample]
        plain = "" if said is None else f'<p class="answer"><b>{self.whole}</b> {html.escape(said)}</p>'
        heads = [self.stage_axis.lower(), *(run.label for run in self.runs)]
        rows = [[self.stage(stage), *(column[stage] for column in left)] for stage in self.changes()]
        return f"""<section aria-label="prompt {sample + 1}">
<p class="asked"><b>Prompt</b> {html.escape(question)}</p>
{plain}
<div class="methods">
{chr(10).join(figures)}
</div>
{table(heads, rows)}
</section>"""

    def _figure(self, run: VisualRun, sample: int, mine: Sequence[int], number: int, panel: int) -> str:
        label = html.escape(run.label)
        views = "\n".join(
            f'<div><canvas data-panel="{panel + j}" tabindex="0" role="application" aria-roledescription="tokens" '
            f'aria-label="{html.escape(self.views[i].name)}, {label}" '
            f'aria-describedby="caption-{number} group-{number}"></canvas>'
            + (f"<p>{html.escape(self.views[i].name)}</p>" if len(mine) > 1 else "")
            + "</div>"
            for j, i in enumerate(mine)
        )
        return f"""<figure data-figure="{number}">
<figcaption id="caption-{number}"><strong>{label}</strong> <span class="count"></span></figcaption>
<div class="views{" one" if len(mine) == 1 else ""}">
{views}
</div>
<p class="group" id="group-{number}" aria-live="polite"></p>
{answered(self.answers[sample], run.answers[sample])}
</figure>"""


def vlm(
    model: Any,
    inputs: dict[str, Any],
    methods: Several,
    *,
    tokenizer: Any = None,
    pixels: Sequence[Any] | None = None,
    tokens: int = 32,
) -> VisualDrawing:
    """Let a model with vision answer under each setting, and note which visual tokens every decoder layer sees.

    Args:
        model: a model of transformers with vision, unpatched; it is so again afterwards.
        inputs: arguments of ``generate``: ``input_ids``, ``attention_mask``, ``pixel_values`` and the like, of one
            prompt or of several. Frames of a clip that come as images are told by :func:`tokred.vlm.clips` around the
            call.
        methods: settings such as ``"divprune budget=64"``, or ``"divprune budget=64 + fastv layer=2"`` for methods
            that act together, method objects, or several of them, side by side.
        tokenizer: of the model, or its processor; without one, texts are shown as numbers.
        pixels: what to draw: an image ``(1 or 3, H, W)`` or a clip ``(T, 3, H, W)`` for each picture in the order of
            the prompts, uint8 or floats in 0..1. None: the inputs, each stretched to its own range.
        tokens: to generate, greedily.

    Raises:
        ValueError: there are no ids, ``tokens`` is less than 1, ``pixels`` are not one a picture, or the model is
            patched already.
        MissingInputError: no method acts before or between the decoder layers.
        NothingRecordedError: the prompts have no pictures.
        UnknownMethodError, TypeError, UnsupportedModelError: as :func:`tokred.apply`.
    """
    if "input_ids" not in inputs:
        raise ValueError(f"inputs must have input_ids, which tell where visual tokens stand; got {', '.join(inputs)}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    chosen = settings(methods)
    for label, several in chosen:
        if not any(method.stage in STAGES for method in several):
            raise MissingInputError(
                f"viz.vlm draws methods of visual tokens (stages 'projector' and 'layer'), and {label!r} acts at stage "
                f"{several[0].stage!r}"
            )
        for method in several:
            adapters.find(model, method.stage).check(method)
    model.eval()
    answers = _answers(model, inputs, tokens, tokenizer)
    runs, views, family = list[VisualRun](), list[View](), ""
    for label, several in chosen:
        with api.applied(model, several):
            part = next(part for part in parts_of(model) if part.method.stage in STAGES)
            family = part.family
            seen = _Seen(part.state)
            said = _answers(model, inputs, tokens, tokenizer)
            seen.done()
            runs.append(VisualRun(label, seen.held, said))
            views = views or views_of(seen.forward, inputs, pixels, seen.core)
    questions = [_text(ids[_asks(ids, inputs, views, i)], tokenizer) for i, ids in enumerate(inputs["input_ids"])]
    return VisualDrawing(family, tuple(questions), answers, tuple(views), tuple(runs))


class _Seen:
    """The first forward of a generation, which reads the prompt.

    Args:
        state: of the patch.
    """

    def __init__(self, state: Any) -> None:
        self.state: VisualSettings = state
        self.forward: Any = None
        self.held = torch.empty(0)
        self.state.watched = self

    def __call__(self, forward: Forward) -> None:
        if self.forward is None:
            self.forward, self.held = forward, held_by_layer(forward)

    def done(self) -> None:
        """Watch no longer.

        Raises:
            NothingRecordedError: there was no prompt with pictures.
        """
        self.state.watched = None
        if self.forward is None or not any(sum(m.counts) for m in self.forward.call.modalities):
            raise NothingRecordedError("the prompts have no visual tokens: give pixel_values beside the ids")

    @property
    def core(self) -> Any:
        """The model with vision around the language model."""
        return self.state.core


@torch.inference_mode()
def _answers(model: Any, inputs: dict[str, Any], tokens: int, tokenizer: Any) -> tuple[str, ...]:
    given = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    settled = model.generation_config
    stop = settled.eos_token_id[0] if isinstance(settled.eos_token_id, list) else settled.eos_token_id
    if settled.pad_token_id is None and stop is not None:
        given.setdefault("pad_token_id", stop)  # transformers would say that it does so
    out = model.generate(**{"do_sample": False, "max_new_tokens": tokens, **given})
    return tuple(_text(ids, tokenizer) for ids in out[:, given["input_ids"].shape[1] :])


def _text(ids: Tensor, tokenizer: Any) -> str:
    if tokenizer is None:
        return " ".join(str(i) for i in ids.tolist())
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def _asks(ids: Tensor, inputs: dict[str, Any], views: Sequence[View], sample: int) -> Tensor:
    """``(N,)`` bool: the tokens of a prompt that are text."""
    mask = words.ATTENTION_MASK.of(inputs)
    text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[sample].bool().clone()
    for view in views:
        if view.sample == sample:
            text[view.columns[view.columns >= 0].to(text.device)] = False
    return text


def _maps(mask: Tensor, grid: tuple[int, int], maps: list[Any]) -> list[int | None]:
    """For each stage the number of its map, of those that are there already and new ones."""
    at: list[int | None] = []
    for stage, row in enumerate(mask):
        if stage and torch.equal(row, mask[stage - 1]):
            at.append(at[-1])
            continue
        maps.append({"grid": list(grid), "kept": "".join("1" if kept else "0" for kept in row.tolist())})
        at.append(len(maps) - 1)
    return at
