"""Marked parts about caches that have learned something, of ``kv/learned``."""

from __future__ import annotations

import itertools

from benchmarks.pages.caches import name
from benchmarks.pages.markdown import Record, Results, Value, between, percent, ranked, table, value
from tokred.bench import results

SHARES = {"0.125": "an eighth", "0.25": "a quarter"}
TASKS = (("prose", ""), ("code", ""), ("number", "after"), ("several", "after"))
WINDOWS = ("prose", "code")
TAUGHT = ("kvzap", "kvzap even", "tokenbutler", "adore", "fastcache")
RIVAL = "kvzip"
AIM = 1.05  # of KVzap: at most so much more perplexity than KVzip's, by a tenth of its time
PART = 0.1
NOTHING = "Not measured yet."


def _records(found: Results, task: tuple[str, str], share: str) -> dict[str, Record]:
    """Records of a task by arm, the full cache's among them."""
    by = {}
    for r in found.records("kv", "learned", data=task[0]):
        of, _, more = r["setting"].partition(" ")
        if r.get("asked", "") == task[1] and of in ("", f"budget={share}"):
            by[f"{r['method']} {more}".strip()] = r
    return by


def _called(arm: str) -> str:
    method, _, more = arm.partition(" ")
    return name(method) + (f", {more}" if more else "")


def _cell(record: Record | None, kind: str, arm: str) -> str:
    if record is None:
        return ""
    if kind not in WINDOWS:
        return between(record, "retrieval", "{:.0f}", 100)
    return "" if arm == "unpatched" else between(record, "perplexity_ratio")


def kv_learned(found: Results) -> str:
    """Every arm at both shares: perplexity, keys, attention that is read, bytes."""
    parts = []
    for share, text in SHARES.items():
        rows = [_records(found, task, share) for task in TASKS]
        arms = dict.fromkeys(arm for by in rows for arm in by)
        lines = []
        for arm in arms:
            first = next(by[arm] for by in rows if arm in by)
            full = next(by["unpatched"] for by in rows if arm in by)
            cells = [_cell(by.get(arm), kind, arm) for by, (kind, _) in zip(rows, TASKS, strict=True)]
            read = [percent(first.get(m), digits=0) for m in ("attention_read", "rows_found")]
            cells += ["" if x == "-" else x for x in read]
            lines.append([_called(arm), *cells, percent(first["bytes"] / full["bytes"], digits=0)])
        if lines:
            header = ["cache", "prose", "code", "number", "several", "attention", "rows", "bytes"]
            parts.append(f"At {text} of the prompt's rows:\n\n{table(header, lines, 1)}")
    return "\n\n".join(parts) or NOTHING


def kv_learned_claims(found: Results) -> str:
    """The aim of KVzap; of each task and share the first, and which of the learned are beyond and behind random."""
    lines = _aims(found)
    for task in TASKS:
        for share, text in SHARES.items():
            rows = {a: r for a, r in _records(found, task, share).items() if a != "unpatched"}
            if len(rows) > 1:
                lines.append(f"- *{task[0]}* at {text}: {_said(rows, task[0])}")
    return "\n".join(lines) or NOTHING


def _metric(kind: str) -> str:
    return "perplexity_ratio" if kind in WINDOWS else "retrieval"


def _said(rows: dict[str, Record], kind: str) -> str:
    windows = kind in WINDOWS
    values = {arm: value(r, _metric(kind)) for arm, r in rows.items()}
    best, level = ranked(values, higher=not windows)
    text = f"the {'lowest' if windows else 'highest'} figure is that of {_called(best)} "
    text += f"({_figure(values[best], windows)}), "
    text += f"level with it are {', '.join(map(_called, level))}." if level else "and none is level with it."
    taught = [arm for arm in TAUGHT if arm in values]
    floor = values.get("random_evict")
    if floor is None or not taught:
        return text
    groups: dict[str, list[str]] = {"better than": [], "level with": [], "worse than": []}
    for arm in taught:
        v = values[arm]
        side = (v.value < floor.value) == windows
        groups["level with" if results.level(v, floor) else "better than" if side else "worse than"].append(arm)
    said = [f"{how} a random choice {', '.join(map(_called, arms))}" for how, arms in groups.items() if arms]
    return f"{text} Of the learned ones, {'; '.join(said)}."


def _figure(v: Value, windows: bool) -> str:
    return f"{v.value:.2f} times the full cache's perplexity" if windows else f"{100 * v.value:.0f} %"


def _aims(found: Results) -> list[str]:
    """Whether KVzap comes near KVzip at an eighth of the rows, and in how much of its time."""
    lines = []
    for kind in WINDOWS:
        rows = _records(found, (kind, ""), "0.125")
        for arm, metric in itertools.product(("kvzap", "kvzap even"), ("over_kvzip", "over_kvzip_recent")):
            r = rows.get(arm)
            if r is None or metric not in r:
                continue
            v = value(r, metric)
            if v.low is None or v.high is None:
                continue
            said = "met" if v.high <= AIM else "missed" if v.low > AIM else "not shown, its interval has both"
            rival = name(RIVAL) + " with newest rows kept as well" * metric.endswith("recent")
            held = percent(r["bytes"] / rows["unpatched"]["bytes"], digits=0)
            lines.append(
                f"- The aim that {_called(arm)} comes within {percent(AIM - 1, digits=0)} % of the perplexity of "
                f"{rival} at an eighth of the rows, on *{kind}*: {said}, {between(r, metric)} times its perplexity, "
                f"with {held} % of the full cache's bytes."
            )
    for tokens in sorted({r["tokens"] for r in found.records("kv", "learned", case="time")}, key=int):
        by = {r["method"] + " even" * r["setting"].endswith("even"): r
              for r in found.records("kv", "learned", case="time", tokens=tokens)}  # fmt: skip
        if {"kvzap", RIVAL} <= by.keys():
            ours, theirs = (by[n]["policy_ms"] for n in ("kvzap", RIVAL))
            parts = [percent(by[n]["policy_share"], digits=0) for n in ("kvzap", RIVAL)]
            said = "met" if ours <= PART * theirs else "missed"
            lines.append(
                f"- The aim of a tenth of {name(RIVAL)}'s extra time at the end of a prompt of {tokens} tokens: "
                f"{said}, {ours:.0f} ms to {theirs:.0f} ms, which are {parts[0]} % and {parts[1]} % of its own time."
            )
    return lines
