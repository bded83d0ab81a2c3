"""Marked parts about clips and streams: of ``vlm/clips``, ``vlm/early`` and ``vlm/stream``."""

from __future__ import annotations

from benchmarks.pages.markdown import Record, Results, between, code, percent, table, value

CHANCE = {"what": 1 / 10, "way": 1 / 4, "when": 1 / 3}
SHARES = {"0.25": "a quarter", "0.1": "a tenth", "0.05": "a twentieth"}
BLIND = ("random_visual", "uniform_visual", "uniform_frames", "downsample_visual")
WRAPPER, LIFTED = "restore", 0.8
KEPT = 0.95  # of the dense model's answers above chance, at a tenth of the tokens
CHOOSING = 0.02  # of the prompt's time
BASE = "unpatched"
NOTHING = "Not measured yet."
Asked = dict[str, Record]


def _share(record: Record) -> str:
    found = [part.removeprefix("share=") for part in record["setting"].split() if part.startswith("share=")]
    return found[0] if found else ""


def _name(record: Record) -> str:
    """The method, and what it wraps."""
    base = [part.removeprefix("base=") for part in record["setting"].split() if part.startswith("base=")]
    return " ".join([record["method"], *base])


def _settings(found: Results, frames: str, share: str) -> dict[str, Asked]:
    """Records by name and kind of question: those of a share, the unpatched model's first."""
    made: dict[str, Asked] = {}
    for r in found.records("vlm", "clips"):
        if str(r["frames"]) == frames and (_share(r) == share or r["method"] == BASE):
            made.setdefault(_name(r), {})[r["asked"]] = r
    return dict(sorted(made.items(), key=lambda item: item[0] != BASE))


def _lengths(found: Results) -> list[str]:
    return sorted({str(r["frames"]) for r in found.records("vlm", "clips")}, key=int)


def _seen(dense: Asked) -> list[str]:
    """Kinds of questions that the model with all tokens answers better than one that does not look."""
    found = []
    for kind, chance in CHANCE.items():
        low = value(dense[kind], "exact").low if kind in dense else None
        if low is not None and low > chance:
            found.append(kind)
    return found


def _above(one: Asked, kinds: list[str]) -> float:
    return sum(one[kind]["exact"] - CHANCE[kind] for kind in kinds)


def clips(found: Results) -> str:
    """Every setting of each length of clips: answers by kind of question, tokens, times."""
    parts = []
    for frames in _lengths(found):
        for share, text in SHARES.items():
            rows = _settings(found, frames, share)
            if len(rows) < 2:
                continue
            lines = []
            for name, one in rows.items():
                first = next(iter(one.values()))
                cells = [f"`{name}`", *(percent(one[k]["exact"], digits=0) if k in one else "" for k in CHANCE)]
                cells += [f"{first['tokens_left']:.0f}", "1" if name == BASE else between(first, "speedup")]
                cells += [_seconds(first, part) for part in ("encoder", "selection", "prompt")]
                lines.append([*cells, f"{first['peak_mib']:.0f}" if "peak_mib" in first else ""])
            header = ["", *CHANCE, "tokens left", "times as fast", "tower, s", "selection, s", "prompt, s", "peak, MiB"]
            parts.append(f"Clips of {frames} frames, {text} of the visual tokens:\n\n{table(header, lines, 1)}")
    return "\n\n".join(parts) or NOTHING


def _seconds(record: Record, part: str) -> str:
    spent = record.get(f"{part}_seconds")
    return "" if spent is None else f"{spent:.2f}"


def clips_claims(found: Results) -> str:
    """What is left of the answers above chance, who is first, where blind choices stand, and whether RESTORE lifts."""
    lines = []
    for frames in _lengths(found):
        for share, text in SHARES.items():
            rows = _settings(found, frames, share)
            kinds = _seen(rows.get(BASE, {}))
            if len(rows) > 1 and kinds:
                lines += _kept(rows, kinds, f"clips of {frames} frames at {text} of the tokens", share)
    return "\n".join(lines) or NOTHING


def _kept(rows: dict[str, Asked], kinds: list[str], where: str, share: str) -> list[str]:
    dense = _above(rows[BASE], kinds)
    left = {name: _above(one, kinds) / dense for name, one in rows.items() if name != BASE and {*kinds} <= one.keys()}
    order = sorted(left, key=lambda n: -left[n])
    blind = max((n for n in order if n in BLIND), key=lambda n: left[n], default=None)
    text = f"- Of {where} `{order[0]}` keeps most of the answers above chance ({', '.join(kinds)}), "
    text += f"{percent(left[order[0]], digits=0)} % of the dense model's"
    if blind is not None and blind != order[0]:
        text += f"; the first of the blind choices is `{blind}` with {percent(left[blind], digits=0)} %"
        text += f", behind it are {code(n for n in order if left[n] < left[blind])}"
    if share == "0.1":
        text += f". The aim of {percent(KEPT, digits=0)} % is {'met' if left[order[0]] >= KEPT else 'missed'}"
    lines = [f"{text}."]
    pairs = [(name, name.removeprefix(f"{WRAPPER} ")) for name in left if name.startswith(f"{WRAPPER} ")]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs in left]
    if pairs:
        up = [theirs for ours, theirs in pairs if left[ours] > left[theirs]]
        down = [theirs for ours, theirs in pairs if left[ours] < left[theirs]]
        lines.append(
            f"- RESTORE around {len(pairs)} selectors, {where}: {len(up)} have more right answers with it "
            f"({code(up)}), {len(down)} fewer ({code(down)}). The aim of {percent(LIFTED, digits=0)} % that are lifted "
            f"is {'met' if len(up) >= LIFTED * len(pairs) else 'missed'}."
        )
    return lines


def early(found: Results) -> str:
    """Tower, choosing and layers at the shapes of a large model, with fewer tokens inside and behind the tower."""
    parts = []
    rows = found.records("vlm", "early")
    for depth in sorted({(r["frames"], r["tower_depth"], r["depth"]) for r in rows}, key=str):
        lines = []
        for r in (r for r in rows if (r["frames"], r["tower_depth"], r["depth"]) == depth):
            cells = [f"`{r['method']}`", f"{r['tokens_left']:.0f}"]
            cells += [between(r, f"{part}_seconds") for part in ("tower", "selection", "prompt")]
            share = r.get("share_of_full_depth")
            lines.append([*cells, between(r, "speedup") if "speedup" in r else "1", percent(share, digits=2)])
        header = ["", "tokens left", "tower, s", "choosing, s", "layers, s", "times as fast, all of it"]
        text = "{} frames, {} blocks of the tower, {} layers:".format(*depth)
        parts.append(f"{text}\n\n{table([*header, 'choosing, % of 28 layers'], lines, 1)}")
    over = [f"`{r['method']}`" for r in rows if r.get("share_of_full_depth", 0) > CHOOSING and str(r["frames"]) == "32"]
    if any(str(r["frames"]) == "32" for r in rows):
        aim = f"The aim that choosing takes at most {percent(CHOOSING, digits=0)} % of a prompt of 32 frames"
        parts.append(f"{aim} is missed by {', '.join(over) or 'none'}.")
    return "\n\n".join(parts) or NOTHING


def stream(found: Results) -> str:
    """A stream under a fixed budget: time of a frame, bytes and rows, answers."""
    lines = []
    for r in sorted(found.records("vlm", "stream"), key=lambda r: (r["method"] != BASE, r["setting"])):
        cells = [f"`{r['method']}`", f"`{r['setting']}`" if r["setting"] else "", str(r["frames"])]
        cells += [between(r, "ms", "{:.0f}"), f"{r['bytes'] / 2**20:.1f}", f"{r['rows_left']:.0f}"]
        lines.append([*cells, percent(r.get("agreement"), digits=0)])
    header = ["", "setting", "frames", "ms a frame (quartiles)", "MiB held", "rows of a layer", "answers alike, %"]
    return table(header, lines, 2) if lines else NOTHING
