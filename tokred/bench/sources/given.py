"""Data by name for a model: which reader a name belongs to, and what the user wishes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokred.bench.sources import clips, made, pictures, prompts, questions, sounds, texts
from tokred.bench.sources.record import Data, Source


@dataclass(frozen=True)
class Wanted:
    """Wishes about data.

    Attributes:
        count: at most so many images, windows of text, questions, recordings or prompts; None: by the kind.
        batch: of a forward; None: by the kind.
        length: tokens of a window of text.
        workers: processes that read images.
        seed: of the choice, of noise and of pipelines.
        prompts: for pipelines, beside or instead of a file.
        steps: of denoising; None: the pipeline's own.
        size: height and width of generated images; None: the pipeline's own.
    """

    count: int | None = None
    batch: int | None = None
    length: int = 1024
    workers: int = 0
    seed: int = 0
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    size: int | None = None


READERS = {
    "encoder": pictures.data,
    "dual encoder": pictures.data,
    "text encoder": texts.lines,
    "language model": texts.windows,
    "vision-language model": questions.data,
    "speech": sounds.speech,
    "audio encoder": sounds.encoder,
    "video encoder": clips.data,
    "denoiser": prompts.noise,
    "pipeline": prompts.data,
}


def data(source: Source, spec: str | None = None, wanted: Wanted | None = None) -> Data:
    """Data for a model, by name.

    Args:
        source: the model.
        spec: a folder, a file, ``hfds:NAME[:CONFIG][:SPLIT]``, ``noise``, or ``module:function`` (``file.py:function``)
            that returns an iterable of batches; None: what the model brings along.
        wanted: wishes about it.

    Raises:
        FileNotFoundError, ValueError, NoModelError, ImportError: there is no such data, it does not fit the model, or
            what reads it is not installed; the message says what to do.
    """
    wanted = wanted or Wanted()
    if wanted.prompts and source.kind != "pipeline":
        raise ValueError(f"--prompt is for pipelines, and {source.name} is of kind {source.kind}")
    if spec is not None and ":" in spec and not spec.startswith("hfds:") and not Path(spec).exists():
        return _own(source, spec)
    return READERS[source.kind](source, spec, wanted)


def _own(source: Source, spec: str) -> Data:
    """Batches that the user's own function yields."""
    batches = made.call(spec)
    if isinstance(batches, str | bytes | Mapping) or not hasattr(batches, "__iter__"):
        raise ValueError(f"--data {spec} has to return an iterable of batches, and returns {type(batches).__name__}")
    if iter(batches) is batches:
        found = made.target(spec)
        batches = _Again(found) if callable(found) else list(batches)
    first = next(iter(batches), None)
    labelled = _labelled(first)
    metric = source.usual.metric if labelled else source.usual.bare
    if metric == "agreement" and not source.classes:
        metric = "cosine"
    options = {"tokenizer": source.processor or source.tokenizer} if source.usual.run == "generate" else {}
    return Data(batches, spec, metric, source.usual.run, source.model, labelled, options=options)


class _Again:
    """A generator function as an iterable that can be read again."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __iter__(self) -> Any:
        return iter(self.function())


def _labelled(batch: Any) -> bool:
    """True if a batch has right answers."""
    if isinstance(batch, Mapping):
        return any(name in batch for name in ("labels", "label", "answers", "answer"))
    return isinstance(batch, tuple | list) and len(batch) > 1
