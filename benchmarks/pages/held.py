"""Marked parts and the plot about quality over the bytes that caches hold, of ``kv/bytes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kv.holding import CLAIMED, FORMATS, RATIOS, is_product
from benchmarks.pages.markdown import Record, Results, Value, counted, percent, ranked, table, value
from tokred.bench import plots

GOALS = tuple(sorted(RATIOS))
WINDOWS, KEYS = ("prose", "table"), ("several", "answer")
METRICS = {"prose": "perplexity_ratio", "table": "perplexity_ratio", "several": "retrieval", "answer": "contains"}
# Products that the claim is about, named before they were measured. The first: its score is first in kv/tasks, four
# bits lose little, and even heads have no empty rows in a format. The second, named when the first had found no number:
# heads as uneven as the score wants them, in the format in which most were found.
NAMED = ("`kvzip` with even heads in `kivi-4`", "`kvzip` in `turbo-4`")
NOTHING = "Not measured yet."


def kind(record: Record) -> str:
    """``"product"``, ``"format"`` or ``"policy"``."""
    if is_product(record["setting"]):
        return "product"
    return "format" if record["method"] in FORMATS else "policy"


def called(record: Record) -> str:
    """An arm without what was solved of it: name, and the parts or the store that tell it from others of that name."""
    given = dict(part.partition("=")[::2] for part in record["setting"].split())
    name = f"`{record['method']}`"
    if record["method"] == "kv":
        name = "R-KV's score" if given.get("score") == "redundancy" else "merging `kvzip`"
    if given.get("budget", "").startswith("even"):
        name += " with even heads"
    return f"{name} in `{given['store'].removeprefix('tight-')}`" if "store" in given else name


def _arms(found: Results, data: str) -> dict[str, dict[int, Record]]:
    """Records of a kind of texts by arm and ratio: policies, formats, products, each in the order of the table."""
    rows = [r for r in found.records("kv", "bytes", data=data) if r.get("goal")]
    order = {"policy": 0, "format": 1, "product": 2}
    by: dict[str, dict[int, Record]] = {}
    for r in sorted(rows, key=lambda r: order[kind(r)]):
        by.setdefault(called(r), {})[int(r["goal"])] = r
    return by


def _full(found: Results, data: str) -> Record | None:
    rows = found.records("kv", "bytes", data=data, method="unpatched")
    return rows[0] if rows else None


def _cell(record: Record | None, data: str) -> str:
    if record is None:
        return ""
    windows = data in WINDOWS
    v, form = value(record, METRICS[data], 1 if windows else 100), "{:.2f}" if windows else "{:.0f}"
    return form.format(v.value) + (
        "" if v.low is None or v.high is None else f" ({form.format(v.low)} to {form.format(v.high)})"
    )


def _tables(found: Results, kinds: tuple[str, ...]) -> str:
    parts = []
    for data in kinds:
        by = _arms(found, data)
        if by:
            lines = [[n, *(_cell(mine.get(g), data) for g in GOALS)] for n, mine in by.items()]
            parts.append(table([f"*{data}*", *(f"{g}:1" for g in GOALS)], lines, 1))
    return "\n\n".join(parts) or NOTHING


def kv_bytes(found: Results) -> str:
    """Perplexity over the full cache's at equal bytes."""
    full = _full(found, "prose")
    if full is None:
        return NOTHING
    counts = sorted({r["prompts"] for r in found.records("kv", "bytes", data="prose") if r.get("goal") in CLAIMED})
    text = (
        f"A full cache in {full['dtype']} holds {full['bytes'] / 1e6:.1f} MB for the {full['length']:,} tokens of a "
        f"prompt; it is 1:1. At 8:1 and 16:1 {counted(counts)} windows of prose."
    )
    off = {
        f"{n} at {r['goal']}:1": r["bytes_share"] * r["goal"] - 1
        for n, by in _arms(found, "prose").items()
        for r in by.values()
    }
    if off:
        least = min(off, key=lambda n: off[n])
        text += f" At most {percent(max(0.0, *off.values()))} % more is held than was asked for, and at most "
        text += f"{percent(max(0.0, -off[least]))} % less ({least}): bits and rows are whole."
    return f"{text}\n\n{_tables(found, WINDOWS)}\n\n![Quality over the bytes that a cache holds](img/kv_bytes.png)"


def kv_bytes_keys(found: Results) -> str:
    """Keys found at equal bytes, and the length of answers."""
    lines = []
    for name, by in _arms(found, "answer").items():
        cells = [f"{r['generated']:.1f}" if (r := by.get(g)) and "generated" in r else "" for g in CLAIMED]
        lines.append([name, *cells])
    lengths = table(["tokens of an answer", *(f"{g}:1" for g in CLAIMED)], lines, 1) if lines else ""
    full = _full(found, "answer")
    text = f"The full cache's answers have {full['generated']:.1f} tokens, their end counted." if full else ""
    tables = _tables(found, KEYS)
    return "\n\n".join(part for part in (_whole(found), tables, lengths and text, lengths) if part)


def _whole(found: Results) -> str:
    said = []
    for data in KEYS:
        full = _full(found, data)
        if full:
            said.append(f"{_cell(full, data)} % of *{data}*")
    return f"The full cache finds {' and '.join(said)}." if said else ""


def kv_bytes_claims(found: Results) -> str:
    """Whether the products that were named beat every single one; of each kind and ratio the first, and its equals."""
    lines = [_aim(found, goal) for goal in CLAIMED]
    lines += _again(found)
    for data in (*WINDOWS, "several"):
        lines += [_first(found, data, goal) for goal in GOALS]
    lines.append(_reach(found))
    return "\n".join(f"- {line}" for line in lines if line) or NOTHING


def _aim(found: Results, goal: int) -> str:
    """The aim: a product beats every policy and every format, by the paired interval to the nearest of them."""
    texts = []
    for name in NAMED:
        said = []
        for data in (*WINDOWS, *KEYS):
            r = _arms(found, data).get(name, {}).get(goal, {})
            if _over(data) in r:
                v, form = value(r, _over(data)), "{:.2f}" if data in WINDOWS else "{:+.0%}"
                what = "times its perplexity" if data in WINDOWS else "of the keys"
                span = f"{form.format(v.value)} ({form.format(v.low)} to {form.format(v.high)}) {what}"
                aim = "met" if _beats(r, data) else "not shown"
                said.append(f"on *{data}* {aim}, {span} beside the one it beats least surely")
        if said:
            texts.append(f"{name}, which was named before it was measured: {'; '.join(said)}.")
    every = []
    for data in (*WINDOWS, "several"):
        rows = {n: by[goal] for n, by in _arms(found, data).items() if goal in by and _over(data) in by[goal]}
        if rows:
            every.append(f"{_some([n for n, r in rows.items() if _beats(r, data)])} of {len(rows)} on *{data}*")
    if every:
        texts.append(f"Of all products, whose many comparisons are not allowed for: {'; '.join(every)}.")
    head = f"The aim at {goal}:1, that a product beats every policy and every format:"
    return "\n    - ".join([head, *texts]) if texts else ""


def _again(found: Results) -> list[str]:
    """The named product beside its policy on samples that no other run has."""
    lines, rows = [], found.records("kv", "bytes_again", data="several")
    alone = {r.get("goal"): r for r in rows if "store=" not in r["setting"]}
    for r in rows:
        if is_product(r["setting"]) and _over("several") in r:
            v, kept = value(r, _over("several")), alone[r["goal"]]
            text = f"{'met' if _beats(r, 'several') else 'not shown'}, {v.value:+.0%} ({v.low:+.0%} to {v.high:+.0%})"
            cells = f"{_cell(r, 'several')} % beside {_cell(kept, 'several')} %"
            lines.append(
                f"Asked again at {int(r['goal'])}:1 on {int(r['prompts'])} new samples of *several*, "
                f"{called(r)} beside `{r['method']}` alone, which had come nearest: {text} of the keys, {cells}."
            )
    return lines


def _over(data: str) -> str:
    return "over_single" if data in WINDOWS else "keys_over_single"


def _beats(record: Record, data: str) -> bool:
    """Whether the whole paired interval lies on the good side of equal."""
    v = value(record, _over(data))
    assert v.low is not None  # they are written together
    assert v.high is not None
    return v.high < 1 if data in WINDOWS else v.low > 0


def _first(found: Results, data: str, goal: int) -> str:
    rows = {name: by[goal] for name, by in _arms(found, data).items() if goal in by}
    rows = {name: r for name, r in rows.items() if METRICS[data] in r}
    if len(rows) < 2:
        return ""
    windows = data in WINDOWS
    values = {n: value(r, METRICS[data]) for n, r in rows.items()}
    best, level = ranked(values, higher=not windows)
    single = {n: v for n, v in values.items() if kind(rows[n]) != "product"}
    text = f"*{data}* at {goal}:1: the {'lowest' if windows else 'highest'} figure is that of {best} "
    text += f"({_figure(values[best], windows)})"
    if best not in single and single:
        alone = ranked(single, higher=not windows)[0]
        text += f", of policies and formats alone that of {alone} ({_figure(single[alone], windows)})"
    return f"{text}; level with the first by the 95 % intervals: {_some(level)}."


def _some(names: list[str]) -> str:
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return ", ".join(names) or "none"


def _figure(v: Value, windows: bool) -> str:
    return f"{v.value:.2f} times the full cache's perplexity" if windows else f"{100 * v.value:.0f} %"


def _reach(found: Results) -> str:
    """How far each format goes by itself."""
    most: dict[str, int] = {}
    for r in found.records("kv", "bytes", data="prose"):
        if r.get("goal") and kind(r) == "format":
            most[r["method"]] = max(most.get(r["method"], 0), int(r["goal"]))
    if not most:
        return ""
    ends = ", ".join(f"`{n}` {g}:1" for n, g in sorted(most.items(), key=lambda x: -x[1]))
    return f"Formats by themselves end here, scales, positions and newest rows counted: {ends}."


def kv_take(found: Results) -> str:
    """What to take at each ratio: the first of all, and of what is no product, on windows and on keys."""
    lines, kinds = [], [d for d in (*WINDOWS, "several") if _arms(found, d)]
    for goal in GOALS:
        cells = []
        for data in kinds:
            rows = {n: by[goal] for n, by in _arms(found, data).items() if goal in by}
            rows = {n: r for n, r in rows.items() if METRICS[data] in r}
            windows = data in WINDOWS
            for some in (rows, {n: r for n, r in rows.items() if kind(r) != "product"}):
                values = {n: value(r, METRICS[data]) for n, r in some.items()}
                best = ranked(values, higher=not windows)[0] if values else ""
                cells.append(f"{best}, {_cell(some[best], data)}" if best else "")
        if any(cells):
            lines.append([f"{goal}:1", *cells])
    if not lines:
        return NOTHING
    alone = ["policies and formats alone", *("alone" for _ in kinds[1:])]
    pairs = [(f"{data}, of all", single) for data, single in zip(kinds, alone, strict=True)]
    header = ["bytes", *(cell for pair in pairs for cell in pair)]
    return table(header, lines, len(header))


# ---------------------------------------------------------------------------------------------- the plot

DRAWN = 6  # products that are drawn in colours of their own
TOP = 4.0  # times the full cache's perplexity; what lies above is left to the table


def _drawn(found: Results) -> list[str]:
    """Products with the lowest perplexity of prose where something is claimed, and those that are named."""
    by = {n: mine for n, mine in _arms(found, "prose").items() if kind(next(iter(mine.values()))) == "product"}
    figure = {
        n: min((mine[g]["perplexity_ratio"] for g in CLAIMED if g in mine), default=TOP) for n, mine in by.items()
    }
    order = sorted(figure, key=lambda n: (n not in NAMED, figure[n]))
    return order[:DRAWN]


def plot(found: Results, folder: Path) -> list[Path]:
    """Perplexity and keys over the bytes held: products in colours, formats broken, policies grey."""
    panels = [d for d in ("prose", "table", "several") if _arms(found, d)]
    if not panels:
        return []
    figure, axes = plots.subplots(1, len(panels), figsize=(3.3 * len(panels), 4.8), squeeze=False,
                                  layout="constrained")  # fmt: skip
    goals = [g for g in reversed(GOALS) if any(g in by for d in panels for by in _arms(found, d).values())]
    for axis, data in zip(axes[0], panels, strict=True):
        _draw(axis, found, data)
        axis.set(xscale="log", xlabel="share of its bytes held", title=data)
        axis.set_xticks([1 / g for g in goals], [f"1/{g}" for g in goals])
        axis.minorticks_off()
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = len(panels) + 1
    figure.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, ncols=columns, loc="outside lower center"
    )
    full = _full(found, panels[0])
    if full:
        title = f"{full['model']}, prompts of {full['length']:,} tokens; 1 is a full cache in {full['dtype']}"
        figure.suptitle(title, fontsize=10)
    return [plots.save(figure, folder / "kv_bytes.png")]


def _draw(axis: Any, found: Results, data: str) -> None:
    by = _arms(found, data)
    windows, metric = data in WINDOWS, METRICS[data]
    shown = _drawn(found)
    formats = 0
    for name, mine in by.items():
        rows = sorted(mine.values(), key=lambda r: r["bytes_share"])
        xs, ys = [r["bytes_share"] for r in rows], [(1 if windows else 100) * r[metric] for r in rows]
        what, label = kind(rows[0]), name.replace("`", "")
        if what == "product":
            if name not in shown:
                continue
            look = plots.look(shown.index(name))
            axis.plot(xs, ys, color=look.colour, marker=look.marker, markersize=5, linewidth=1.8, label=label, zorder=4)
        elif what == "format":
            style = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)))[formats % 5]
            axis.plot(xs, ys, color="#222222", linestyle=style, marker="sDv^Xo"[formats % 6], markersize=4.5,
                      markerfacecolor="white", linewidth=1.1, label=f"{label} alone", zorder=3)  # fmt: skip
            formats += 1
        else:
            grey = {"random_evict": "#d08080", "kvzip": "#777777", "snapkv": "#999999"}.get(label, "#cccccc")
            named = label in ("random_evict", "kvzip", "snapkv")
            axis.plot(xs, ys, color=grey, marker="o", markersize=2.5, linewidth=1.6 if named else 0.9, zorder=2,
                      label=f"{label} alone" if named else "other policies")  # fmt: skip
    if windows:
        axis.axhline(1, color="black", linewidth=0.8, label="full cache")
        axis.set(ylabel="times the full cache's perplexity", yscale="log")
        axis.set_ylim(top=min(axis.get_ylim()[1], TOP))
        ends = axis.get_ylim()
        steps = [t for t in (1, 1.2, 1.5, 2, 3, 4) if ends[0] * 0.95 <= t <= ends[1]]
        axis.set_yticks(steps, [f"{t:g}" for t in steps])
    else:
        full = _full(found, data)
        if full:
            axis.axhline(100 * full[metric], color="black", linewidth=0.8, label="full cache")
        axis.set(ylabel="keys found (%)", ylim=(-3, 103))
