"""Marked parts about encoders: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from benchmarks.pages.markdown import (
    Results,
    between,
    table,
    value,
)
from tokred.bench import results
from tokred.bench.plots import NAMES


def demo(found: Results) -> str:
    """The demo."""
    lines = []
    for r in found.records("encoder", "demo"):
        base = r["method"] == "unpatched"
        cells = ["unpatched" if base else NAMES.get(r["method"], r["method"]), f"`{r['setting']}`" if not base else ""]
        cells += [str(r["tokens_out"]), f"{r['gmacs']:.3f}", between(r, "top1", "{:.1f}", 100)]
        lines.append([*cells, f"{r['images_per_second']:.3g}", "1" if base else between(r, "speedup")])
    header = ["method", "setting", "tokens left", "GMACs", "top-1 (95 % interval)", "images per second"]
    return table([*header, "speed-up (quartiles)"], lines)


def vit_speed(found: Results) -> str:
    """Vision transformers, end to end, and where the usual way is as fast."""
    rows = found.records("encoder", "vit_speed")
    lines, faster = [], []
    for one in (r for r in rows if r["method"] == "tome" and r["setting"] != "r=0"):
        same = {k: one[k] for k in ("model", "case", "dtype", "threads")}
        ceiling, usual = (results.one(rows, method=m, **same) for m in ("ceiling", "usual"))
        idle = results.one(rows, method="tome", setting="r=0", **same)
        cells = [f"`{one['model']}`", one["setting"], f"{one['dtype']}, {one['threads']}", f"{one['speedup']:.2f}"]
        cells += [f"{ceiling['speedup']:.2f}", between(one, "of_ceiling"), between(usual, "of_ceiling")]
        lines.append([*cells, f"{idle['speedup']:.2f}"])
        a, b = value(usual, "of_ceiling"), value(one, "of_ceiling")
        if a.value > b.value:
            apart = "" if results.level(a, b) else ", outside of the quartiles"
            faster.append(f"`{one['model']}` at `{one['setting']}` in {one['dtype']}{apart}")
    header = ["model", "setting", "type, threads", "speed-up", "ceiling's", "of the ceiling (quartiles)"]
    text = f"The usual way has the higher median in {len(faster)} of {len(lines)} rows, within the quartiles where "
    text += f"nothing else is said: {'; '.join(faster)}."
    return f"{table([*header, 'usual: of the ceiling', 'at `r=0`'], lines, 3)}\n\n{text}"
