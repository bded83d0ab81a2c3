"""VTC-Bench's split: accuracy on the samples that plain down-sampling fails, apart from those that it gets right.

Most samples of common benchmarks can be answered from a smaller picture. On those a method that keeps the wrong tokens
looks as good as one that keeps the right ones; the others tell them apart. After Liao et al., "Are We Using the Right
Benchmark: An Evaluation Framework for Visual Token Compression Methods" (arXiv:2510.07143).
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokred.bench.arms import BASE
from tokred.bench.results import wilson
from tokred.eval.needed import need

Log = dict[str, dict[Any, float]]  # method -> sample -> value
WIDTH = 100


@dataclass(frozen=True)
class Split:
    """Accuracy of each method in each group.

    Attributes:
        rows: a dictionary for each method and group, with ``method``, ``group`` (``"A"``: samples that down-sampling
            gets wrong and the dense model right; ``"B"``: that both get right; ``"all"``), ``samples``, ``right``,
            ``accuracy``, and its 95 % interval ``low`` to ``high`` (None in an empty group).
        groups: the samples of ``"A"`` and ``"B"``.
        left_out: how many samples stand in neither group, because the dense model gets them wrong.
        dense, downsample: names of the two that make the groups.
    """

    rows: list[dict[str, Any]]
    groups: dict[str, list[Any]]
    left_out: int
    dense: str
    downsample: str

    def to_pandas(self) -> Any:
        """:attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        return need("pandas", "to_pandas", "pip install 'tokred[bench]'").DataFrame(self.rows)

    def __str__(self) -> str:
        names = list(dict.fromkeys(row["method"] for row in self.rows))
        cells = {(row["method"], row["group"]): _cell(row) for row in self.rows}
        width = max(len(name) for name in names)
        lines = [f"{'':<{width}}  {'A':<20}  {'B':<20}  all"]
        lines += [f"{n:<{width}}  {cells[n, 'A']:<20}  {cells[n, 'B']:<20}  {cells[n, 'all']}" for n in names]
        a, b = (len(self.groups[g]) for g in "AB")
        said = (
            f"A: {a} samples that {self.downsample} gets wrong and {self.dense} right; B: {b} that both get right; "
            f"{self.left_out} that {self.dense} gets wrong are in neither."
        )
        return "\n".join([*lines, *textwrap.wrap(said, WIDTH)])


def _cell(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "-"
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def vtc_split(log: Any, *, dense: str = BASE, downsample: str | None = None, right: float = 0.5) -> Split:
    """Accuracy of methods on samples that need fine tokens (group A), and on those that do not (group B).

    Both groups hold only samples that the dense model gets right. Compare at equal numbers of tokens: one call for each
    amount, with the down-sampling of that amount.

    Args:
        log: values of single samples: a frame or CSV file with the columns ``sample``, ``method`` and ``correct``; a
            result of :func:`tokred.benchmark` or :func:`tokred.eval.lm_eval`; ``{method: {sample: value}}``, or
            ``{method: values}`` in the same order; or what :func:`read_samples` makes of the logs of lm-eval and
            lmms-eval.
        dense: the method that is the model as it is.
        downsample: the down-sampling that makes the groups, by its name in the log; None: the only one whose name
            begins with ``"downsample"``.
        right: the least value that counts as right.

    Raises:
        TypeError, ValueError: the log is of no such form, names no such method, holds a sample twice or a value that is
            no number, or the methods were not measured on the same samples.
    """
    if isinstance(right, bool) or not isinstance(right, int | float):
        raise TypeError(f"right is the least value that counts as right, got {right!r}")
    found = _log(log)
    if dense not in found:
        raise ValueError(f"dense is {dense!r}; the log has {', '.join(map(repr, found))}")
    chosen = _downsample(found, downsample)
    for name, values in found.items():
        if values.keys() != found[dense].keys():
            other = values.keys() ^ found[dense].keys()
            raise ValueError(
                f"the log has {len(values)} samples of {name!r} and {len(found[dense])} of {dense!r}; "
                f"{len(other)} are not of both, such as {next(iter(other))!r}"
            )
    hits = {name: {k: value >= right for k, value in values.items()} for name, values in found.items()}
    good = [k for k in found[dense] if hits[dense][k]]
    groups = {"A": [k for k in good if not hits[chosen][k]], "B": [k for k in good if hits[chosen][k]]}
    order = [dense, chosen, *(name for name in found if name not in (dense, chosen))]
    rows = [
        _row(name, group, [hits[name][k] for k in members])
        for name in order
        for group, members in {**groups, "all": list(found[dense])}.items()
    ]
    return Split(rows, groups, len(found[dense]) - len(good), dense, chosen)


def _row(method: str, group: str, hits: list[bool]) -> dict[str, Any]:
    row = {"method": method, "group": group, "samples": len(hits), "right": sum(hits)}
    if not hits:
        return {**row, "accuracy": None, "low": None, "high": None}
    share = sum(hits) / len(hits)
    low, high = wilson(share, len(hits))
    return {**row, "accuracy": share, "low": low, "high": high}


def _downsample(found: Log, given: str | None) -> str:
    if given is not None:
        if given not in found:
            raise ValueError(f"downsample is {given!r}; the log has {', '.join(map(repr, found))}")
        return given
    names = [name for name in found if name.startswith("downsample")]
    if len(names) != 1:
        several = f"several: {', '.join(map(repr, names))}" if names else f"none among {', '.join(map(repr, found))}"
        raise ValueError(f"downsample= has to name the down-sampling that makes the groups; the log has {several}")
    return names[0]


def _log(log: Any) -> Log:
    """Values by method and sample."""
    if isinstance(log, str | Path):
        return _of_rows(_read_csv(Path(log)))
    tallies = getattr(log, "samples", None)
    if isinstance(tallies, Mapping):  # of a benchmark
        return _of_tallies(tallies)
    if isinstance(tallies, list):  # of lm-eval
        return _of_rows(_of_harness(tallies))
    if isinstance(log, Mapping):
        return {str(name): _numbered(name, values) for name, values in log.items()}
    if hasattr(log, "to_dict") and hasattr(log, "columns"):
        missing = {"sample", "method", "correct"} - set(log.columns)
        if missing:
            raise ValueError(f"the log has no column {', '.join(sorted(missing))}; it has {', '.join(log.columns)}")
        return _of_rows(log.to_dict("records"))
    if isinstance(log, list):
        return _of_rows(log)
    raise TypeError(f"log is a frame, a CSV file, a mapping or a result with samples, got {type(log).__name__}")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"sample", "method", "correct"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return rows


def _of_rows(rows: list[dict[str, Any]]) -> Log:
    found: Log = {}
    for row in rows:
        method, sample = str(row["method"]), row["sample"]
        values = found.setdefault(method, {})
        if sample in values:
            raise ValueError(f"the log has sample {sample!r} of {method!r} twice")
        values[sample] = _value(row["correct"], method, sample)
    return found


def _numbered(name: Any, values: Any) -> dict[Any, float]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {sample: _value(value, name, sample) for sample, value in pairs}


def _value(value: Any, method: Any, sample: Any) -> float:
    """True, false, or a number, as it is or as it is written."""
    words = {"true": 1.0, "false": 0.0}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise ValueError(f"correct is {value!r} for sample {sample!r} of {method!r}: true, false or a number is wanted")
    return found


def _of_tallies(tallies: Mapping[str, Any]) -> Log:
    if not tallies:
        raise ValueError("the benchmark kept no values of single samples")
    found = {name: _numbered(name, tally.values) for name, tally in tallies.items()}
    if BASE not in found:
        one = next(iter(tallies.values()))
        found = {BASE: _numbered(BASE, one.base), **found}
    return found


KEPT = ("task", "sample", "filter", "method", "target", "answers", "length")


def _of_harness(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of :class:`~tokred.eval.table.Harness`, whose tasks have to have one metric each."""
    rows = []
    for one in samples:
        names = [name for name in one if name not in KEPT]
        if len(names) != 1 or len({(s["task"], s["filter"]) for s in samples if s["task"] == one["task"]}) > 1:
            raise ValueError(
                f"the samples of task {one['task']!r} have several metrics or filters ({', '.join(names)}): give "
                "{method: {sample: value}} of one of them"
            )
        rows.append({"method": one["method"], "sample": (one["task"], one["sample"]), "correct": one[names[0]]})
    return rows


def read_samples(
    files: Mapping[str, str | Path], metric: str | None = None, filtered: str | None = None
) -> dict[str, dict[Any, float]]:
    """Values of single samples in the logs of lm-eval or lmms-eval (``--log_samples``), for :func:`vtc_split`.

    Args:
        files: a ``.jsonl`` file for each method.
        metric: the field that says how right an answer is; None: the only one that there is. Of a field that is a
            dictionary, as some tasks of lmms-eval write, its ``"score"``.
        filtered: the filter of lm-eval, for tasks that have several.

    Returns:
        ``{method: {sample: value}}``.

    Raises:
        ValueError: a file has no such field, or several that could be meant, or a sample twice.
        OSError: a file cannot be read.
    """
    found: dict[str, dict[Any, float]] = {}
    for name, file in files.items():
        lines = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{file} has no sample")
        field = metric or _only(lines[0], file)
        values = found.setdefault(str(name), {})
        for line in lines:
            if filtered is not None and line.get("filter") != filtered:
                continue
            sample = line.get("doc_id")
            if sample is None or field not in line:
                missing = "doc_id" if sample is None else field
                raise ValueError(f"{file} has a sample without {missing!r}; it has {', '.join(line)}")
            if sample in values:
                raise ValueError(f"{file} has sample {sample!r} twice: give filtered=, such as {line.get('filter')!r}")
            value = line[field]
            values[sample] = _value(value.get("score") if isinstance(value, Mapping) else value, name, sample)
        if not values:
            raise ValueError(f"{file} has no sample of filter {filtered!r}")
    return found


# Fields of a logged sample that are no metric.
LOGGED = {"doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "filter", "doc_hash",
          "prompt_hash", "target_hash", "metrics", "token_counts", "submission"}  # fmt: skip


def _only(line: Mapping[str, Any], file: Any) -> str:
    names = line.get("metrics")
    if not isinstance(names, list):
        scores = (int, float, Mapping)
        names = [name for name, value in line.items() if name not in LOGGED and isinstance(value, scores)]
    if len(names) != 1:
        several = ", ".join(names) or "none that is a number"
        raise ValueError(f"metric= has to name a field of {file}; it has {several}")
    return str(names[0])
