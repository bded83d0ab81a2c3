"""``Benchmark``: the rows that :func:`tokred.benchmark` measured, as text, HTML, a frame, a plot, and in sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tokred.bench import shown, standing
from tokred.bench.scoring import Tally
from tokred.bench.shown import HEADS as HEADS
from tokred.bench.shown import WIDTH as WIDTH
from tokred.bench.standing import Comparison, Row, Units
from tokred.core.checks import check_choice
from tokred.core.folders import check_file, check_folder
from tokred.core.frames import frame

FILE = "benchmark.json"
FORMAT = 1
# Keys of every row; what was not measured is None.
COLUMNS = (
    "method", "setting", "stage", "baseline", "metric", "samples", "quality", "low", "high", "difference",
    "difference_low", "difference_high", "speedup", "speedup_low", "speedup_high", "seconds", "tower_seconds",
    "encoder_seconds", "selection_seconds", "prompt_seconds", "decode_seconds", "denoiser_seconds", "rest_seconds",
    "peak_mib", "forward_mib", "tokens_in", "tokens_out", "rows", "bytes", "dense_bytes", "work", "generated", "reason",
)  # fmt: skip
# What a row costs, and whether less of it is better.
COSTS = {"speedup": False, "seconds": True, "work": True, "bytes": True, "peak_mib": True}


class Judgement(NamedTuple):
    """A metric of a benchmark: its name, the direction that is good, what outputs are compared with, and values of
    single samples by ``"method setting"``."""

    metric: str
    better: str
    against: str = ""
    samples: Mapping[str, Tally] = {}


@dataclass(frozen=True)
class Benchmark:
    """The measured rows of a model: the unpatched model first, then the methods and the baselines of equal work.

    Where several metrics were taken, each method has a row of each, and all answers go by the first metric;
    ``result.by("ssim")`` is the result by another one.

    Attributes:
        rows: a dictionary a row, with the keys of :data:`COLUMNS`. ``low`` and ``high`` are the 95 % interval of
            ``quality``; ``difference`` is that to the unpatched model on the same samples (of perplexities the ratio,
            minus one); ``speedup`` is a median with quartiles, ``seconds`` a median, and so are the seconds of
            the run's parts, which add up to it. ``work`` is the share of the multiply-adds (of an encoder: of its
            blocks), or of the cache's bytes, or their product. ``generated`` is the mean length of answers in tokens.
            ``reason`` says why a row was not measured.
        model: its name.
        stage: of the methods; of several, with ``+`` between.
        metric: name of the metric; of several the first one's.
        better: the direction that is good.
        path: the table that the rows were written to, or None.
        samples: values of single samples, by ``"method setting"``; empty where they were not kept.
        against: what outputs are compared with: ``"labels"``, ``"the unpatched model"``, a key of the batch, or empty.
        run: the kind of run.
        spent: seconds of all there was to do, ``"whole"``, and of those in runs of the model that were ``"timed"``
            and ``"untimed"``.
        others: further metrics.
    """

    rows: list[Row]
    model: str
    stage: str
    metric: str
    better: str
    path: Path | None = None
    samples: Mapping[str, Tally] = field(default_factory=dict, repr=False)
    against: str = ""
    run: str = "forward"
    spent: Mapping[str, float] = field(default_factory=dict, repr=False)
    others: tuple[Judgement, ...] = field(default=(), repr=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, the first one first."""
        return (self.metric, *(one.metric for one in self.others))

    def by(self, metric: str) -> Benchmark:
        """The result by one of several metrics alone.

        Raises:
            ValueError: it was not taken.
        """
        check_choice(metric, "metric", self.metrics)
        first = Judgement(self.metric, self.better, self.against, self.samples)
        found = next(one for one in (first, *self.others) if one.metric == metric)
        rows = [row for row in self.rows if row["metric"] == metric]
        return replace(self, rows=rows, others=(), **found._asdict())

    @property
    def chosen(self) -> list[Row]:
        """Rows by the first metric."""
        return [row for row in self.rows if row["metric"] == self.metric] if self.others else self.rows

    @property
    def overhead(self) -> float | None:
        """Time that measuring took beside the model's runs, as a share of these; None where nothing was run."""
        runs = self.spent.get("timed", 0.0) + self.spent.get("untimed", 0.0)
        return (self.spent["whole"] - runs) / runs if runs else None

    @property
    def units(self) -> Units:
        """How values of the metric are shown."""
        return Units(self.metric, self.better)

    @property
    def measured(self) -> list[Row]:
        """Rows that have numbers, by the first metric."""
        return [row for row in self.chosen if row["quality"] is not None]

    # ------------------------------------------------------------------------------------------ answers

    def best(self, loss: float = 0.01) -> Row:
        """The fastest row that loses at most ``loss`` against the unpatched model, by the worse end of its interval.

        Args:
            loss: in the metric's own units (0.01 is a point of accuracy); of perplexity, the share that it may rise.

        Returns:
            A row, and under ``"why"`` a sentence that says what the next one is, and whether chance may order the two.
            It is the unpatched model's where no method qualifies.

        Raises:
            ValueError: ``loss`` is negative or no number.
        """
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not loss >= 0:
            raise ValueError(f"loss is the quality that may be lost, at least 0, got {loss!r}")
        base, *others = self.measured
        fit = [base, *(row for row in others if (worst := self._worst(row)) is not None and worst <= loss)]
        found = max(fit, key=lambda row: row["speedup"])
        return found | {"why": standing.best_in_words(found, fit, loss, self.samples, self.units)}

    def _worst(self, row: Row) -> float | None:
        low, high = row["difference_low"], row["difference_high"]
        if low is None or high is None:
            return None
        return float(high if self.better == "lower" else -low)

    def compare(self, a: Row | str, b: Row | str) -> Comparison:
        """The difference of two rows on the same samples, with its 95 % interval.

        Args:
            a, b: rows, or their labels: ``"tome r=13"``, or ``"tome"`` where it is the only one.

        Returns:
            The comparison; printed, it says which one is better, or that chance may order them. Where values of single
            samples were not kept it is as if the samples were not the same, and says so.

        Raises:
            ValueError: there is no such row, there are several, or it was not measured.
        """
        return standing.compare(self._row(a, "a"), self._row(b, "b"), self.samples, self.units)

    def _row(self, given: Row | str, name: str) -> Row:
        text = given if isinstance(given, str) else standing.label(given)
        if not isinstance(given, str) and self.others and given["metric"] != self.metric:
            raise ValueError(f"{name} is a row of {given['metric']!r}: result.by({given['metric']!r}) compares these")
        exact = [row for row in self.chosen if standing.label(row) == text]
        found = exact or [row for row in self.chosen if row["method"] == text]
        if len(found) != 1:
            known = ", ".join(repr(standing.label(row)) for row in self.chosen)
            raise ValueError(f"{name} is {text!r}, and {len(found)} rows are; the rows are {known}")
        if found[0]["quality"] is None:
            raise ValueError(f"{name} is {text!r}, which was not measured: {found[0]['reason']}")
        return found[0]

    def pareto(self, cost: str = "speedup") -> list[Row]:
        """The rows than which no other is at least as good and as cheap, and in one of the two better; cheapest first.

        Args:
            cost: ``"speedup"``, ``"seconds"``, ``"work"``, ``"bytes"`` or ``"peak_mib"``.

        Raises:
            ValueError: ``cost`` is none of these.
        """
        check_choice(cost, "cost", tuple(COSTS))
        there = [row for row in self.measured if row[cost] is not None]
        cheap, good = (-1 if COSTS[cost] else 1), self.units.sign
        found: list[Row] = []
        for row in sorted(there, key=lambda r: (cheap * r[cost], good * r["quality"]), reverse=True):
            if not found or good * row["quality"] > good * found[-1]["quality"]:
                found.append(row)
        return found

    @property
    def summary(self) -> str:
        """A sentence that says whether any method beats a random choice at equal work, by paired differences."""
        return standing.against_random(self.measured, self.samples, self.units, self._word)

    @property
    def _word(self) -> str:
        """The thing of which a row has less than the unpatched model: work, or bytes."""
        return "bytes" if self.stage == "cache" else "work"

    # -------------------------------------------------------------------------------------------- forms

    @property
    def title(self) -> str:
        """Model, stage, metric, its units and what it compares with, in one line."""
        units = " in %, differences in points" if self.units.percent else ""
        units = ", differences in %" if self.units.ratio else units
        against = f", against {self.against}" if self.against else ""
        return f"{self.model}, stage {self.stage}: {self.metric}{units}{against}"

    def cells(self, row: Row) -> list[str]:
        """The texts of a measured row: quality, difference, speed-up, what is kept, peak memory."""
        return shown.cells(row, self.units)

    def text(self, width: int = shown.WIDTH) -> str:
        """The table as text, and the summary.

        Args:
            width: characters of a line; below 80 what is kept and peak memory are left out.

        Raises:
            ValueError: ``width`` is below 60.
        """
        if isinstance(width, bool) or not isinstance(width, int) or width < shown.NARROW:
            raise ValueError(f"width is a number of characters, at least {shown.NARROW}, got {width!r}")
        return shown.text(self.chosen, self.units, self.title, self.summary, width, self._more)

    @property
    def _more(self) -> list[shown.More]:
        """The other metrics: units, title and measured rows."""
        found = [self.by(one.metric) for one in self.others]
        return [(one.units, one.title.partition(": ")[2], one.measured) for one in found]

    def __str__(self) -> str:
        return self.text()

    def to_markdown(self) -> str:
        """The table for a page, and below it the summary."""
        return shown.markdown(self.chosen, self.units, self.title, self.summary, self._more)

    def _repr_html_(self) -> str:
        """A table for notebooks, with the summary below."""
        return shown.page(self.chosen, self.units, self.title, self.summary, self._more)

    def to_pandas(self) -> Any:
        """:attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.rows, COLUMNS, "Benchmark")

    def plot(self, path: str | Path) -> Path:
        """Draw quality against speed-up, and against work where it is known, a line a method, with intervals.

        Up and right is better. The unpatched model is a star; random choices, uniform ones and down-sampling are grey,
        and a thin line joins each method with the random choice of equal work.

        Args:
            path: a picture's, such as ``"quality.png"``; its folder is made.

        Raises:
            ImportError: matplotlib or pandas is not installed.
        """
        rows = frame(self.chosen, COLUMNS, "Benchmark")
        from tokred.bench import plots

        plots.check("Benchmark.plot")
        joined = [(row, other) for row in self.measured if (other := standing.rival(row, self.measured, self.units))]
        target = Path(path)
        check_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        title = f"{self.model}: {self.metric}"
        return plots.save(plots.benchmark(rows, self.units, title, joined, word=self._word), target)

    # ------------------------------------------------------------------------------------------ keeping

    def save(self, folder: str | Path) -> Path:
        """Keep everything, values of single samples too, in ``benchmark.json``, and the table in ``benchmark.md``.

        Args:
            folder: made if it is not there; the files of an earlier result are replaced.

        Returns:
            The path of ``benchmark.json``.
        """
        target = Path(folder)
        check_folder(target)
        target.mkdir(parents=True, exist_ok=True)
        names = ("model", "stage", "metric", "better", "against", "run", "rows")
        kept = {"format": FORMAT, **{name: getattr(self, name) for name in names}, "spent": dict(self.spent)}
        kept["path"] = None if self.path is None else str(self.path)
        kept["samples"] = _plain(self.samples)
        kept["others"] = [one._asdict() | {"samples": _plain(one.samples)} for one in self.others]
        (target / FILE).write_text(json.dumps(kept), "utf8")
        (target / FILE).with_suffix(".md").write_text(f"{self.to_markdown()}\n", "utf8")
        return target / FILE

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """The result that :meth:`save` kept.

        Args:
            path: of the folder, or of ``benchmark.json``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no result that was saved.
        """
        source = Path(path)
        source = source / FILE if source.is_dir() else source
        try:
            kept = json.loads(source.read_text("utf8"))
            known = kept.pop("format") == FORMAT
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise ValueError(f"{source} was not written by Benchmark.save of this version")
        rows = [dict.fromkeys(COLUMNS) | row for row in kept.pop("rows")]
        samples, where = _tallies(kept.pop("samples")), kept.pop("path")
        others = [Judgement(**{**one, "samples": _tallies(one["samples"])}) for one in kept.pop("others", ())]
        there = None if where is None else Path(where)
        return cls(rows, **kept, path=there, samples=samples, others=tuple(others))


def _plain(samples: Mapping[str, Tally]) -> dict[str, Any]:
    return {name: asdict(tally) for name, tally in samples.items()}


def _tallies(found: Mapping[str, Any]) -> dict[str, Tally]:
    return {name: Tally(**tally) for name, tally in found.items()}
