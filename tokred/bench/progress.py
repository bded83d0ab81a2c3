"""Progress of a benchmark: a bar on a terminal, a line a row elsewhere; and what a row of the table is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from tokred.bench.entries import Entry, work
from tokred.bench.parts import PARTS
from tokred.bench.scoring import Scorer
from tokred.bench.table import COLUMNS

KEPT = ", kept from an earlier run"
# Columns that bear the names of a record's fields.
MEASURED = (
    "difference", "difference_low", "difference_high", "speedup", "speedup_low", "speedup_high", "seconds", "peak_mib",
    "forward_mib", "tokens_in", "tokens_out", "bytes", "dense_bytes", "generated",
    *(f"{part}_seconds" for part in PARTS),
)  # fmt: skip


def row_of(one: Entry, record: dict[str, Any], score: Scorer) -> dict[str, Any]:
    """A row of the table by one metric, with the keys of :data:`~tokred.bench.table.COLUMNS`, from a record."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"method": one.name, "setting": one.setting, "stage": one.stage, "baseline": one.baseline}
    row |= {"metric": score.name, "reason": ""}
    if "reason" in record:
        return row | {"reason": record["reason"]}
    field = score.field
    row |= {name: record[name] for name in MEASURED if name in record}
    row |= {"quality": record[field], "low": record.get(f"{field}_low"), "high": record.get(f"{field}_high")}
    return row | {"samples": record[f"{field}_count"], "rows": record.get("rows_left"), "work": work(record)}


@contextmanager
def telling(
    progress: bool, scores: Sequence[Scorer]
) -> Iterator[tuple[Callable[[int], None], Callable[..., list[dict[str, Any]]]]]:
    """Two functions: one says how many rows there will be, the other makes rows of records, one a metric, and tells."""
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

        def tell(one: Entry, records: Sequence[dict[str, Any]], kept: bool = False) -> list[dict[str, Any]]:
            count[0] += 1
            rows = [row_of(one, record, score) for record, score in zip(records, scores, strict=True)]
            if shown is not None:
                shown.update(task, advance=1, description=one.label)
            elif progress:
                why = rows[0]["reason"]
                found = [f"{row['metric']} {row['quality']:.4g} ({row['difference']:+.2g})" for row in rows if not why]
                says = f"not measured: {why}" if why else f"{', '.join(found)}, {rows[0]['speedup']:.2f}x{KEPT * kept}"
                print(f"{count[0]}/{count[1]} {one.label}: {says}", file=sys.stderr, flush=True)
            return rows

        yield total, tell
