"""``tokred.benchmark`` as the benchmarks here use it: several measures of one model, as records of one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tokred
from tokred.bench import feeds, results
from tokred.bench.entries import entry
from tokred.bench.metrics import METRICS

Record = dict[str, Any]
# Columns of the engine's rows that are metrics of the table by the same names.
SAME = (
    "speedup",
    "speedup_low",
    "speedup_high",
    "seconds",
    "tower_seconds",
    "encoder_seconds",
    "selection_seconds",
    "prompt_seconds",
    "decode_seconds",
    "peak_mib",
    "forward_mib",
    "tokens_in",
    "tokens_out",
    "bytes",
    "generated",
)


def measured(
    model: Any,
    methods: Sequence[Any] | Mapping[str, Any],
    data: Any,
    metrics: Mapping[str, str | Callable[..., Any]],
    *,
    name: str,
    data_from: str = "",
    values: Path | None = None,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Record]:
    """Rows of methods by several metrics, the unpatched model's first; those that cannot run are told and left out.

    Args:
        model, data: as :func:`tokred.benchmark` takes them.
        methods: likewise, or from what stands in the table, ``"cat budget=64"``, to each.
        metrics: from the names of metrics in the table to what the engine takes, all in one pass. Where the table knows
            a metric's difference to the unpatched model, or its value of the worst sample, these are there too.
        name: of the model.
        data_from: packages that the data come from, as :func:`benchmarks.zoo.carriers.cited` names them.
        values: a folder for the engine's own table, by which a run that was broken off goes on.
        more: fields of every record.
        options: more arguments of :func:`tokred.benchmark`.
    """
    chosen = methods if isinstance(methods, Mapping) else {entry(one).label: one for one in methods}
    labels = {entry(one).label: label for label, one in chosen.items()}
    out = None if values is None else values / "values.csv"
    table = tokred.benchmark(
        model, [*chosen.values()], data, [*metrics.values()], name=name, out=out, baselines=False, **options
    )
    first = next(feeds.modules(model)[0].parameters())
    source = results.here(options.get("device") or first.device, first.dtype)
    source["versions"] = f"{source['versions']} {data_from}".strip()
    # A pair is timed on every batch, or on so many as were asked for.
    rounds = max(options.get("rounds", 5), len(data) if hasattr(data, "__len__") else 1)
    rounds = min(rounds, options.get("pairs") or rounds)
    found: dict[str, Record] = {}
    for field, metric in zip(metrics, table.metrics, strict=True):
        judged = table.by(metric)
        for row in judged.rows:
            label = f"{row['method']} {row['setting']}".strip()
            if row["quality"] is None:
                if metric == table.metric:
                    print(f"{labels.get(label, label)}: {row['reason']}", file=sys.stderr, flush=True)
                continue
            method, _, setting = labels.get(label, label).partition(" ")
            head = {"model": name, "method": method, "setting": setting, **(more or {}), **source}
            record = found.setdefault(label, {**head, **_costs(row), "rounds": rounds})
            tally = judged.samples.get(label)
            # Words, tokens: where samples have weights, these are what was counted.
            count = row["samples"] if tally is None else round(sum(tally.weights))
            record |= _ends(field, row, "quality", "low", "high") | {f"{field}_count": count}
            if f"{field}_difference" in METRICS:
                ends = ("difference", "difference_low", "difference_high")
                record |= _ends(f"{field}_difference", row, *ends)
            if f"{field}_lowest" in METRICS and tally is not None:
                record[f"{field}_lowest"] = min(tally.values)
    return list(found.values())


def _costs(row: Mapping[str, Any]) -> Record:
    """Work, speed and memory of a row."""
    costs = {column: row[column] for column in SAME if row.get(column) is not None}
    costs = {k: v for k, v in costs.items() if k.removesuffix("_low").removesuffix("_high") in METRICS}
    return costs | ({"gmacs_share": row["work"]} if row.get("work") is not None and row["rows"] is None else {})


def _ends(field: str, row: Mapping[str, Any], *columns: str) -> Record:
    names = (field, f"{field}_low", f"{field}_high")
    return {n: row[c] for n, c in zip(names, columns, strict=True) if row[c] is not None}


def threads(count: int | None) -> None:
    """Let torch use so many threads."""
    if count:
        torch.set_num_threads(count)
