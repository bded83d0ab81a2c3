"""A benchmark's rows as text, as HTML for notebooks, and as Markdown for pages."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

from tokred.bench.arms import BASE
from tokred.bench.intervals import Estimate
from tokred.bench.standing import Row, Units, label
from tokred.core.frames import page as notebook

WIDTH = 80
NARROW = 60
ROOM = 21  # characters of a difference with its interval
HEADS = ("quality", "difference [95 %]", "speed", "kept", "MiB")
WIDTHS = (8, ROOM, 6, 9, 5)
SHORT = 3  # columns that a narrow table shows
PART = "_seconds"
# Of a further metric: its units, a title, and its measured rows.
More = tuple[Units, str, Sequence[Row]]
COLUMN = 9  # characters of a column of the second table
MIB = 2**20


def cells(row: Row, units: Units) -> list[str]:
    """The texts of a measured row: quality, difference, speed-up, what is kept, peak memory."""
    found = Estimate(row["difference"], row["difference_low"], row["difference_high"])
    difference = units.between(found)
    if found.half is not None and len(difference) > ROOM:
        difference = f"{units.differences(found.value)[0]} ± {found.half:.1g}"
    if row["tokens_out"] is not None:
        kept = f"{row['tokens_in']:.0f} > {row['tokens_out']:.0f}"
    else:
        share = row["bytes"] / row["dense_bytes"] if row["dense_bytes"] else None
        kept = "" if share is None else f"{share:.0%} bytes" if share < 0.995 else "all bytes"
    memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    base = row["method"] == BASE
    return [units.value(row["quality"]), "" if base else difference, f"{row['speedup']:.2f}x", kept, memory]


def parts(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Columns of the second table, heads and a text a row: seconds of the run's parts, lengths, bytes of the cache."""
    found = []
    names = [name for name in (rows[0] if rows else ()) if name.endswith(PART) or name in ("generated", "bytes")]
    for name in names:
        values = [row[name] for row in rows]
        if all(v is None for v in values):
            continue
        head = {"generated": "tokens", "bytes": "cache MiB"}.get(name, f"{name.removesuffix(PART)}"[:COLUMN])
        scale, form = (MIB, ".3g") if name == "bytes" else (1, ".1f" if name == "generated" else ".3g")
        found.append((head, ["" if v is None else f"{v / scale:{form}}" for v in values]))
    return found


def text(
    rows: Sequence[Row], units: Units, title: str, summary: str, width: int = WIDTH, others: Sequence[More] = ()
) -> str:
    """The table of at most ``width`` characters a line, then further metrics, the parts of the time, the summary."""
    columns = len(HEADS) if width >= WIDTH else SHORT
    # What the columns, and a space before each, leave.
    first = min(width, WIDTH) - sum(WIDTHS[:columns]) - columns

    def line(name: str, values: Sequence[str], widths: Sequence[int]) -> str:
        name = name if len(name) <= first else f"{name[: first - 1]}~"
        return " ".join([f"{name:<{first}}", *(f"{v:>{w}}" for v, w in zip(values, widths, strict=False))]).rstrip()

    lines = [*textwrap.wrap(title, width), line("", HEADS[:columns], WIDTHS)]
    for row in rows:
        if row["quality"] is not None:
            lines.append(line(label(row), cells(row, units)[:columns], WIDTHS))
        else:
            reason = f"{label(row)}: not measured. {row['reason']}"
            lines += textwrap.wrap(reason, width, subsequent_indent="    ")
    for own, head, found in others:
        lines += textwrap.wrap(head, width)
        lines += [line(label(row), cells(row, own)[:2], WIDTHS) for row in found]
    there = [row for row in rows if row["quality"] is not None]
    more, fits = parts(there), (min(width, WIDTH) - first) // (COLUMN + 1)
    for i in range(0, len(more), fits):
        some = more[i : i + fits]
        widths = [COLUMN] * len(some)
        timed = any(f"{head}{PART}" in row for head, _ in some for row in there[:1])
        lines.append(line("seconds of the parts" if timed else "", [head for head, _ in some], widths))
        lines += [line(label(row), [texts[k] for _, texts in some], widths) for k, row in enumerate(there)]
    return "\n".join([*lines, *textwrap.wrap(summary, width)])


def page(rows: Sequence[Row], units: Units, title: str, summary: str, others: Sequence[More] = ()) -> str:
    """The same as HTML; the parts of the time are folded away, so that the table fits a page."""
    heads, lines = _whole(rows, units, others)
    there = [row for row in rows if row["quality"] is not None]
    main = len(heads) - len(parts(there))
    table = [
        [label(row), *(found[: main - 1] if found else [f"not measured. {row['reason']}"])]
        for row, found in zip(rows, lines, strict=True)
    ]
    shown = notebook(title, heads[:main], table)
    if main < len(heads):
        rest = [[label(row), *found[main - 1 :]] for row, found in zip(rows, lines, strict=True) if found]
        folded = notebook("", [heads[0], *heads[main:]], rest)
        shown += f"<details><summary>parts of the time, and what was written and held</summary>{folded}</details>"
    return f"{shown}<p>{html.escape(summary)}</p>"


def markdown(rows: Sequence[Row], units: Units, title: str, summary: str, others: Sequence[More] = ()) -> str:
    """The same as Markdown: the title, the table, and the summary."""
    heads, lines = _whole(rows, units, others)

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.replace("|", "\\|").replace("\n", " ") for v in values) + " |"

    table = [line(heads), "|" + "|".join([" --- ", *[" ---: "] * (len(heads) - 1)]) + "|"]
    for row, found in zip(rows, lines, strict=True):
        if row["quality"] is None:
            found = [f"not measured: {row['reason']}", *[""] * (len(heads) - 2)]
        table.append(line([f"`{label(row)}`" if row["method"] != BASE else BASE, *found]))
    return "\n".join([f"{title}.", "", *table, "", summary])


def _whole(rows: Sequence[Row], units: Units, others: Sequence[More]) -> tuple[list[str], list[list[str]]]:
    """Heads, and the cells of every row with further metrics and its parts; none for rows that were not measured."""
    there = [row for row in rows if row["quality"] is not None]
    more = parts(there)
    extra: list[tuple[str, list[str]]] = []
    for own, _, found in others:
        values, differences = zip(*(cells(row, own)[:2] for row in found), strict=True)
        extra += [(own.metric, [*values]), (f"{own.metric}, {HEADS[1]}", [*differences])]
    more = [*extra, *more]
    heads = ["method", *HEADS, *(f"{head} s" if f"{head}{PART}" in there[0] else head for head, _ in more)]
    made = {id(row): [*cells(row, units), *(texts[k] for _, texts in more)] for k, row in enumerate(there)}
    return heads, [made.get(id(row), []) for row in rows]
