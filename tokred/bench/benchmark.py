"""``tokred.benchmark``: quality, speed and memory of methods on a model in memory, each paired with the unpatched one.

result = tokred.benchmark(model, ["tome r=13", "pitome ratio=0.9"], loader, "top1", out="quality.csv")
print(result)
result.best(loss=0.01)
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokred import adapters, api
from tokred.bench import results, samples, timing
from tokred.bench.arms import BASE
from tokred.bench.entries import Cost, Entry, entries, of_equal_work, work
from tokred.bench.feeding import FEEDS, Batches, Feed, Unreadable, fingerprint
from tokred.bench.scoring import Better, Metric, Scorer, Tally, scorer
from tokred.bench.table import COLUMNS, Benchmark
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

SCENARIO = "benchmark"
STATUS = Path("/proc/self/status")
USUAL = {"block": "agreement", "cache": "perplexity"}
# Columns that bear the names of a record's fields.
MEASURED = (
    "difference", "difference_low", "difference_high", "speedup", "speedup_low", "speedup_high", "seconds", "peak_mib",
    "tokens_in", "tokens_out", "bytes", "dense_bytes",
)  # fmt: skip


def benchmark(
    model: nn.Module,
    methods: Any,
    data: Any,
    metric: Metric | None = None,
    *,
    out: str | Path | None = None,
    baselines: bool = True,
    better: Better = "higher",
    rounds: int = 5,
    device: torch.device | str | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Benchmark:
    """Measure methods on a model that is in memory; the model is afterwards as it was.

    Every method runs on the same batches as the unpatched model, in the same process, batch by batch in a random order
    of the two, so that whatever else the machine does meets both. Encoders run one forward a batch. Language models,
    for policies of the cache, read three quarters of each text as a prompt and are scored on the rest.

    Args:
        model: an encoder of timm, transformers or open_clip, or a module that holds one; or a language model of
            transformers. Unpatched; it is put into evaluation mode meanwhile.
        methods: settings as they are typed (``"tome r=13"``), method objects, or lists of these that act together.
        data: an iterable of batches, such as a DataLoader: tensors, ``(inputs, labels)``, or dicts of the forward's
            arguments, with ``"labels"``. For language models token ids ``(B, N)``, or dicts with ``"input_ids"`` and
            ``"attention_mask"``, padded on the left. It is read once before, and once for each row unless it is small.
        metric: ``"top1"``, ``"top5"``, ``"agreement"`` (with the unpatched model's answers; no labels are needed),
            ``"cosine"`` (to its outputs), ``"perplexity"``, or a function of ``(output, batch)`` that returns a number,
            or a tensor with one for each sample. None: ``"agreement"``, or ``"perplexity"`` for language models.
        out: a folder, or a ``.csv`` file, to which each row is added when it is measured. Rows that are there already,
            of the same model, data, metric and device, are not measured again.
        baselines: measure, for each amount of work among the methods, a random choice and down-sampling (for caches:
            random eviction and a window of the newest tokens) at the same work.
        better: ``"higher"`` or ``"lower"`` values of a metric of one's own.
        rounds: times that each pair is at least timed; batches come round again where there are fewer.
        device: where to measure; the model goes there and back. None: where it is.
        name: of the model, for the table; None: its configuration's, or its class's.
        seed: of the order, and of the loader's.
        progress: a bar on a terminal, elsewhere a line a row, on standard error.

    Returns:
        The table; ``print`` it, or see :class:`~tokred.bench.table.Benchmark`.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is patched, the data are empty or change between
            readings, or the metric returns no number for the unpatched model.
        UnsupportedModelError: the model is of no family that the methods' stages know.
        UnknownMethodError: there is no such method.
        ImportError: what is needed to measure here is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {rounds!r}")
    before = api.patched(model)
    if before:
        raise ValueError(f"the model is already patched with {before[0]!r}; call tokred.remove(model) first")
    wanted = entries(methods)
    stage = _stage(model, wanted)
    score = scorer(USUAL[stage] if metric is None else metric, stage, better)
    path = None if out is None else _path(Path(out))
    _check_memory()
    with _as_it_was(model, device) as place:
        feed = FEEDS[stage]()
        batches = Batches(data, place, feed.prepare, seed)
        run = _Run(model, stage, score, feed, batches, place, rounds, seed, name or _name(model), path)
        rows = run.rows(wanted, baselines, progress)
    return Benchmark(rows, run.name, stage, score.name, score.better, path, run.samples, run.against)


def _stage(model: nn.Module, wanted: Sequence[Entry]) -> str:
    """The stage of the methods at which the model is one that tokred knows."""
    stages = [s for s in FEEDS if any(s in one.stages for one in wanted)]
    if not stages:
        named = {s for one in wanted for s in one.stages}
        raise ValueError(f"methods act at {', '.join(sorted(named))}; benchmark measures those at {', '.join(FEEDS)}")
    refusal: UnsupportedModelError | None = None
    for stage in stages:
        try:
            adapters.find(model, stage)
        except UnsupportedModelError as error:
            refusal = refusal or error
        else:
            return stage
    assert refusal is not None
    raise refusal


def _path(out: Path) -> Path:
    """The table's file; one that is there already has to be a table."""
    if out.suffix != ".csv":
        if out.is_file():
            raise ValueError(f"out is {out}, which is a file, and no .csv: give a folder or a .csv file")
        out = out / "benchmark.csv"
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


def _name(model: nn.Module) -> str:
    """The model's name by its configuration, or else its class."""
    config = getattr(model, "config", None)
    found = getattr(config, "name_or_path", "") or getattr(model, "pretrained_cfg", {}).get("architecture", "")
    return str(found or type(model).__name__)


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in evaluation mode on a device; mode and device are put back, whatever happens."""
    homes = {p.device for p in model.parameters()}
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    if place != home and len(homes) > 1:
        raise ValueError(f"device is {place}, but the model's parts lie on {', '.join(sorted(map(str, homes)))}")
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        if place != home:
            model.to(place)
        yield place
    finally:
        if place != home:
            model.to(home)
        for module, training in modes.items():
            module.training = training


class _Run:
    """One benchmark: what all rows share."""

    def __init__(
        self,
        model: nn.Module,
        stage: str,
        score: Scorer,
        feed: Feed,
        batches: Batches,
        device: torch.device,
        rounds: int,
        seed: int,
        name: str,
        path: Path | None,
    ) -> None:
        self.model, self.stage, self.score, self.feed, self.batches = model, stage, score, feed, batches
        self.device, self.seed, self.name, self.path = device, seed, name, path
        self.rounds = max(rounds, batches.count)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.where = results.here(device, dtype)
        # Rows of other weights or data, under the same name, are no rows of this table.
        weights = fingerprint([*model.parameters(), *model.buffers()])
        self.head = {"scenario": SCENARIO, "model": name, "stage": stage, "scored_by": score.name}
        self.head["case"] = fingerprint([torch.tensor(bytearray(f"{weights} {batches.prints}".encode()))])
        self.known = self.head | {name: self.where[name] for name in ("device", "threads", "dtype")}
        self.there = {} if path is None else self._there(path)
        self.samples: dict[str, Tally] = {}
        self.stored = {} if path is None else samples.read(samples.beside(path), self.known)
        self.against = ""

    def _there(self, path: Path) -> dict[tuple[str, str], dict[str, Any]]:
        """Records of earlier runs of the same benchmark, by method and setting."""
        known = self.known
        found = results.records(results.read(path), SCENARIO)
        mine = [r for r in found if all(str(r.get(k)) == str(v) for k, v in known.items()) and "speedup" in r]
        return {(r["method"], r["setting"]): r for r in mine}

    def rows(self, wanted: Sequence[Entry], baselines: bool, progress: bool) -> list[dict[str, Any]]:
        """All rows, the unpatched model's first."""
        base = Entry(BASE, "")
        try:
            with torch.inference_mode():
                output = self.feed.run(self.model, self.batches.first)
        except Exception as error:
            error.add_note("tokred: this is the unpatched model on the first batch of data")
            raise
        self.score(output, self.batches.first, output)  # a metric that does not fit is found before any row
        self.against = self.score.against(self.batches.first)
        with _telling(progress, self.score) as (total, tell):
            costs: list[tuple[Entry, Cost]] = []
            refused: dict[str, str] = {}
            for one in wanted:
                try:
                    costs.append((one, self._cost(one)))
                except Exception as error:
                    refused[one.label] = _reason(error)
            more = of_equal_work(self.stage, costs, self._cost_of) if baselines else []
            total(1 + len(wanted) + len(more))
            known = {one.label: cost for one, cost in costs}
            found = [tell(base, self._record(base, _of_all(costs[0][1]) if costs else {}))]
            for one in (*wanted, *more):
                found.append(tell(one, self._tried(one, known.get(one.label), refused.get(one.label))))
        return found

    def _tried(self, one: Entry, cost: Cost | None, why: str | None) -> dict[str, Any]:
        """The record of a row; where the method cannot run, ``{"reason": ...}``."""
        if why is None:
            try:
                return self._record(one, self._cost(one) if cost is None else cost)
            except Unreadable:
                raise
            except Exception as error:
                why = _reason(error)
        return {"reason": why}

    def _record(self, one: Entry, cost: Cost) -> dict[str, Any]:
        """The record of a row, read from the table or measured and written to it."""
        found = self.there.get((one.name, one.setting))
        if found is not None:
            if (one.name, one.setting) in self.stored:
                self.samples[one.label] = self.stored[one.name, one.setting]
            return found
        record = {**self.head, "method": one.name, "setting": one.setting, **cost, **self._measured(one), **self.where}
        if self.path is not None:
            head = {**self.known, "method": one.name, "setting": one.setting}
            samples.write(samples.beside(self.path), head, self.samples[one.label])
            results.write(self.path, [record], overwrite=True)
        return record

    def _cost_of(self, method: Method) -> Cost:
        return self._cost(Entry(method.name, "", (method,)))

    def _cost(self, one: Entry) -> Cost:
        """The tokens, work or bytes that the method keeps of the first batch, by its report.

        Raises:
            Exception: whatever the method, or the model with it, refuses by.
        """
        others = one.stages - {self.stage}
        if others:
            raise ValueError(
                f"it acts at stage {', '.join(sorted(others))}, and this model is measured at {self.stage}"
            )
        with torch.inference_mode(), one.applied(self.model):
            self.feed.probe(self.model, self.batches.first)
            report: Any = api.report(self.model)
        layers = report.layers
        if self.stage == "block":
            ends = {"tokens_in": layers[0].tokens_in, "tokens_out": layers[-1].tokens_out}
            return {**ends, "gmacs": report.macs / 1e9, "gmacs_share": report.macs / report.macs_unpatched}
        rows = sum(layer.rows for layer in layers) / len(layers)
        return {"rows_left": rows, "bytes": report.bytes, "dense_bytes": report.dense_bytes}

    def _measured(self, one: Entry) -> dict[str, Any]:
        """Quality, times and peak memory of a row, beside the unpatched model."""
        batches, tally = self.batches, Tally()
        arms = [Entry(BASE, ""), one] if one.methods else [one]
        entered, outputs = [0] * len(arms), {}
        batches.restart()

        @contextmanager
        def enter(arm: int) -> Iterator[None]:
            # Entering is not timed: here the batch is fetched. The first time is the warm-up, on the first batch.
            batches.seek(max(0, entered[arm] - 1))
            entered[arm] += 1
            with arms[arm].applied(self.model):
                yield

        def collect(arm: int, i: int, result: Any) -> None:
            if i >= batches.count:  # a batch that came round again, to be timed
                return
            outputs[arm] = result
            if len(outputs) < len(arms):
                return
            dense, mine = outputs[0], outputs[len(arms) - 1]
            tally.take(self.score, mine, batches.batch, dense)
            outputs.clear()

        def run(i: int) -> Any:
            return self.feed.run(self.model, batches.batch)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)  # it was said when the cost was taken
            entering = [partial(enter, arm) for arm in range(len(arms))]
            seconds = timing.paired(entering, run, self.rounds, device=self.device, seed=self.seed, collect=collect)
            with one.applied(self.model):
                memory = timing.peak_memory(lambda: self.feed.run(self.model, batches.first), self.device)
        self.samples[one.label] = tally
        record = {**tally.record(self.score), **memory.record(), "rounds": self.rounds}
        record |= results.spread("seconds", seconds[-1])
        return record | results.spread("speedup", timing.ratios(seconds)[-1])


def _of_all(cost: Cost) -> Cost:
    """The cost of the unpatched model, which every report tells beside that of its method."""
    if "gmacs" in cost:
        gmacs = cost["gmacs"] / cost["gmacs_share"]
        return {"tokens_in": cost["tokens_in"], "tokens_out": cost["tokens_in"], "gmacs": gmacs, "gmacs_share": 1.0}
    return {"bytes": cost["dense_bytes"], "dense_bytes": cost["dense_bytes"]}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _row(one: Entry, record: dict[str, Any], score: Scorer) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"method": one.name, "setting": one.setting, "baseline": one.baseline, "metric": score.name, "reason": ""}
    if "reason" in record:
        return row | {"reason": record["reason"]}
    field = score.field
    row |= {name: record[name] for name in MEASURED if name in record}
    row |= {"quality": record[field], "low": record.get(f"{field}_low"), "high": record.get(f"{field}_high")}
    return row | {"samples": record[f"{field}_count"], "rows": record.get("rows_left"), "work": work(record)}


@contextmanager
def _telling(progress: bool, score: Scorer) -> Iterator[tuple[Callable[[int], None], Callable[..., dict[str, Any]]]]:
    """Two functions: one says how many rows there will be, the other turns a record into a row and tells of it."""
    count = [0, 0]
    shown: Any = None
    if progress and sys.stderr.isatty():
        with suppress(ImportError):  # without rich, lines
            from rich.console import Console
            from rich.progress import Progress

            shown = Progress(console=Console(stderr=True), transient=True)
    with nullcontext() if shown is None else shown:
        task = None if shown is None else shown.add_task("unpatched", total=None)

        def total(rows: int) -> None:
            count[1] = rows
            if shown is not None:
                shown.update(task, total=rows)

        def tell(one: Entry, record: dict[str, Any]) -> dict[str, Any]:
            count[0] += 1
            row = _row(one, record, score)
            if shown is not None:
                shown.update(task, advance=1, description=one.label)
            elif progress:
                says = f"not measured: {row['reason']}"
                if not row["reason"]:
                    says = f"{score.name} {row['quality']:.4g} ({row['difference']:+.2g}), {row['speedup']:.2f}x"
                print(f"{count[0]}/{count[1]} {one.label}: {says}", file=sys.stderr, flush=True)
            return row

        yield total, tell
