"""All that a search asks of the benchmark's engine: how a model runs on a batch, what a metric makes of it, and times.

The user's samples are divided here, by a seed: some are searched on, the others are held out until the end.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import adapters, api
from tokred.bench import feeds, timing
from tokred.bench.read import answer, groups, samples
from tokred.bench.ready import Better
from tokred.bench.scoring import Metric, scorer
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

PIECES = 8  # parts of the samples that are searched on, between which a bad setting can be given up
LEAST = 16  # samples, of which half are held out
COARSE = ("top1", "top5", "agreement")
HELD = 2**30  # bytes of the unpatched model's outputs that are kept


class Judged(NamedTuple):
    """One piece of data under one setting, sample by sample.

    Attributes:
        guide: what the search goes by, lower is better.
        values: of the user's metric.
        weights: of the values.
    """

    guide: list[float]
    values: list[float]
    weights: list[float]


def stage_of(model: Any, stages: Sequence[str]) -> str:
    """The first of some stages at which tokred knows the model.

    Raises:
        UnsupportedModelError: it knows it at none.
    """
    refusal: UnsupportedModelError | None = None
    for stage in stages:
        try:
            adapters.find(feeds.target(model, [stage]), stage)
        except UnsupportedModelError as error:
            refusal = refusal or error
        else:
            return stage
    assert refusal is not None  # there is at least one stage
    raise refusal


def cut(batch: Any, rows: Sequence[int]) -> Any:
    """Some samples of a batch: rows of every tensor, and of every list, that has as many as the batch."""
    n = samples(batch)

    def some(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[torch.as_tensor(rows)] if value.ndim and len(value) == n else value
        if isinstance(value, list) and len(value) == n and not any(isinstance(v, Tensor) for v in value):
            return [value[i] for i in rows]
        return value

    if isinstance(batch, Mapping):
        return {name: some(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(some(value) for value in batch)
    return some(batch)


class Engine:
    """A model, the user's data and metric: runs, judgements and times.

    Args:
        model: in evaluation mode, on ``device``, unpatched: a module, a pipeline, or a callable that holds modules.
        stage: at which methods act.
        data: an iterable of batches, as for :func:`tokred.benchmark`.
        metric: name or function; None: what is usual for the kind of run.
        better: direction of a function's values.
        device: where to run.
        count: samples to search on, at most; never more than half.
        seed: of the division.
        run: kind of run, or a function of ``(model, batch)``.
        options: of the run.
        batch_size: of data that yields samples.

    Attributes:
        target: the module that methods are applied to.
        pieces, held: batches that are searched on, and those that are held out.
        timed: the batch that is timed.
        feed, score: the kind of run, and the metric.

    Raises:
        TypeError, ValueError: there are too few samples, or the metric or the run does not fit.
    """

    def __init__(
        self,
        model: Any,
        stage: str,
        data: Any,
        metric: Metric | None,
        device: torch.device,
        *,
        better: Better = "higher",
        count: int = 400,
        seed: int = 0,
        run: feeds.Run = "auto",
        options: feeds.Options = feeds.Options(),  # noqa: B008 - a tuple
        batch_size: int | None = None,
    ) -> None:
        self.model, self.stage, self.device, self.seed = model, stage, device, seed
        self.target: Any = feeds.target(model, [stage])
        chosen: list[feeds.Feed] = []

        def prepare(item: Any, index: int) -> Any:
            if not chosen:
                chosen.append(feeds.choose(run, model, [stage], item, options))
                # A metric that does not fit is found before the rest of the data is read.
                self.score = scorer(chosen[0].usual if metric is None else metric, chosen[0].name, better)
            return chosen[0].prepare(item, index)

        batches = self._some(feeds.Batches(data, device, prepare, seed, batch_size), 5 * count)
        self.feed = chosen[0]
        self.timed = batches[0]
        self.pieces, self.held = self._divided(batches, count)
        self.prints = feeds.fingerprint(x for batch in batches for x in feeds.leaves(batch))
        self._dense: dict[int, Any] = {}
        self._base: dict[int, Judged] = {}
        self._bytes = 0
        # Whether the metric says right or wrong, no more; the unpatched model's first samples tell.
        self._coarse: bool | None = True if self.score.name in COARSE and self.score.own is None else None

    def _some(self, found: feeds.Batches, count: int) -> list[Any]:
        """Batches with at least ``count`` samples, where there are so many, drawn from all."""
        most = max(1, -(-count // max(1, samples(found.first))))
        chosen = range(found.count)
        if found.count > most:
            chosen = sorted(random.Random(self.seed).sample(chosen, most))  # type: ignore[assignment]
        batches = []
        for index in chosen:
            found.seek(index)
            batches.append(found.batch)
        return batches

    def _divided(self, batches: list[Any], count: int) -> tuple[list[Any], list[Any]]:
        """The pieces that are searched on, and those held out."""
        sizes = [samples(batch) for batch in batches]
        total = sum(sizes)
        if total < LEAST:
            raise ValueError(
                f"data has {total} samples, of which half are held out: tune needs at least {LEAST} to tell settings "
                "apart, and a few hundred to do so well"
            )
        rng, share = random.Random(self.seed + 1), min(0.5, count / total)
        mine: list[Any] = []
        held: list[Any] = []
        keys = [keys_of(batch, n) for batch, n in zip(batches, sizes, strict=True)]
        if any(keys):
            chosen = _some_groups([key for part in keys for key in part], share, rng)
            for batch, part in zip(batches, keys, strict=True):
                for side, wanted in ((mine, True), (held, False)):
                    rows = [i for i, key in enumerate(part) if (key in chosen) is wanted]
                    if rows:
                        side.append(batch if len(rows) == len(part) else cut(batch, rows))
            return mine, held
        if max(sizes) == 1:  # whole batches go to one side
            order = list(range(len(batches)))
            rng.shuffle(order)
            few = max(1, round(share * total))
            return [batches[i] for i in order[:few]], [batches[i] for i in order[few:]]
        for batch, n in zip(batches, sizes, strict=True):
            rows = list(range(n))
            rng.shuffle(rows)
            # Chance decides on the half sample, so that many small batches are not all rounded the same way.
            few = min(n, int(share * n + rng.random()))
            if few:
                mine.append(cut(batch, sorted(rows[:few])))
            if few < n:
                held.append(cut(batch, sorted(rows[few:])))
        while len(mine) < PIECES and max(map(samples, mine)) > 1:
            mine = [part for piece in mine for part in _halves(piece)]
        return mine, held

    # ------------------------------------------------------------------ runs

    def run(self, batch: Any) -> Any:
        """The output of the model, in whatever state it is, on a batch."""
        return self.feed.run(self.model, batch)

    def report(self, method: Method, batch: Any) -> Any:
        """The report of a method after the least run that tells what it keeps."""
        with torch.inference_mode(), quiet(), api.applied(self.target, method):
            self.feed.probe(self.model, batch)
            return api.report(self.target)

    def base(self, piece: Any) -> Judged:
        """The unpatched model on a piece."""
        key = id(piece)
        if key not in self._base:
            with torch.inference_mode():
                output = self.feed.finish(self.model, self.run(piece), piece)
                values, weights = self.score(output, piece, output)
            self._dense[key] = self._kept(output)
            self._base[key] = Judged(self._guided(output, self._dense[key], values), values, weights)
        return self._base[key]

    def _kept(self, output: Any) -> Any:
        """The part of an unpatched output that others are compared with: its tensor, or else all of it."""
        if self.score.log or self.score.whole:
            return output if self.score.whole else None
        try:
            found = answer(output)
        except TypeError:
            return output
        self._bytes += found.nbytes
        if self._bytes > HELD:
            raise ValueError(
                f"the unpatched model's outputs, which others are compared with, take more than {HELD >> 30} GiB: give "
                "fewer samples, or a metric that needs none, such as 'perplexity'"
            )
        return found

    def judge(self, method: Method, pieces: Sequence[Any]) -> list[Judged]:
        """Each of some pieces under a method.

        Raises:
            Exception: whatever the method, or the model with it, refuses by.
        """
        bases = [self.base(piece) for piece in pieces]
        found = []
        with torch.inference_mode(), quiet(), api.applied(self.target, method):
            for piece, base in zip(pieces, bases, strict=True):
                output = self.feed.finish(self.model, self.run(piece), piece)
                dense = self._dense[id(piece)]
                values, weights = self.score(output, piece, dense)
                if len(values) != len(base.values):
                    raise ValueError(
                        f"metric returned {len(values)} values, and {len(base.values)} for the unpatched model"
                    )
                found.append(Judged(self._guided(output, dense, values), values, weights))
        return found

    def _guided(self, output: Any, dense: Tensor | None, values: list[float]) -> list[float]:
        """Losses of the samples that tell settings apart on few of them.

        Right or wrong says little about a sample; how far its output has moved says more: the divergence of the
        classes' probabilities from the unpatched model's, or the angle to its output.
        """
        sign = 1.0 if self.score.better == "lower" else -1.0
        if self._coarse is None:
            self._coarse = all(v in (0.0, 1.0) for v in values)
        if not self._coarse or not isinstance(dense, Tensor):
            return [sign * v for v in values]
        x = answer(output)
        if x.shape != dense.shape or x.ndim < 2 or len(x) != len(values):
            return [sign * v for v in values]
        if x.ndim == 2 and self.score.name in COARSE:
            log, target = x.float().log_softmax(-1), dense.float().log_softmax(-1)
            return F.kl_div(log, target, reduction="none", log_target=True).sum(-1).double().tolist()
        cosine = F.cosine_similarity(x.float().flatten(1), dense.float().flatten(1), dim=-1)
        return (1 - cosine).double().tolist()

    def times(self, methods: Sequence[Method], rounds: int, seed: int = 0) -> list[list[float]]:
        """Seconds ``[1 + method][round]`` of the unpatched model and of some methods, in turns on one batch."""
        arms: list[timing.Enter] = [partial(nullcontext, self.model)]
        arms += [partial(api.applied, self.target, method) for method in methods]
        with quiet():
            return timing.paired(arms, lambda _: self.run(self.timed), rounds, device=self.device, seed=seed)


def keys_of(batch: Any, count: int) -> list[str]:
    """The group of each of ``count`` samples of a batch; empty where the batch names none.

    Raises:
        ValueError: there are neither as many keys as samples, nor one key for all.
    """
    try:
        return groups(batch, 1) * count
    except ValueError:
        return groups(batch, count)


def _some_groups(keys: Sequence[str], share: float, rng: random.Random) -> set[str]:
    """Groups of about a share of the samples, at least one, and never all: a group stays on one side.

    Raises:
        ValueError: all samples are of one group.
    """
    every = sorted(set(keys))
    if len(every) < 2:
        raise ValueError(f"all samples are of one group, {every[0]!r}: nothing can be held out")
    rng.shuffle(every)
    chosen = {every.pop()}
    while len(every) > 1 and sum(key in chosen for key in keys) < share * len(keys):
        chosen.add(every.pop())
    return chosen


def _halves(piece: Any) -> list[Any]:
    n = samples(piece)
    return [piece] if n < 2 else [cut(piece, range(n // 2)), cut(piece, range(n // 2, n))]


def quiet() -> warnings.catch_warnings[None]:
    """Without the warning that a setting removes nothing, which in a search is no mistake."""
    found: warnings.catch_warnings[None] = warnings.catch_warnings(action="ignore", category=NothingRemovedWarning)
    return found
