"""Kinds of runs, a file each, and the rule that chooses one for a model, methods and data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from tokred.adapters.contract import words
from tokred.bench.feeds import read as reads
from tokred.bench.feeds.batches import Batches as Batches
from tokred.bench.feeds.batches import Unreadable as Unreadable
from tokred.bench.feeds.batches import fingerprint as fingerprint
from tokred.bench.feeds.batches import leaves as leaves
from tokred.bench.feeds.feed import Feed as Feed
from tokred.bench.feeds.feed import Own as Own
from tokred.bench.feeds.forward import Forward
from tokred.bench.feeds.generate import Generate
from tokred.bench.feeds.held import modules as modules
from tokred.bench.feeds.held import target as target
from tokred.bench.feeds.pipeline import Pipeline
from tokred.bench.feeds.read import Reading as Reading
from tokred.bench.feeds.text import Text

Run = str | Callable[[Any, Any], Any]


class Options(NamedTuple):
    """Options of runs: a tokenizer or processor, the most tokens that are generated, and what metrics read."""

    tokenizer: Any = None
    max_new_tokens: int | None = None
    read: Reading | None = None


# ``RUNS[name](model, options)``.
RUNS: dict[str, Callable[[Any, Options], Feed]] = {
    "forward": lambda model, options: Forward(_last(model)),
    "text": lambda model, options: Text(options.tokenizer),
    "generate": lambda model, options: Generate(
        options.tokenizer, options.max_new_tokens, getattr(model, "main_input_name", "input_ids")
    ),
    "pipeline": lambda model, options: Pipeline(model),
}


def _last(model: Any) -> dict[str, Any]:
    """Arguments by which a model that generates answers with the logits behind its prompt alone, ``(B, 1, V)``: where
    tokens of the prompt have left, those of the others are no longer the same places'."""
    if not hasattr(model, "generate") or words.KEPT_LOGITS.name not in inspect.signature(model.forward).parameters:
        return {}
    return {words.KEPT_LOGITS.name: 1}


def check(run: Run, read: Any = None) -> None:
    """Refuse what is no kind of run, or nothing that can be read of one.

    Raises:
        ValueError: there is no run of that name.
        TypeError: ``read`` is no name and no function.
    """
    reads.check(read)
    if not callable(run) and run not in (*RUNS, "auto"):
        allowed = ", ".join(map(repr, ("auto", *RUNS)))
        raise ValueError(f"run is {run!r}; allowed are {allowed}, or a function of (model, batch)")


def choose(run: Run, model: Any, stages: Collection[str], item: Any, options: Options) -> Feed:
    """The kind of run that is asked for, or that fits.

    Args:
        run: a name, a function, or ``"auto"``: by the rule of :func:`fitting`.
        model: the unpatched model.
        stages: of the methods that can act on it.
        item: the first one of the data.
        options: of the run.

    Raises:
        ValueError: the model cannot do such a run, it cannot be told which one is meant, or what is to be read of it is
            not there.
    """
    feed = _chosen(run, model, stages, item, options)
    return feed if options.read is None else reads.Read(feed, options.read, model)


def _chosen(run: Run, model: Any, stages: Collection[str], item: Any, options: Options) -> Feed:
    if not isinstance(run, str):
        return Own(run)
    name = fitting(model, set(stages), item, options) if run == "auto" else run
    if name == "generate" and not hasattr(model, "generate"):
        raise ValueError(f"run='generate' is for models that have generate(), and {type(model).__name__} has none")
    return RUNS[name](model, options)


def fitting(model: Any, stages: set[str], item: Any, options: Options) -> str:
    """Name of the run that fits; the first of these that applies:

    1. A pipeline, or another callable that is no module: ``"pipeline"``.
    2. A model without ``generate``: ``"text"`` for policies of the cache, else ``"forward"``.
    3. Answers are asked for, by ``max_new_tokens`` or by ``"answers"`` or ``"prompt"`` in the data: ``"generate"``.
    4. Encoder and decoder in one model, and no decoder's ids in the data: ``"generate"``.
    5. Methods of blocks alone: ``"forward"``.
    6. Policies of the cache, or of layers beside them, and no pictures in the data: ``"text"``.
    7. Policies of the cache: ``"generate"``; nothing else reads a cache.
    8. Methods of visual tokens: ``"generate"`` where there is a tokenizer, which is there for texts.

    Raises:
        ValueError: none does.
    """
    if not isinstance(model, nn.Module):
        return "pipeline"
    if not hasattr(model, "generate"):
        return "text" if "cache" in stages else "forward"
    fields = set(item) if isinstance(item, Mapping) else set()
    if options.max_new_tokens is not None or fields & {"answers", "prompt", "prompts", "max_new_tokens"}:
        return "generate"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "forward" if "decoder_input_ids" in fields else "generate"
    if not stages - {"block"}:
        return "forward"
    pictures = "input_ids" in fields and any("pixel" in name or "image" in name for name in fields)
    if "cache" in stages and not pictures and not stages - {"cache", "layer"}:
        return "text"
    if "cache" in stages or options.tokenizer is not None:
        return "generate"
    raise ValueError(
        "run='auto' cannot tell whether answers are to be written or prompts to be read alone: give run='generate' "
        "(and max_new_tokens, tokenizer) or run='forward'"
    )
