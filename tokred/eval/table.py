"""``Harness``: the rows that a harness's tasks gave for a model, dense and with methods."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "model", "task", "metric", "filter", "method", "setting", "baseline", "samples", "score", "stderr", "better",
    "difference", "difference_low", "difference_high", "length", "seconds", "speedup", "speedup_low", "speedup_high",
    "peak_mib", "rows", "bytes", "dense_bytes", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Harness:
    """Scores of a harness's tasks: for each task and metric the dense model first, then the methods.

    Attributes:
        rows: a dictionary a row, with the keys of :data:`COLUMNS`. ``score`` and ``stderr`` are the harness's own;
            ``difference`` is the mean of the differences to the dense model on the same samples with its 95 % interval
            (None where the metric has no value for single samples); ``length`` is the mean number of tokens of an
            answer; ``seconds`` is the time of all generation of the task, ``speedup`` the median over batches of the
            dense model's time over the row's, with quartiles; ``rows``, ``bytes`` and ``dense_bytes`` are what the
            cache held at the end, per layer and per sample. ``reason`` says why a row was not measured.
        samples: a dictionary for each task, sample, filter and method: its answers, ``length``, and the metrics.
        model: its name.
        paths: files that were written.
    """

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    model: str
    paths: list[Path] = field(default_factory=list)

    def to_pandas(self) -> Any:
        """:attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        from tokred.eval.needed import need

        return need("pandas", "to_pandas").DataFrame(self.rows, columns=list(COLUMNS))

    def write(self, table: Path, samples: Path) -> list[Path]:
        """A CSV file of the rows, and a JSON line for each sample."""
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, COLUMNS)
            out.writeheader()
            out.writerows(self.rows)
        with samples.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in self.samples)
        self.paths[:] = [table, samples]
        return self.paths

    def __str__(self) -> str:
        heads = ("task", "metric", "method", "score", "difference [95 %]", "length", "speed", "kept")
        body = [_cells(row) for row in self.rows if not row["reason"]]
        left = [f"{row['method']} {row['setting']}".strip() + f": not measured. {row['reason']}"
                for row in self.rows if row["reason"]]  # fmt: skip
        widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in [heads, *body]]
        return "\n".join([self.model, *lines, *left])


def _cells(row: dict[str, Any]) -> Sequence[str]:
    name = f"{row['method']} {row['setting']}".strip()
    metric = row["metric"] if row["filter"] in (None, "", "none") else f"{row['metric']},{row['filter']}"
    score = f"{row['score']:.4g}" + (f" +- {row['stderr']:.2g}" if row["stderr"] is not None else "")
    difference = "" if row["difference"] is None else f"{row['difference']:+.3g}"
    if row["difference_low"] is not None:
        difference += f" [{row['difference_low']:+.3g}, {row['difference_high']:+.3g}]"
    length = "" if row["length"] is None else f"{row['length']:.1f}"
    speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    kept = "" if not row["dense_bytes"] else f"{row['bytes'] / row['dense_bytes']:.0%}"
    return (row["task"], metric, name, score, difference, length, speed, kept)
