"""``tokred.benchmark``: quality, speed and memory of methods on a model in memory, each paired with the unpatched one.

result = tokred.benchmark(model, ["tome r=13", "pitome ratio=0.9"], loader, "top1", out="quality.csv")
print(result)
result.best(loss=0.01)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokred import adapters, api
from tokred.bench import feeds, ranks, results
from tokred.bench import workers as spread
from tokred.bench.engine import Engine
from tokred.bench.entries import Entry, entries
from tokred.bench.feeds import Batches, Feed
from tokred.bench.ready import Better
from tokred.bench.scoring import Metrics, Scorer, scorers
from tokred.bench.table import Benchmark, Judgement
from tokred.core.folders import check_file
from tokred.core.site import STAGES
from tokred.errors import UnsupportedModelError

STATUS = Path("/proc/self/status")


def benchmark(
    model: Any,
    methods: Any,
    data: Any,
    metric: Metrics | None = None,
    *,
    run: feeds.Run = "auto",
    read: feeds.Reading | None = None,
    out: str | Path | None = None,
    baselines: bool = True,
    better: Better | Mapping[str, Better] = "higher",
    rounds: int = 5,
    pairs: int | None = None,
    device: torch.device | str | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
    ray: str | None = None,
    workers: int | None = None,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
) -> Benchmark:
    """Measure methods on a model that is in memory; the model is afterwards as it was.

    Every method runs on the same batches as the unpatched model, in the same process, in turns in a random order of the
    two, so that whatever else the machine does meets both.

    Args:
        model: an encoder of timm, transformers or open_clip, or a module that holds one; a language model, a model with
            vision or an encoder-decoder of transformers; a denoiser or a pipeline of diffusers; or a callable that
            holds modules as attributes. Unpatched; it is put into evaluation mode meanwhile.
        methods: settings as they are typed (``"tome r=13"``), method objects, or lists of these that act together. They
            may act at several stages, where one kind of run fits all of them.
        data: an iterable of batches, such as a DataLoader; a function that returns one each time; or a dataset of
            samples. A batch is what the run takes: tensors, ``(inputs, labels)`` or a dict of the forward's arguments;
            token ids ``(B, N)``, or a dict with ``"input_ids"`` and ``"attention_mask"``, padded on the left; a dict of
            ``generate``'s arguments, with ``"answers"``; prompts, or a dict of a pipeline's arguments. It is read once
            before, and once for each row unless it is small.
        metric: ``"top1"``, ``"top5"``, ``"agreement"`` (with the unpatched model's answers; no labels are needed),
            ``"cosine"`` (to its outputs), ``"perplexity"``, or another of :data:`tokred.bench.ready.READY`; a metric
            object of torchmetrics; or a function of ``(output, batch)``, or ``(output, batch, dense)`` with the
            unpatched model's output, that returns a number, or a tensor with one for each sample. Several, as a list,
            or a dict by their names, are taken of one pass: each is a row, and the first is the one to go by. None:
            ``"agreement"``, or ``"perplexity"`` for language models.
        run: how the model runs on a batch: ``"forward"``, ``"text"`` (three quarters of a text are the prompt, the rest
            is scored), ``"generate"``, ``"pipeline"``, or a function of ``(model, batch)`` that returns the output;
            ``"auto"``: by model, methods and data, as :func:`tokred.bench.feeds.fitting` says.
        read: what metrics get in the place of a run's output: ``"features"``, which the model's head is given; the
            output of a module, by its name; or what a function of ``(output, batch)`` returns, which is not timed.
        out: a folder, or a ``.csv`` file, to which each row is added when it is measured. Rows that are there already,
            of the same model, data, metric and device, and of the same code where that is the user's own, are not
            measured again.
        baselines: measure, for each amount of work among the methods, a random choice and down-sampling of each stage
            (for caches: random eviction and a window of the newest tokens) at the same work.
        better: ``"higher"`` or ``"lower"`` values of a metric of one's own; a dict where several differ.
        rounds: times that each pair is at least timed; batches come round again where there are fewer.
        pairs: times that a row is at most timed beside the unpatched model: in other runs its outputs are those of its
            own row, where all of them fit into 16 MiB. None: beside every run of the row.
        device: where to measure; the model goes there and back. None: where it is.
        name: of the model, for the table; None: its configuration's, or its class's.
        seed: of the order, and of the loader's.
        ray: measure rows as tasks of Ray: ``"local"`` on this machine, or the address of a cluster (``"auto"``,
            ``"ray://host:10001"``). A row whose worker is lost is measured again on another one.
        workers: rows that ``ray="local"`` measures at a time; None: two, or one a GPU.
        progress: a bar on a terminal, elsewhere a line a row, on standard error.
        tokenizer: or a processor: turns texts (pictures, sounds) into tensors, and generated ids into texts.
        max_new_tokens: of each answer that is generated; None: as the batch or the model says, or else 32.
        batch_size: of data that yields samples: datasets of torch and Hugging Face (None: 8), or any iterable.

    Returns:
        The table; ``print`` it, or see :class:`~tokred.bench.table.Benchmark`.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is patched, the data are empty or change between
            readings, or the metric returns no number for the unpatched model.
        UnsupportedModelError: the model is of no family that the methods' stages know.
        UnknownMethodError: there is no such method.
        ImportError: what is needed to measure here is not installed.
    """
    began = time.perf_counter()
    held = feeds.modules(model)
    for value, called in ((rounds, "rounds"), (pairs, "pairs"), (max_new_tokens, "max_new_tokens")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{called} must be a whole number of at least 1, got {value!r}")
    feeds.check(run, read)
    wanted = entries(methods)
    target = feeds.target(model, [s for one in wanted for s in one.stages])
    before = api.patched(target)
    if before:
        raise ValueError(f"the model is already patched with {before[0]!r}; call tokred.remove(model) first")
    stages = _stages(target, wanted)
    if metric is not None:
        scorers(metric, None, better)
    path = None if out is None else _path(Path(out))
    _check_memory()
    processes = ranks.count()
    if ray is not None:
        spread.check(workers)
        if processes > 1:
            raise ValueError("ray= spreads rows from one process; here are several: leave out one of both")
    elif workers is not None:
        raise ValueError(f"workers is {workers!r}, but rows are spread by Ray alone: give ray='local' too")
    options = feeds.Options(tokenizer, max_new_tokens, read)
    chosen: list[tuple[Feed, tuple[Scorer, ...]]] = []

    def prepare(item: Any, index: int) -> Any:
        # The first item says how to run, and so whether the metric fits, before the others are read.
        if not chosen:
            feed = feeds.choose(run, model, stages, item, options)
            chosen.append((feed, scorers(feed.usual if metric is None else metric, feed.kind, better)))
        return chosen[0][0].prepare(item, index)

    with prepared(held, device) as place:
        batches = Batches(data, place, prepare, seed, batch_size)
        feed, scores = chosen[0]
        stage = "+".join(stages)
        given = (model, stage, scores, feed, batches, place, rounds, seed, name or name_of(model), path, pairs)
        engine = _engine(processes, ray, workers, given)
        try:
            with feed.around(model), _without_old():
                rows = engine.rows(wanted, baselines, progress)
        finally:
            engine.close()
    spent = {"whole": time.perf_counter() - began, **engine.spent}
    first, *others = (
        Judgement(score.name, score.better, engine.against[i], {n: found[i] for n, found in engine.samples.items()})
        for i, score in enumerate(scores)
    )
    return Benchmark(
        rows, engine.name, stage, *first[:2], path, first.samples, first.against, feed.name, spent, tuple(others)
    )


def _engine(processes: int, ray: str | None, workers: int | None, given: tuple[Any, ...]) -> Engine:
    """Here alone, one of several processes, or on Ray."""
    if ray is not None:
        return spread.RayEngine(ray, workers, *given)
    return ranks.RankEngine(*given) if processes > 1 else Engine(*given)


def _stages(target: Any, wanted: Sequence[Entry]) -> list[str]:
    """The stages of the methods at which the model can be patched, in their order.

    Raises:
        UnsupportedModelError, MissingInputError: there is none.
    """
    found: list[str] = []
    refusal: UnsupportedModelError | None = None
    for stage in STAGES:
        if not any(stage in one.stages for one in wanted):
            continue
        try:
            adapters.find(target, stage)
        except UnsupportedModelError as error:
            refusal = refusal or error
        else:
            found.append(stage)
    if not found:
        adapters.find_for(target, wanted[0].methods[0])  # it says best what the model offers instead
        assert refusal is not None
        raise refusal
    return found


def _path(out: Path) -> Path:
    """The table's file; one that is there already has to be a table."""
    if out.suffix != ".csv":
        if out.is_file():
            raise ValueError(f"out is {out}, which is a file, and no .csv: give a folder or a .csv file")
        out = out / "benchmark.csv"
    check_file(out)
    results.read(out)
    return out


def _check_memory() -> None:
    """Peak memory is read from the system, or by psutil where it has no /proc."""
    if STATUS.exists():
        return
    try:
        import psutil  # noqa: F401
    except ImportError as error:
        raise ImportError("benchmark needs psutil to measure memory here: pip install 'tokred[bench]'") from error


def name_of(model: Any) -> str:
    """The model's name by its configuration, or else its class."""
    config = getattr(model, "config", None)
    names = [getattr(config, "name_or_path", ""), getattr(config, "_name_or_path", "")]
    names.append((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    return next((str(found) for found in names if found), type(model).__name__)


@contextmanager
def _without_old() -> Iterator[None]:
    """Garbage is looked for among what is made from now on: each row begins with a search."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def prepared(held: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[torch.device]:
    """Modules in evaluation mode on a device; modes and device are put back, whatever happens."""
    found = [p.device for one in held for p in one.parameters()]
    home = next(iter(found), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    if place != home and len(set(found)) > 1:
        raise ValueError(f"device is {place}, but the model's parts lie on {', '.join(sorted(map(str, set(found))))}")
    modes = {module: module.training for one in held for module in one.modules()}
    try:
        for one in held:
            one.eval()
            if place != home:
                one.to(place)
        yield place
    finally:
        for one in held:
            if place != home:
                one.to(home)
        for module, training in modes.items():
            module.training = training
