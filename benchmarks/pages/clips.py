"""Marked parts about clips and streams: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pages.markdown import Record, Results, between, code, counted, percent, ranked, table, value
from tokred.bench.arms import BASE

# Answers that are right without looking: one of ten classes, of four ways, of three spans of time.
CHANCES = {"what": 1 / 10, "way": 1 / 4, "when": 1 / 3}
CHANCE = sum(CHANCES.values()) / len(CHANCES)
WRAPPER = "restore"
# Names and blocks of the towers; their language models have 28 layers.
SHAPES = {"llava-onevision-7b-shapes": ("LLaVA-OneVision-7B", 26), "qwen2.5-vl-7b-shapes": ("Qwen2.5-VL-7B", 32)}
LAYERS = 28
SHORT = "short"  # streams of the last frames alone
AIMS = (0.95, 8, 10)  # of the dense answers above chance, and selectors of so many that are to be lifted
MIB = 2**-20
CHOOSING = 0.02  # of the prompt's time, at most
BLANK = (0.5, 1.8)  # of a page, with which its tower is at least so many times as fast
EARLY = 2.0  # times as short tower and prompt are with EarlyTom, at least
# Parts of an answer's time, by the heads of their columns.
PARTS = {"tower": "tower_seconds", "selection": "selection_seconds", "prompt": "prompt_seconds"}


def share(record: Record) -> str:
    """Of the tokens that are left, as it stands in the setting; empty for the unpatched model."""
    last: str = record["setting"].rpartition("share=")[2]
    return last


def _shares(rows: Sequence[Record]) -> list[str]:
    """Shares among rows, the largest first."""
    return sorted({share(row) for row in rows if row["method"] != BASE}, key=float, reverse=True)


def within(record: Record) -> str:
    """The method that is wrapped, or the record's own."""
    base: str = record["setting"].removeprefix("base=").partition(" ")[0]
    return base if record["method"] == WRAPPER else record["method"]


def answers(found: Results) -> dict[tuple[int, str], tuple[str, list[Record]]]:
    """Rows by frames and model, and the questions they are about: all, or those that the unpatched model answers best.

    Where it answers some questions no better than chance does, those cannot tell methods apart.
    """
    every: dict[tuple[int, str], dict[str, list[Record]]] = {}
    for row in found.records("vlm", "clips"):
        if "exact" in row:
            every.setdefault((int(row["frames"]), row["model"]), {}).setdefault(row["asked"], []).append(row)
    return {which: _told(kinds) for which, kinds in sorted(every.items())}


def _told(kinds: dict[str, list[Record]]) -> tuple[str, list[Record]]:
    above = {}
    for kind, chance in CHANCES.items():
        dense = [row for row in kinds.get(kind, ()) if row["method"] == BASE]
        if dense:
            above[kind] = (value(dense[0], "exact").low or 0) - chance
    if "all" in kinds and (not above or (len(above) == len(CHANCES) and min(above.values()) > 0)):
        return "all", kinds["all"]
    best = max(above, key=lambda kind: above[kind])
    return best, kinds[best]


def _unseen(found: Results, which: tuple[int, str], kind: str) -> str:
    """What the unpatched model answers to the other questions, where those are left out."""
    if kind == "all":
        return ""
    frames, model = which
    dense = [r for r in found.records("vlm", "clips", method=BASE, model=model) if "exact" in r]
    dense = [r for r in dense if int(r["frames"]) == frames]
    rest = {r["asked"]: r for r in dense if r["asked"] in CHANCES and r["asked"] != kind}
    if not rest:
        return f" Asked *{kind}* alone."
    said = [f"to *{k}* {100 * r['exact']:.0f} % (chance {100 * CHANCES[k]:.0f} %)" for k, r in rest.items()]
    return f" Asked *{kind}* alone: its answers {' and '.join(said)} tell nothing apart."


def weights(model: str) -> str:
    """The trained weights' file, by the model's name."""
    return f"`vlm_{model.rpartition('-')[2]}`"


def _none(what: str) -> str:
    return f"There are no rows yet: `python -m benchmarks {what}` makes them."


def clips(found: Results) -> str:
    """Exact answers of every method, and with RESTORE around it."""
    parts = []
    for (frames, model), (kind, rows) in answers(found).items():
        shares = _shares(rows)
        lines = []
        for name in dict.fromkeys(within(row) for row in rows if row["method"] != BASE):
            cells = [f"`{name}`"]
            for one in shares:
                mine = [row for row in rows if share(row) == one and within(row) == name]
                cells += [_cell(mine, False), _cell(mine, True)]
            lines.append(cells)
        (dense,) = (row for row in rows if row["method"] == BASE)
        header = ["method", *(text for one in shares for text in (f"{100 * float(one):g} %", "with RESTORE"))]
        head = f"{frames} frames, {weights(model)}, {dense['tokens_left']:.0f} visual tokens, {dense['exact_count']} "
        head += f"answers: unpatched {between(dense, 'exact', '{:.0f}', 100)} % right."
        head += _unseen(found, (frames, model), kind)
        parts.append(f"{head}\n\n{table(header, lines, 1)}")
    return "\n\n".join(parts) or _none("vlm/clips --answers --restore")


def _cell(rows: Sequence[Record], wrapped: bool) -> str:
    """Answers in percent with their interval and, of a wrapped method, how many more these are; and tokens left."""
    for row in rows:
        if (row["method"] == WRAPPER) == wrapped:
            mine = value(row, "exact", 100)
            inside = [] if mine.low is None else [f"{mine.low:.0f} to {mine.high:.0f}"]
            inside += [f"{100 * row['exact_lift']:+.0f}"] if "exact_lift" in row else []
            more = f" ({'; '.join(inside)})" if inside else ""
            return f"{mine.value:.0f}{more}, {row['tokens_left']:.0f}"
    return ""


def clips_claims(found: Results) -> str:
    """Who is best, how much of the dense answers is kept, and how many methods RESTORE lifts."""
    lines = []
    for (frames, model), (kind, rows) in answers(found).items():
        chance = CHANCES.get(kind, CHANCE)
        clip = f"{frames} frames, {weights(model)}"
        (dense,) = (row for row in rows if row["method"] == BASE)
        if (value(dense, "exact").low or 0) <= chance:
            lines.append(f"- {clip}: the unpatched model's own answers are not beyond chance, nothing is told.")
            continue
        for one in _shares(rows):
            mine = [row for row in rows if share(row) == one]
            values = {_name(row): value(row, "exact", 100) for row in mine}
            best, level = ranked(values)
            kept = (values[best].value / 100 - chance) / (dense["exact"] - chance) if dense["exact"] > chance else None
            text = f"- {clip}, {100 * float(one):g} % of the tokens: `{best}` answers most, "
            text += f"{values[best].value:.0f} %"
            if kept is not None:
                text += f", {100 * kept:.0f} % of the unpatched model's above chance "
                text += f"(aim at a tenth: {100 * AIMS[0]:.0f} %)"
            lines.append(f"{text}; level with it: {code(level)}. {_lifted(mine)}".strip())
    return "\n".join(lines) or _none("vlm/clips --answers --restore")


def _name(row: Record) -> str:
    return f"{WRAPPER} around {within(row)}" if row["method"] == WRAPPER else str(row["method"])


def _lifted(rows: Sequence[Record]) -> str:
    """How many methods are better with RESTORE around them, worse, and which of both surely."""
    lifts = [row for row in rows if "exact_lift" in row]
    if not lifts:
        return ""
    up = [row for row in lifts if row["exact_lift"] > 0]
    down = [row for row in lifts if row["exact_lift"] < 0]
    surely = [within(row) for row in up if row.get("exact_lift_low", 0) > 0]
    lost = [within(row) for row in down if row.get("exact_lift_high", 0) < 0]
    return (
        f"RESTORE lifts {len(up)} of {len(lifts)} (aim: {AIMS[1]} of {AIMS[2]}), and lowers {len(down)}; beyond the "
        f"95 % interval of the difference it lifts {code(surely)}, and lowers {code(lost)}."
    )


def clips_times(found: Results) -> str:
    """Seconds of the parts of a batch's answers, how many times as fast these are, and the most memory they took."""
    lines = []
    for row in found.records("vlm", "clips"):
        if "speedup" in row:
            spent = [f"{row[column]:.2f}" if column in row else "" for column in PARTS.values()]
            speed = between(row, "speedup")
            memory = f"{row['forward_mib']:.0f}" if "forward_mib" in row else ""
            cells = [f"`{_name(row)}`", share(row), str(row["frames"]), *spent, f"{row['seconds']:.2f}"]
            lines.append([*cells, speed, memory])
    header = ["method", "share", "frames", *(f"{name}, s" for name in PARTS), "all, s", "times as fast", "MiB of a run"]
    return table(header, lines, 1) if lines else _none("vlm/clips --times")


def streams(found: Results) -> str:
    """Time and memory of a frame along a stream, and answers."""
    lines = []
    for row in (row for row in found.records("vlm", "stream") if "ms" in row):
        cells = [f"`{row['setting'] or 'keeps everything'}`", str(row["frames"]), between(row, "ms", "{:.0f}")]
        agrees = f"{row['agreement'] * row['images']:.0f} of {row['images']}" if "agreement" in row else ""
        right = f"{row['exact'] * row['images']:.0f}" if "exact" in row else ""
        lines.append([*cells, f"{row['bytes'] * MIB:.1f}", f"{row['rows_left']:.0f}", agrees, right])
    header = [
        "setting",
        "frames",
        "ms a frame (quartiles)",
        "MiB held",
        "rows",
        "four tokens as of the last frames alone",
        "right",
    ]
    return table(header, lines, 1) if lines else _none("vlm/stream")


def streams_claims(found: Results) -> str:
    """How flat memory and time are from the first mark with a full memory on."""
    lines = []
    every = found.records("vlm", "stream")
    rows = [row for row in every if row["method"] != BASE and "ms" in row]
    short = {_stream(row)[1:]: row for row in every if row["method"] == SHORT}
    for key in dict.fromkeys(map(_stream, rows)):
        mine, (setting, *_) = sorted((row for row in rows if _stream(row) == key), key=_frames), key
        if len(mine) > 1:
            first, last = mine[0], mine[-1]
            asked = [r for r in mine if "agreement" in r]
            text = (
                f"- `{setting}`: from {first['frames']} to {last['frames']} frames {_times(first, last, 'bytes')} the "
            )
            text += f"bytes, {_times(first, last, 'ms')} the time of a frame"
            if asked:
                agreed = sum(r["agreement"] * r["images"] for r in asked)
                count = counted([sum(r["images"] for r in asked)])
                text += f"; in {agreed:.0f} of {count} answers four tokens as of the last frames alone"
            told = [r for r in mine if "exact" in r]
            if told:
                right, count = (
                    sum(n) for n in zip(*((r["exact"] * r["images"], r["images"]) for r in told), strict=True)
                )
                text += f"; {right:.0f} of {counted([int(count)])} are right"
                alone = short.get(key[1:])
                if alone is not None and alone["images"] == count:  # to the same questions
                    text += f", of those of the last frames alone {alone['exact'] * count:.0f}"
            lines.append(text + ".")
    return "\n".join(lines) or _none("vlm/stream")


def _stream(row: Record) -> tuple[str, ...]:
    """What tells streams apart, the setting first."""
    return (row["setting"], row["model"], *(str(row.get(name)) for name in ("size", "tokens", "clock", "length")))


def _frames(row: Record) -> int:
    return int(row["frames"])


def _times(first: Record, last: Record, metric: str) -> str:
    return f"{last[metric] / first[metric]:.2f} times"


def early(found: Results) -> str:
    """Tower, choosing and layers at the shapes of a large model, with fewer tokens inside and behind the tower."""
    parts = []
    rows = found.records("vlm", "early")
    fields = ("model", "frames", "tower_depth", "depth")
    for depth in sorted({tuple(r[field] for field in fields) for r in rows}, key=str):
        lines = []
        mine = [r for r in rows if tuple(r[field] for field in fields) == depth]
        dense = next(r for r in mine if r["method"] == BASE)
        for r in mine:
            cells = [f"`{r['method']}`", f"{r['tokens_left']:.0f}"]
            cells += [between(r, f"{part}_seconds") for part in ("tower", "selection", "prompt")]
            cells += [f"{_shorter(dense, r, blocks, layers):.2f}" for blocks, layers in ((1, 1), _full(r))]
            share = r.get("share_of_full_depth")
            lines.append([*cells, between(r, "speedup") if "speedup" in r else "1", percent(share, digits=2)])
        header = ["", "tokens left", "tower, s", "choosing, s", "layers, s", "tower and layers, times as short"]
        header += ["at full depth", "times as fast, all of it", "choosing, % of 28 layers"]
        text = "{}, {} frames, {} blocks of the tower, {} layers:".format(SHAPES[depth[0]][0], *depth[1:])
        parts.append(f"{text}\n\n{table(header, lines, 1)}")
        parts += [
            f"The aim that EarlyTom makes tower and prompt together at least {EARLY:g} times as short at a tenth is "
            f"{'met' if times >= EARLY else 'missed'} with the tower's {_full(r)[0] * r['tower_depth']:g} blocks and "
            f"{LAYERS} layers, reckoned from this time of each: {times:.1f} times."
            for r in mine
            if r["method"] == "earlytom" and float(r["tower_depth"]) > 1  # one block has no place to merge in
            for times in [_shorter(dense, r, *_full(r))]
        ]
    over = [
        f"`{r['method']}` ({SHAPES[r['model']][0]})"
        for r in rows
        if r.get("share_of_full_depth", 0) > CHOOSING and str(r["frames"]) == "32"
    ]
    if any(str(r["frames"]) == "32" for r in rows):
        aim = f"The aim that choosing takes at most {percent(CHOOSING, digits=0)} % of a prompt of 32 frames"
        parts.append(f"{aim} is missed by {', '.join(over) or 'none'}.")
    return "\n\n".join(parts) or _none("vlm/early")


def _full(row: Record) -> tuple[float, float]:
    """How many times as many blocks of the tower and layers the model has as were measured."""
    return SHAPES[row["model"]][1] / float(row["tower_depth"]), LAYERS / float(row["depth"])


def _shorter(dense: Record, row: Record, blocks: float, layers: float) -> float:
    """How many times as short tower and layers are together as the unpatched ones, with so many times as many."""
    whole, mine = (blocks * r["tower_seconds"] + layers * r["prompt_seconds"] for r in (dense, row))
    return float(whole / mine)


def pixels(found: Results) -> str:
    """Pages of which a share is blank: times of tower and prompt with PixelPrune, and the aim at a half."""
    rows = found.records("vlm", "pixels")
    lines, met = [], []
    for r in rows:
        cells = [f"`{r['model']}`", percent(float(r["blank"]), digits=0), f"`{r['method']}`"]
        cells += [between(r, f"{part}_seconds") if f"{part}_seconds" in r else "" for part in ("tower", "prompt")]
        cells += [between(r, m) if m in r else "" for m in ("tower_speedup", "speedup")]
        lines.append(cells)
        if "tower_speedup" in r and float(r["blank"]) == BLANK[0]:
            verdict = "met" if r["tower_speedup"] >= BLANK[1] else "missed"
            met.append(f"{verdict} by `{r['method']}` on `{r['model']}`")
    if not lines:
        return _none("vlm/pixels")
    header = ["", "blank, %", "", "tower, s", "layers, s", "times as fast, tower", "times as fast, all of it"]
    aim = f"The aim that the tower is at least {BLANK[1]:g} times as fast with {100 * BLANK[0]:g} % of a page blank is "
    return f"{table(header, lines, 3)}\n\n{aim}{'; '.join(met)}."
