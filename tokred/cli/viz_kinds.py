"""Drawings of ``tokred viz`` for models that are no encoders: what each kind is given, and how it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokred.analysis.viz.drawing import Drawing
    from tokred.bench.sources import Source

IMAGES, FRAMES = 4, 8  # at most, where nothing is said
BUDGET = (0.25,)  # of a cache: what a policy that is named alone is set to


@dataclass(frozen=True)
class Given:
    """Options of the command line that say what a model is run on.

    Attributes:
        images: files.
        prompt: of a pipeline, or the question.
        text: file of a text for a language model.
        length: tokens of that text, at most.
        tokens: to generate.
        steps: of a pipeline.
        size: of its images.
        count: images of a folder, or frames of a clip, at most; None: 4, and 8.
        clip: folder of frames, or an animated picture.
        stream: whether its frames come one by one.
    """

    images: Sequence[Path] = ()
    prompt: str | None = None
    text: Path | None = None
    length: int = 600
    tokens: int = 32
    steps: int | None = None
    size: int | None = None
    count: int | None = None
    clip: Path | None = None
    stream: bool = False


def draw(source: Source, typed: Sequence[Sequence[str]], given: Given) -> Drawing:
    """The drawing of a model that is no encoder of images.

    Args:
        source: the model.
        typed: methods, each the list of those that act together; empty: the one that is most usual.
        given: what it is run on.

    Raises:
        NoModelError: models of its kind are not drawn.
        ValueError, FileNotFoundError, ...: something that it needs is missing or does not fit.
    """
    from tokred.bench.sources import NoModelError

    drawers: dict[str, Callable[[Any, list[str], Given], Drawing]] = {
        "language model": _text,
        "vision-language model": _pictures,
        "denoiser": _denoiser,
        "pipeline": _pipeline,
    }
    if source.kind not in drawers:
        raise NoModelError(
            f"{source.name} is of kind {source.kind}, and viz draws encoders of images, {', '.join(drawers)}s"
        )
    check_clip(source.kind, given.clip, given.stream)
    return drawers[source.kind](source, chosen(source, typed), given)


def check_clip(kind: str, clip: Path | None, stream: bool) -> None:
    """Refuse a clip that the model cannot watch.

    Raises:
        ValueError: it is no model of images and text, or a stream has no clip.
    """
    if clip is not None and kind != "vision-language model":
        raise ValueError(f"--clip is for models of images and text, and this is a model of kind {kind}")
    if stream and clip is None:
        raise ValueError("--stream watches a clip frame by frame: give --clip FOLDER_OR_ANIMATED_PICTURE")


def chosen(source: Source, typed: Sequence[Sequence[str]]) -> list[str]:
    """Settings as text; a method that is named alone gets an amount.

    Raises:
        UnknownMethodError, ValueError: a method does not exist.
    """
    from tokred.bench.sources import amounts
    from tokred.core.settings import parse_setting

    found = []
    for parts in typed or [[source.usual.methods[0]]]:
        bare = len(parts) == 1 and not parse_setting(parts[0])[1]
        found.append(amounts.spread(source, parts[0], BUDGET)[0] if bare else " + ".join(parts))
    return list(dict.fromkeys(found))


def _text(source: Source, methods: list[str], given: Given) -> Drawing:
    from tokred.analysis import viz
    from tokred.bench.sources import texts

    if given.text is None and given.prompt is None:
        raise ValueError(f"{source.name} reads texts: give --text FILE, --prompt TEXT, or both, the text first")
    tokenizer = texts.needed(source)
    parts = [] if given.text is None else [_cut(_read(given.text), tokenizer, given.length)]
    prompt = "\n\n".join([*parts, *([] if given.prompt is None else [given.prompt])])
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # the template has them already
        return viz.cache(source.model, ids, methods, tokenizer=tokenizer, tokens=given.tokens)
    return viz.cache(source.model, prompt, methods, tokenizer=tokenizer, tokens=given.tokens)


def _pictures(source: Source, methods: list[str], given: Given) -> Drawing:
    from tokred.analysis import viz
    from tokred.bench import images as photos
    from tokred.bench.sources import pictures, questions

    if not (given.images or given.clip) or given.prompt is None:
        raise ValueError(
            f"{source.name} answers questions about pictures: give --image FILE and --prompt TEXT, or --clip FOLDER"
        )
    if source.processor is None:
        raise ValueError(
            f"{source.name} came without a processor: save one beside the weights, or let the function that makes the "
            "model return (model, processor)"
        )
    if given.clip is not None:
        return _clip(source, methods, given, given.prompt)
    files = [file for file, _ in photos.gather(given.images, given.count or IMAGES)]
    opened = [pictures.picture(file) for file in files]
    # What is drawn are the model's inputs: processors crop and stretch, and tokens stand for what is left.
    batch = questions.asked(source, opened, [given.prompt] * len(opened))
    return viz.vlm(
        source.model,
        batch,
        methods,
        tokenizer=source.tokenizer or source.processor,
        tokens=given.tokens,
    )


def _clip(source: Source, methods: list[str], given: Given, prompt: str) -> Drawing:
    """One clip: its frames side by side, in one prompt or one by one."""
    from tokred.analysis import viz
    from tokred.bench import images as photos
    from tokred.bench.sources import questions
    from tokred.vlm import clips

    if given.images:
        raise ValueError("give --image or --clip: a clip is one prompt")
    assert given.clip is not None  # the caller has seen it
    frames = photos.clip(given.clip, given.count or FRAMES)
    batch, images = questions.asked_of_clip(source, frames, prompt)
    tokenizer = getattr(source.processor, "tokenizer", None) or source.tokenizer or source.processor
    if given.stream:
        apart = viz.watched.taken_apart(source.module, batch)
        return viz.stream(
            source.module, apart.frames, methods, prompt=apart.prompt, question=apart.question, tokenizer=tokenizer,
            tokens=given.tokens,
        )  # fmt: skip
    with clips([[len(frames)]]) if images else contextlib.nullcontext():
        return viz.vlm(source.model, batch, methods, tokenizer=tokenizer, tokens=given.tokens)


def _denoiser(source: Source, methods: list[str], given: Given) -> Drawing:
    from tokred.analysis import viz
    from tokred.bench.sources import Wanted, prompts

    batch = next(iter(prompts.noise(source, None, Wanted(count=1, size=given.size)).batches))
    return viz.denoiser(source.model, batch, methods)


def _pipeline(source: Source, methods: list[str], given: Given) -> Drawing:
    from tokred.analysis import viz
    from tokred.bench.sources import Wanted, prompts

    words = () if given.prompt is None else (given.prompt,)
    wanted = Wanted(count=1, prompts=words, steps=given.steps, size=given.size)
    batch = dict(next(iter(prompts.data(source, None, wanted).batches)))
    (seed,) = batch.pop("seeds")
    return viz.denoiser(source.model, batch, methods, seed=seed)


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--text {path} is no file")
    text = path.read_text("utf8", errors="replace").strip()
    if not text:
        raise ValueError(f"--text {path} is empty")
    return text


def _cut(text: str, tokenizer: Any, length: int) -> str:
    """The first tokens of a text, as text again."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= length else str(tokenizer.decode(ids[:length]))
