"""``Benchmark``: the rows that :func:`tokred.benchmark` measured, as text, HTML, a frame, a plot, and in a sentence."""

from __future__ import annotations

import html
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokred.bench.arms import BASE
from tokred.bench.results import NORMAL
from tokred.bench.scoring import Tally

WIDTH = 80
RANDOM = ("random", "random_prune", "random_evict")
SHARES = ("top1", "top5", "agreement")
ROOM = 21  # characters of a difference with its interval
HEADS = ("quality", "difference [95 %]", "speed", "kept", "MiB")
NEAR = 0.05  # shares of work, or of bytes, that are called equal
# Keys of every row; what was not measured is None.
COLUMNS = (
    "method", "setting", "baseline", "metric", "samples", "quality", "low", "high", "difference", "difference_low",
    "difference_high", "speedup", "speedup_low", "speedup_high", "seconds", "peak_mib", "tokens_in", "tokens_out",
    "rows", "bytes", "dense_bytes", "work", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """The measured rows of a model: the unpatched model first, then the methods and the baselines of equal work.

    Attributes:
        rows: a dictionary a row, with the keys of :data:`COLUMNS`. ``low`` and ``high`` are the 95 % interval of
            ``quality``; ``difference`` is that to the unpatched model on the same samples (of perplexities the ratio,
            minus one); ``speedup`` is a median with quartiles, ``seconds`` a median. ``work`` is the share of the
            blocks' multiply-adds, or of the cache's bytes. ``reason`` says why a row was not measured.
        model: its name.
        stage: ``"block"`` or ``"cache"``.
        metric: name of the metric.
        better: the direction that is good.
        path: the table that the rows were written to, or None.
        samples: values of single samples, by ``"method setting"``; empty where they were not kept.
        against: what outputs are compared with: ``"labels"``, ``"the unpatched model"``, a key of the batch, or empty.
    """

    rows: list[dict[str, Any]]
    model: str
    stage: str
    metric: str
    better: str
    path: Path | None = None
    samples: Mapping[str, Tally] = field(default_factory=dict, repr=False)
    against: str = ""

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Rows that have numbers."""
        return [row for row in self.rows if row["quality"] is not None]

    def best(self, loss: float = 0.01) -> dict[str, Any]:
        """The fastest row that loses at most ``loss`` against the unpatched model, by the worse end of its interval.

        Args:
            loss: in the metric's own units (0.01 is a point of accuracy); of perplexity, the share that it may rise.

        Returns:
            A row; that of the unpatched model where no method qualifies.

        Raises:
            ValueError: ``loss`` is negative or no number.
        """
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not loss >= 0:
            raise ValueError(f"loss is the quality that may be lost, at least 0, got {loss!r}")
        base, *others = self.measured
        fit = [row for row in others if (worst := self._worst(row)) is not None and worst <= loss]
        return max([base, *fit], key=lambda row: row["speedup"])

    def _worst(self, row: dict[str, Any]) -> float | None:
        low, high = row["difference_low"], row["difference_high"]
        if low is None or high is None:
            return None
        return float(high if self.better == "lower" else -low)

    @property
    def summary(self) -> str:
        """A sentence that says whether any method beats a random choice at equal work."""
        word = "work" if self.stage == "block" else "bytes"
        pairs = [(row, rival) for row in self.measured if (rival := self._rival(row)) is not None]
        if not pairs:
            return f"No method was measured beside a random choice at equal {word}: nothing says that choosing helps."
        # Each of several comparisons may be won by chance: the bar is so high that any is won in one of forty.
        bar = statistics.NormalDist().inv_cdf(1 - 0.025 / len(pairs))
        standing = [(row, self._gain(row, rival), rival) for row, rival in pairs]
        known = [(row, gain[0], gain[1], rival) for row, gain, rival in standing if gain is not None]
        if not known:
            return f"One sample tells no chance from skill: whether a method beats random at equal {word} is open."
        count = known[0][0]["samples"]
        won = [x for x in known if x[1] > bar * x[2]]
        lost = [x for x in known if x[1] < -bar * x[2]]
        if won:
            row, gain, _, rival = max(won, key=lambda x: x[1] / (x[2] or 1e-12))
            more = f", as do {len(won) - 1} more" if len(won) > 1 else ""
            text = f"{_label(row)} beats {_label(rival)} at equal {word}, by {self._gained(gain)}{more}"
        else:
            text = f"No method beats a random choice at equal {word} beyond chance"
        if lost:
            text += f"; {', '.join(_label(x[0]) for x in lost)} {'is' if len(lost) == 1 else 'are'} worse than random"
        return f"{text} ({self.metric}, {len(known)} compared on {count} samples)."

    def _rival(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The best random choice at equal work."""
        if row["baseline"] or row["work"] is None or row["method"] == BASE:
            return None
        near = [
            r
            for r in self.measured
            if r["method"] in RANDOM and r["work"] is not None and abs(r["work"] - row["work"]) <= NEAR
        ]
        sign = -1 if self.better == "lower" else 1
        return max(near, key=lambda r: sign * r["difference"], default=None)

    def _gain(self, row: dict[str, Any], rival: dict[str, Any]) -> tuple[float, float] | None:
        """How much better a row is than another, and its standard error, as if the samples were not the same."""
        if any(r["difference_low"] is None or r["difference_high"] is None for r in (row, rival)):
            return None
        errors = [(r["difference_high"] - r["difference_low"]) / (2 * NORMAL) for r in (row, rival)]
        gain = row["difference"] - rival["difference"]
        return (-gain if self.better == "lower" else gain), math.hypot(*errors)

    def _gained(self, gain: float) -> str:
        unit = " points" if self._percent else " %" if self.metric == "perplexity" else ""
        return self._difference(gain)[0].removeprefix("+") + unit

    def to_pandas(self) -> Any:
        """:attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Benchmark.to_pandas needs pandas: pip install 'tokred[bench]', or use Benchmark.rows"
            ) from error
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def plot(self, path: str | Path) -> Path:
        """Draw quality against speed-up, a line a method, with intervals; the unpatched model is the level line.

        Args:
            path: a picture's, such as ``"quality.png"``; its folder is made.

        Raises:
            ImportError: matplotlib or pandas is not installed.
        """
        frame = self.to_pandas()
        try:
            from tokred.bench import plots

            plots.pyplot()
        except ImportError as error:
            raise ImportError("Benchmark.plot needs matplotlib: pip install 'tokred[bench]'") from error
        frame = frame[frame["quality"].notna()].rename(columns={"low": "quality_low", "high": "quality_high"})
        names = ("quality_low", "quality_high", "speedup_low", "speedup_high", "quality", "speedup")
        frame = frame.astype(dict.fromkeys(names, float))
        panel = plots.Panel(
            "speedup",
            "quality",
            xlabel="times as fast as the unpatched model of the same round",
            ylabel=f"{self.metric} (%)" if self._percent else f"{self.metric} ({self.better} is better)",
            title=f"{self.model}: {self.metric} against speed",
            times=100.0 if self._percent else 1.0,
            level=(float(frame["quality"].iloc[0]), BASE),
            notes="setting",
        )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return plots.save(plots.lines(frame[frame["method"] != BASE], [panel]), target)

    @property
    def _percent(self) -> bool:
        return self.metric in SHARES

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self._percent else f"{value:.4g}"

    def _difference(self, *values: float) -> list[str]:
        """Differences as they are shown: in points, in per cent of a perplexity, or in the metric's units."""
        if self._percent or self.metric == "perplexity":
            return [f"{100 * v:+.1f}" for v in values]
        return [f"{v:+.2g}" for v in values]

    def cells(self, row: dict[str, Any]) -> list[str]:
        """The texts of a measured row: quality, difference, speed-up, what is kept, peak memory."""
        difference, *ends = self._difference(
            *(row[k] for k in ("difference", "difference_low", "difference_high") if row[k] is not None)
        )
        if ends:
            between = f"{difference} [{', '.join(end.removeprefix('+') for end in ends)}]"
            half = (row["difference_high"] - row["difference_low"]) / 2
            difference = between if len(between) <= ROOM else f"{difference} ± {half:.1g}"
        if row["tokens_out"] is not None:
            kept = f"{row['tokens_in']:.0f} > {row['tokens_out']:.0f}"
        else:
            kept = "" if not row["dense_bytes"] else f"{row['bytes'] / row['dense_bytes']:.0%} bytes"
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        base = row["method"] == BASE
        return [self._number(row["quality"]), "" if base else difference, f"{row['speedup']:.2f}x", kept, memory]

    @property
    def title(self) -> str:
        """Model, stage, metric and its units, in one line."""
        units = {True: " in %, differences in points"}.get(self._percent, "")
        units = ", differences in %" if self.metric == "perplexity" else units
        return f"{self.model}, stage {self.stage}: {self.metric}{units}"

    def __str__(self) -> str:
        def line(label: str, cells: Sequence[str]) -> str:
            quality, difference, speed, kept, memory = cells
            short = label if len(label) <= 26 else f"{label[:25]}~"
            return f"{short:<26} {quality:>8} {difference:>{ROOM}} {speed:>6} {kept:>9} {memory:>5}".rstrip()

        lines = [*textwrap.wrap(self.title, WIDTH), line("", HEADS)]
        for row in self.rows:
            if row["quality"] is not None:
                lines.append(line(_label(row), self.cells(row)))
            else:
                text = f"{_label(row)}: not measured. {row['reason']}"
                lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
        return "\n".join([*lines, *textwrap.wrap(self.summary, WIDTH)])

    def _repr_html_(self) -> str:
        """A table for notebooks, with the summary below."""
        heads = "".join(f"<th>{html.escape(head)}</th>" for head in ("method", *HEADS))
        body = ""
        for row in self.rows:
            if row["quality"] is not None:
                cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in self.cells(row))
            else:
                cells = f'<td colspan="{len(HEADS)}">not measured. {html.escape(row["reason"])}</td>'
            body += f"<tr><td>{html.escape(_label(row))}</td>{cells}</tr>"
        caption = html.escape(self.title)
        return (
            f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self.summary)}</p>"
        )


def _label(row: dict[str, Any]) -> str:
    return f"{row['method']} {row['setting']}".strip()
