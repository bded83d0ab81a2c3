"""Marked parts about the windows, keys and summaries of ``kv/tasks``: tables, which tasks are kept, and claims."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pages.caches import name
from benchmarks.pages.markdown import Record, Results, Value, code, counted, percent, ranked, table, value

RANDOM = "random_evict"
KEPT = 4.0  # standard errors between the first and a random choice, at some budget
BEYOND = 3.0  # standard errors to a random choice that are more than chance, of a score of policies
WINDOWS = ("prose", "code", "table", "copy")
KEYS = ("number", "word", "several", "lines", "chain")
SHARES = {"0.5": "a half", "0.25": "a quarter", "0.125": "an eighth"}
MOST = "0.25"  # the budget of the tables


def _records(found: Results, data: str, asked: str = "", share: str = MOST) -> dict[str, Record]:
    """Records of a task by policy: the full cache's, and those of a budget."""
    rows = [r for r in found.records("kv", "tasks", data=data) if r.get("asked", "") == asked]
    return {r["method"]: r for r in rows if r["setting"] in ("", f"budget={share}")}


def _tasks(found: Results) -> list[tuple[str, str]]:
    """Kinds and orders that were measured, in the order of the page."""
    there = {(r["data"], r.get("asked", "")) for r in found.records("kv", "tasks")}
    wanted = [(kind, "") for kind in WINDOWS]
    wanted += [(kind, asked) for kind in KEYS for asked in ("after", "before")] + [("summary", "after")]
    return [task for task in wanted if task in there]


def _metric(kind: str) -> str:
    return "perplexity_ratio" if kind in WINDOWS else "overlap" if kind == "summary" else "retrieval"


def _shares(found: Results, task: tuple[str, str]) -> list[str]:
    return [s for s in SHARES if len(_records(found, *task, s)) > 1]


def _first(found: Results, task: tuple[str, str]) -> tuple[float, str, str] | None:
    """Standard errors of the policy that is farthest from a random choice, its name, and the budget."""
    every = [
        (r["apart"], n, s) for s in _shares(found, task) for n, r in _records(found, *task, s).items() if "apart" in r
    ]
    return max(every, default=None)


def _called(task: tuple[str, str]) -> str:
    kind, asked = task
    return f"{kind}, asked {asked}" if kind in KEYS else kind


def kv_tasks_kept(found: Results) -> str:
    """Every task with the full cache's and a random choice's figure, and whether it tells policies apart."""
    lines, kept, dropped = [], [], []
    for task in _tasks(found):
        first = _first(found, task)
        if first is None:
            continue
        apart, best, share = first
        rows = _records(found, *task, share)
        metric = "perplexity" if task[0] in WINDOWS else _metric(task[0])
        form = "{:.2f}" if metric == "perplexity" else "{:.0%}"
        shown = [form.format(rows[n][metric]) for n in ("unpatched", RANDOM, best)]
        stays = apart >= KEPT
        (kept if stays else dropped).append(_called(task))
        count = rows[best].get("apart_count", "")
        cells = [_called(task), str(count), *shown[:2], f"`{best}`", f"{percent(float(share))} %", shown[2]]
        lines.append([*cells, f"{apart:.1f}", "kept" if stays else "dropped"])
    header = ["task", "samples", "full cache", "random", "farthest from random", "at", "its figure"]
    text = f"Kept are {', '.join(kept) or 'none'}. Dropped, since no policy is {KEPT:g} standard errors better than a "
    text += f"random choice at any budget: {', '.join(dropped) or 'none'}."
    return f"{_there(found)}\n\n{table([*header, 'standard errors apart', ''], lines, 1)}\n\n{text}"


def _there(found: Results) -> str:
    """What was measured, and what was not yet."""
    rows = [r for r in found.records("kv", "tasks") if r["method"] != "unpatched"]
    shares = [text for share, text in SHARES.items() if any(r["setting"] == f"budget={share}" for r in rows)]
    known = dict.fromkeys(r["method"] for r in found.records("kv", "quality") if r["method"] != "unpatched")
    there = {r["method"] for r in rows}
    kinds = {r["data"] for r in rows}
    counts = sorted({r["apart_count"] for r in rows if "apart_count" in r})
    some = {n for n in there if {r["data"] for r in rows if r["method"] == n} < kinds}
    text = f"Measured are {', '.join(shares) or 'no part'} of the cache, with {counted(counts)} samples a task"
    missing = [f"`{n}`" for n in known if n not in there]
    text += f"; not yet: {', '.join(k for k in (*WINDOWS, *KEYS, 'summary') if k not in kinds) or 'no task'}"
    text += f"; of no task: {', '.join(missing)}" if missing else ""
    return text + (f"; of some tasks only: {code(sorted(some))}." if some else ".")


def _kept(found: Results) -> list[tuple[str, str]]:
    return [t for t in _tasks(found) if (first := _first(found, t)) is not None and first[0] >= KEPT]


def kv_tasks(found: Results) -> str:
    """Every policy at a quarter: windows, then keys and summaries."""
    tasks = _tasks(found)
    parts = []
    for kinds in ([t for t in tasks if t[0] in WINDOWS], [t for t in tasks if t[0] not in WINDOWS]):
        rows = [_records(found, *task) for task in kinds]
        names = dict.fromkeys(n for by in rows for n in by if n != "unpatched" or kinds[0][0] not in WINDOWS)
        lines = [[name(n), *(_cell(by.get(n), task[0]) for by, task in zip(rows, kinds, strict=True))] for n in names]
        if lines:
            parts.append(table(["policy", *map(_called, kinds)], lines, 1))
    return "\n\n".join(parts)


def _cell(row: Record | None, kind: str) -> str:
    if row is None or _metric(kind) not in row:
        return ""
    v = value(row, _metric(kind), 1 if kind in WINDOWS else 100)
    form = "{:.2f}" if kind in WINDOWS else "{:.0f}"
    ends = "" if v.low is None or v.high is None else f" ({form.format(v.low)} to {form.format(v.high)})"
    return form.format(v.value) + ends


def kv_tasks_claims(found: Results) -> str:
    """Of each kept task and budget: the first, who is level with it, and who is better and worse than random."""
    lines = []
    for task in _kept(found):
        for share in _shares(found, task):
            rows = {n: r for n, r in _records(found, *task, share).items() if n != "unpatched"}
            lines.append(f"- {_called(task)}, {SHARES[share]} of the cache: {_said(rows, task[0])}")
    return "\n".join(lines)


def _said(rows: dict[str, Record], kind: str) -> str:
    values = {n: value(r, _metric(kind)) for n, r in rows.items()}
    best, level = ranked(values, higher=kind not in WINDOWS)
    text = (
        f"the {'lowest' if kind in WINDOWS else 'highest'} figure is that of `{best}` ({_figure(values[best], kind)}), "
    )
    text += f"level with it are {code(level)}." if level else "and none is level with it."
    better, worse, rest = _beside(rows)
    if best == RANDOM or RANDOM in level:
        text += " A random choice is among them."
    text += f" Beyond {BEYOND:g} standard errors better than random: {code(better)}"
    text += f"; worse: {code(worse)}" if worse else ""
    return f"{text}; not told from it: {code(rest)}."


def _figure(v: Value, kind: str) -> str:
    return f"{v.value:.2f} times the full cache's perplexity" if kind in WINDOWS else f"{100 * v.value:.0f} %"


def _beside(rows: dict[str, Record]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    apart = {n: r["apart"] for n, r in rows.items() if "apart" in r}
    order = sorted(apart, key=lambda n: -apart[n])
    better = [n for n in order if apart[n] >= BEYOND]
    worse = [n for n in order if apart[n] <= -BEYOND]
    return better, worse, [n for n in order if n not in better and n not in worse]
