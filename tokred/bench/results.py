"""Results: one long table a wing, a row a number, with where it comes from; written as a run goes, and pivoted.

Measuring code makes *records*, a dictionary an arm: ``{"model": ..., "method": "tome", "setting": "r=13", "batch": 8,
"speedup": 1.8, "speedup_low": 1.7, "speedup_high": 1.9, "rounds": 15, **here("cpu", "float32")}``. :func:`rows` makes
one row of each of its metrics (:data:`tokred.bench.metrics.METRICS`), :func:`write` puts them into a file, and
:func:`records` and :func:`wide` bring the records back, the latter as a frame.
"""

from __future__ import annotations

import csv
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokred.bench.metrics import CONDITIONS, METRICS
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    import pandas as pd

NORMAL = 1.959964  # half of a 95 % interval in standard errors


class Row(NamedTuple):
    """One number with its circumstances; unknown ones are empty (None, for numbers).

    Attributes:
        scenario: which benchmark.
        model: by its name.
        method: its registered name; ``"unpatched"`` for the model as it is.
        setting: as it is typed, and behind it the conditions: ``budget=0.25 asked=after length=1024``.
        metric: of :data:`METRICS`, which says what ``low`` and ``high`` are.
        unit: of the value.
        value, low, high: the number, and its quartiles or interval.
        count: over how many it was taken.
        device, threads, dtype: where, and in which type.
        versions: ``torch=2.14.1 timm=1.0.31``.
        commit: of the checkout, with ``+`` where it had changes.
        date: in UTC.
    """

    scenario: str
    model: str
    method: str
    setting: str
    metric: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None  # type: ignore[assignment]  # a column; the method of tuples is not used
    device: str = ""
    threads: int | None = None
    dtype: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with the same key are the same measurement, made again."""
        return (*self[:5], self.device, self.threads, self.dtype)

    @property
    def traced(self) -> bool:
        """True if the row names device, versions, date and commit of its measurement, and that commit was clean."""
        return all((self.device, self.versions, self.date, self.commit)) and not self.commit.endswith("+")


COLUMNS = Row._fields
_SOURCE = ("device", "threads", "dtype", "commit", "date")


def free(folder: Path, names: Sequence[str], *, force: bool = False) -> dict[str, Path]:
    """Paths for a set of files that belong together, numbered alike so that none of them exists yet.

    Args:
        folder: made if it is not there.
        names: such as ``["demo.csv", "demo.png"]``; a second run gets ``demo-2.csv`` and ``demo-2.png``.
        force: the plain names, even if they exist.

    Returns:
        From each name to its path.

    Raises:
        OSError: ``folder`` is a file, or cannot be written.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        tail = "" if number == 1 else f"-{number}"
        paths = {n: folder / f"{Path(n).stem}{tail}{Path(n).suffix}" for n in names}
        if force or not any(p.exists() for p in paths.values()):
            return paths
        number += 1


# ---------------------------------------------------------------------------------------------- records and rows


def here(device: Any = "cpu", dtype: Any = "") -> dict[str, Any]:
    """Fields of a record that say where it is measured: device, threads, type, versions, commit, date."""
    from tokred.core import environment

    found = environment.describe(device)
    source = {name: found.pop(name) for name in _SOURCE if name in found}
    return {**source, "dtype": str(dtype).removeprefix("torch."), "versions": pairs(found)}


def pairs(values: Mapping[str, Any]) -> str:
    """``name=value`` with spaces between; values without spaces, empty ones left out."""
    return " ".join(f"{k}={_plain(v)}" for k, v in values.items() if v not in ("", None))


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r",?\s+", lambda m: "," if "," in m[0] else "-", text)


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Fields of a record: the median of ``values`` under ``name``, and their quartiles; none where there are none."""
    from tokred.bench.timing import spread as quartiles

    return between(name, *quartiles(values)) if len(values) else {}


def between(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """Fields of a record: a value and what it lies between."""
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def mean(name: str, value: float, error: float) -> dict[str, float]:
    """Fields of a record: a mean and its 95 % interval, from its standard error."""
    return between(name, value, value - NORMAL * error, value + NORMAL * error)


def share(name: str, right: int, count: int) -> dict[str, float]:
    """Fields of a record: a share of independent answers and its 95 % interval (Wilson's)."""
    return between(name, right / count, *wilson(right / count, count))


def wilson(value: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` independent answers, which holds the share itself."""
    scale = 1 + NORMAL**2 / count
    middle = (value + NORMAL**2 / (2 * count)) / scale
    half = NORMAL / scale * math.sqrt(value * (1 - value) / count + NORMAL**2 / (4 * count**2))
    # Rounding may leave the ends of a share of 0 or 1 a bit inside of it.
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def rows(record: Mapping[str, Any], scenario: str = "") -> list[Row]:
    """One row for each metric of a record.

    Args:
        record: ``model``, ``method``, ``setting``; metrics, with ``_low``, ``_high`` and ``_count`` or the field that
            :class:`~tokred.bench.metrics.Metric` names for the count; conditions; and what :func:`here` gives.
        scenario: where the record does not say it.

    Raises:
        ValueError: a field is none of these.
    """
    metrics = [name for name in record if name in METRICS]
    counts = {m.of for m in METRICS.values()} - {""}
    ends = {f"{name}{end}" for name in metrics for end in ("_low", "_high", "_count")}
    unknown = sorted(set(record) - set(metrics) - counts - ends - set(CONDITIONS) - set(COLUMNS))
    if unknown:
        raise ValueError(
            f"a record has no fields {', '.join(unknown)}: metrics and conditions are listed in tokred.bench.metrics"
        )
    conditions = pairs({name: record[name] for name in CONDITIONS if name in record})
    setting = f"{record.get('setting', '')} {conditions}".strip()
    head = (record.get("scenario") or scenario, record.get("model", ""), record.get("method", ""), setting)
    found = []
    for name in metrics:
        value, low, high = (_number(record.get(f"{name}{end}")) for end in ("", "_low", "_high"))
        if value is None:
            continue
        count = record.get(f"{name}_count", record.get(METRICS[name].of))
        tail = (record.get(c) or default for c, default in Row._field_defaults.items() if c in COLUMNS[10:])
        found.append(
            Row(*head, name, METRICS[name].unit, value, low, high, None if count is None else int(count), *tail)
        )
    return found


def _number(value: Any) -> float | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def conditions(setting: str) -> tuple[str, dict[str, Any]]:
    """The method's own setting, and the conditions that stand behind it."""
    from tokred.core.settings import parse_value

    pattern = rf"(?:^|(?<=\s))({'|'.join(CONDITIONS)})=(\S+)\s*"
    found = {name: parse_value(value) for name, value in re.findall(pattern, setting)}
    return re.sub(pattern, "", setting).strip(), found


def records(table: Iterable[Row], scenario: str | None = None) -> list[dict[str, Any]]:
    """Records, one an arm, from rows: the other way round than :func:`rows`.

    Args:
        table: rows.
        scenario: of these alone.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in table:
        if scenario is not None and row.scenario != scenario:
            continue
        key = (*row[:4], row.device, row.threads, row.dtype)
        if key not in found:
            own, under = conditions(row.setting)
            source = {name: getattr(row, name) for name in COLUMNS[10:]}
            head = {"scenario": row.scenario, "model": row.model, "method": row.method, "setting": own}
            found[key] = {**head, **under, **source}
        record = found[key]
        record[row.metric] = row.value
        for end, value in (("_low", row.low), ("_high", row.high), ("_count", row.count)):
            if value is not None:
                record[f"{row.metric}{end}"] = value
        if row.count is not None and row.metric in METRICS and METRICS[row.metric].of:
            record[METRICS[row.metric].of] = row.count
    return list(found.values())


def wide(table: Iterable[Row], scenario: str | None = None) -> pd.DataFrame:
    """A frame with one line an arm, for plots: a column a metric, its ends, and each condition."""
    import pandas as pd

    return pd.DataFrame(records(table, scenario))


def one(found: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The single record with these fields.

    Raises:
        ValueError: there is none, or there are several.
    """
    fits = [r for r in found if all(r.get(k) == v for k, v in fields.items())]
    if len(fits) != 1:
        raise ValueError(f"{len(fits)} records have {pairs(fields)}")
    return fits[0]


# ---------------------------------------------------------------------------------------------- files


def is_table(path: Path) -> bool:
    """True if there is a file that rows can be added to."""
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf8") as f:
        return tuple(next(csv.reader(f), ())) == COLUMNS


def read(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf8") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no table of results: its columns must be {', '.join(COLUMNS)}")
        return [_row(line) for line in reader]


def _row(line: Mapping[str, str]) -> Row:
    value, low, high = (None if line[c] == "" else _parsed(line[c]) for c in ("value", "low", "high"))
    count, threads = (int(line[c]) if line[c] else None for c in ("count", "threads"))
    assert value is not None  # a row is written for a number
    given = {**line, "value": value, "low": low, "high": high, "count": count, "threads": threads}
    return Row(**given)  # type: ignore[arg-type]


def _parsed(text: str) -> float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def write(path: Path, found: Iterable[Row | Mapping[str, Any]], scenario: str = "", *, overwrite: bool = False) -> Path:
    """Add rows to a file, in one step: a reader sees the file before or after, never half of it.

    Args:
        path: made, with its folder, if it is not there.
        found: rows, or records.
        scenario: of records that do not say it.
        overwrite: rows of the same key (:attr:`Row.key`) take the place of those that are there.

    Raises:
        ValueError: a row is there already and ``overwrite`` is off, ``found`` has two of one key, or the file is no
            table of results.
    """
    new: list[Row] = []
    for item in found:
        new += [item] if isinstance(item, Row) else rows(item, scenario)
    twice = [key for key, n in Counter(row.key for row in new).items() if n > 1]
    if twice:
        raise ValueError(f"two of the new rows are the same measurement: {', '.join(map(str, twice[0][:5]))}")
    table = {row.key: row for row in read(path)}
    again = [row for row in new if row.key in table]
    if again and not overwrite:
        first = again[0]
        raise ValueError(
            f"{path} has {len(again)} of these rows already ({first.scenario}, {first.method} {first.setting}, "
            f"{first.metric}): measure into another file, or ask for them to be overwritten"
        )
    table.update((row.key, row) for row in new)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", newline="", encoding="utf8") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_cell(v) for v in row] for row in table.values())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _cell(value: Any) -> str:
    """Numbers to six significant digits, whole ones in full; None as an empty field."""
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return str(value)


class Provenance(NamedTuple):
    """Counts of rows, and of those among them that can be traced to a clean commit.

    Attributes:
        rows: in all.
        clean: those that name device, versions, date, and a commit without changes.
        dirty: those whose commit had uncommitted changes.
        unknown: those that name no commit.
    """

    rows: int
    clean: int
    dirty: int
    unknown: int


def provenance(table: Sequence[Row]) -> Provenance:
    """Count where rows come from; what is neither clean, dirty nor without a commit lacks something else."""
    dirty = sum(row.commit.endswith("+") for row in table)
    return Provenance(len(table), sum(row.traced for row in table), dirty, sum(not row.commit for row in table))


def level(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """True if neither of two values lies outside the other's interval: ``(value, low, high)``; an end that is not known
    is the value itself."""
    (low_a, high_a), (low_b, high_b) = ((_end(x, 1), _end(x, 2)) for x in (a, b))
    return low_a <= high_b and low_b <= high_a


def _end(x: Sequence[float | None], which: int) -> float:
    found = x[which] if len(x) > which and x[which] is not None else x[0]
    assert found is not None  # the value is there
    return found
