"""What pages share: the tables of results, Markdown, values with their intervals, and words for how they compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokred.bench import results

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
Record = dict[str, Any]


class Results:
    """All tables of a folder.

    Args:
        folder: with one table a wing.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    @cached_property
    def tables(self) -> dict[str, list[results.Row]]:
        """Rows by wing."""
        return {path.stem: results.read(path) for path in sorted(self.folder.glob("*.csv"))}

    def records(self, wing: str, scenario: str, **fields: Any) -> list[Record]:
        """Those of a scenario that have these fields; a field that is None is not there."""
        found = results.records(self.tables.get(wing, ()), scenario)
        return [r for r in found if all(r.get(k) == v for k, v in fields.items())]


class Value(NamedTuple):
    """A value and what it lies between; where no interval is known, the ends are None."""

    value: float
    low: float | None = None
    high: float | None = None


def value(record: Mapping[str, Any], metric: str, times: float = 1.0) -> Value:
    """A metric of a record, in other units."""
    ends = (record.get(f"{metric}{end}") for end in ("_low", "_high"))
    return Value(times * record[metric], *(None if end is None else times * end for end in ends))


def compared(a: Value, b: Value, higher: bool = True) -> str:
    """``"level with"``, ``"better than"`` or ``"worse than"``: only outside of one another's intervals is it one."""
    if results.level(a, b):
        return "level with"
    return "better than" if (a.value > b.value) == higher else "worse than"


def ranked(values: Mapping[str, Value], higher: bool = True) -> tuple[str, list[str]]:
    """The best by its value, and those that are level with it."""
    order = sorted(values, key=lambda n: values[n].value, reverse=higher)
    return order[0], [n for n in order[1:] if results.level(values[n], values[order[0]])]


def beside(values: Mapping[str, Value], base: str, higher: bool = True) -> dict[str, list[str]]:
    """Names by how they compare with one of them, best first."""
    order = sorted(values, key=lambda n: values[n].value, reverse=higher)
    found: dict[str, list[str]] = {"better than": [], "level with": [], "worse than": []}
    for name in order:
        if name != base:
            found[compared(values[name], values[base], higher)].append(name)
    return found


def code(names: Iterable[str]) -> str:
    """Names of methods with commas, or "none"."""
    return ", ".join(f"`{n}`" for n in names) or "none"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """A Markdown table; every column but the first ``left`` is aligned to the right."""
    rule = [*["---"] * left, *["---:"] * (len(header) - left)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def percent(number: float | None, sign: bool = False, digits: int = 1) -> str:
    """A share in percent, or a dash."""
    if number is None:
        return "-"
    return f"{100 * number:{'+' if sign else ''}.{digits}f}"


def counted(counts: Sequence[int]) -> str:
    """Numbers of samples, ascending, in a sentence: ``"4 to 8"``."""
    return "no" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def between(record: Mapping[str, Any], metric: str, form: str = "{:.2f}", times: float = 1.0) -> str:
    """``1.58 (1.47 to 1.69)``."""
    found = value(record, metric, times)
    if found.low is None:
        return form.format(found.value)
    return f"{form.format(found.value)} ({form.format(found.low)} to {form.format(found.high)})"


def source(record: Mapping[str, Any], *more: str) -> str:
    """Where figures come from, as one line."""
    versions = [v.replace("=", " ") for v in record["versions"].split() if v.startswith(("torch=", "tokred="))]
    where = [record["device"] or "device unknown", f"{record['threads']} threads", record["dtype"], *more]
    return f"{', '.join(where)}; {', '.join(versions)} at {record['commit'] or 'an unknown commit'}, {record['date']}."


def filled(text: str, parts: Mapping[str, Callable[[Results], str]], found: Results) -> str:
    """A page with its marked parts made anew.

    Raises:
        KeyError: a part is marked that nothing makes.
        ValueError: a part is made that is marked nowhere.
    """
    pattern = r"<!-- results: (\w+) -->\n.*?<!-- end of \1 -->"
    missing = [name for name in parts if f"<!-- results: {name} -->" not in text]
    if missing:
        raise ValueError(f"no part of the page is marked {', '.join(missing)}")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- results: {name} -->\n\n{parts[name](found)}\n\n<!-- end of {name} -->"

    return re.sub(pattern, made, text, flags=re.S)
