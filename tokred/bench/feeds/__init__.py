"""Kinds of runs, a file each, and the rule that chooses one for a model, methods and data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import nn

from tokred.bench.feeds.batches import Batches as Batches
from tokred.bench.feeds.batches import Unreadable as Unreadable
from tokred.bench.feeds.batches import fingerprint as fingerprint
from tokred.bench.feeds.batches import leaves as leaves
from tokred.bench.feeds.feed import LABELS as LABELS
from tokred.bench.feeds.feed import Feed as Feed
from tokred.bench.feeds.feed import Own as Own
from tokred.bench.feeds.forward import Forward
from tokred.bench.feeds.text import Text

Run = str | Callable[[Any, Any], Any]


class Options(NamedTuple):
    """Options of runs: a tokenizer or processor, and the most tokens that are generated."""

    tokenizer: Any = None
    max_new_tokens: int | None = None


RUNS: dict[str, Callable[[Options], Feed]] = {
    "forward": lambda options: Forward(),
    "text": lambda options: Text(),
}


def check(run: Run) -> None:
    """Refuse what is no kind of run.

    Raises:
        ValueError: there is no run of that name.
    """
    if not callable(run) and run not in (*RUNS, "auto"):
        allowed = ", ".join(map(repr, ("auto", *RUNS)))
        raise ValueError(f"run is {run!r}; allowed are {allowed}, or a function of (model, batch)")


def choose(run: Run, model: Any, stages: Collection[str], item: Any, options: Options) -> Feed:
    """The kind of run that is asked for, or that fits.

    Args:
        run: a name, a function, or ``"auto"``.
        model: the unpatched model.
        stages: of the methods that can act on it.
        item: the first one of the data.
        options: of the run.

    Raises:
        ValueError: it cannot be told which run is meant.
    """
    if not isinstance(run, str):
        return Own(run)
    return RUNS[_fitting(model, set(stages), item, options) if run == "auto" else run](options)


def _fitting(model: Any, stages: set[str], item: Any, options: Options) -> str:
    """Name of the run that fits, by the model first, then by the stages and the data."""
    if isinstance(model, nn.Module) and "cache" in stages and not stages - {"cache", "layer"}:
        return "text"
    return "forward"
