"""Marked parts about encoders that were trained with fewer tokens, of ``encoder/train_learned``."""

from __future__ import annotations

from benchmarks.pages.markdown import Record, Results, Value, between, code, percent, ranked, table, value
from tokred.bench.arms import BASE

SHARES = {"0.5": "a half", "0.33": "a third"}
LEARNED = ("avit", "bavit", "cropr", "cropr_early", "diffrate", "dovit", "dtem", "dynamicvit", "vtm")
AIMED = ("cropr", "cropr_early", "dynamicvit")  # they lose at most half of what the best method without weights loses
PART = 0.5
DECIDING = 0.01  # of a forward
NOTHING = "Not measured yet."


def _records(found: Results, model: str, goal: str) -> dict[str, Record]:
    """Records by their case: those at a share of the work, and the dense models."""
    rows = found.records("encoder", "learned", model=model)
    return {r["case"]: r for r in rows if str(r["goal"]) == goal or float(r["goal"]) == 1}


def _split(case: str) -> tuple[str, bool]:
    """The name of a case, and whether it was trained."""
    name = case.removesuffix("-untrained")
    return name, name == case


def _table(found: Results, model: str, goal: str) -> str:
    """Every name once: top-1 without training and with, object's patches left, work, speed, deciding."""
    rows = _records(found, model, goal)
    names = dict.fromkeys(_split(case)[0] for case in rows)
    order = sorted(names, key=lambda n: -max(rows[c]["top1"] for c in (n, f"{n}-untrained") if c in rows))
    lines = []
    for name in order:
        plain, trained = rows.get(f"{name}-untrained"), rows.get(name)
        one = trained or plain
        assert one is not None  # the names are those of cases
        cells = [f"`{name}`"]
        cells += ["" if r is None else between(r, "top1", "{:.1f}", 100) for r in (plain, trained)]
        cells += [percent(one.get("recall"), digits=0), f"{one['tokens_out']:.0f}", percent(one["gmacs_share"])]
        cells += [between(one, "speedup") if "speedup" in one else ""]
        decides = one.get("decision_share")
        lines.append([*cells, percent(decides) if decides else ""])
    header = ["", "top-1, not trained", "top-1, trained", "object left, %", "tokens left", "work, %", "times as fast"]
    return table([*header, "deciding, %"], lines, 1)


def learned(found: Results) -> str:
    """The embedded model at a half and a third of the work."""
    return _tables(found, "embedded", SHARES)


def learned_dinov2(found: Results) -> str:
    """DINOv2 at less than a half of the work."""
    return _tables(found, "dinov2", {"0.45": "41 to 46 %"})


def _tables(found: Results, model: str, shares: dict[str, str]) -> str:
    goals = {str(r["goal"]) for r in found.records("encoder", "learned", model=model)}
    parts = [
        f"At {text} of the work:\n\n{_table(found, model, goal)}" for goal, text in shares.items() if goal in goals
    ]
    return "\n\n".join(parts) or NOTHING


def learned_claims(found: Results) -> str:
    """Who is first at each share, the aim of Cropr and DynamicViT, and whose deciding costs more than was aimed at."""
    lines = []
    for goal, text in SHARES.items():
        rows = _records(found, "embedded", goal)
        same = {c: r for c, r in rows.items() if _split(c)[1] and str(r["goal"]) == goal}
        trained = {c: value(r, "top1", 100) for c, r in same.items()}
        if trained:
            lines += [_first(trained, text), *_aims(rows, goal, text)]
    slow = sorted(
        f"`{r['case']}` ({percent(r['decision_share'])} % at {SHARES[str(r['goal'])]})"
        for r in found.records("encoder", "learned", model="embedded")
        if r["case"] in LEARNED and str(r["goal"]) in SHARES and r.get("decision_share", 0) > DECIDING
    )
    if lines:
        lines.append(
            f"- The aim that deciding takes at most {percent(DECIDING, digits=0)} % of a forward of this small model "
            f"is missed by {', '.join(slow) or 'none'}."
        )
    return "\n".join(lines) or NOTHING


def learned_vlm(found: Results) -> str:
    """The tower of the small VLM at a half and a third of the work: right answers, and who is first."""
    rows = found.records("vlm", "learned")
    dense = next((r for r in rows if r["method"] == BASE), None)
    if dense is None:
        return NOTHING
    right = between(dense, "exact", "{:.0f}", 100)
    parts = [f"All tokens: {right} % of {dense['exact_count']} answers are right."]
    for share, text in SHARES.items():
        mine = sorted((r for r in rows if str(r["goal"]) == share), key=lambda r: -r["exact"])
        lines = []
        for r in mine:
            cells = [f"`{r['case']}`", between(r, "exact", "{:.0f}", 100), percent(r["recall"], digits=0)]
            cells += [percent(r["gmacs_share"]), between(r, "speedup") if "speedup" in r else ""]
            lines.append(cells)
        if lines:
            best, level = ranked({r["case"]: value(r, "exact", 100) for r in mine})
            header = ["", "right, %", "object left, %", "work, %", "tower, times as fast"]
            said = f"At {text} of the tower's work `{best}` answers most; level with it: {code(level)}."
            parts.append(f"At {text} of the work:\n\n{table(header, lines, 1)}\n\n{said}")
    return "\n\n".join(parts)


def _sizes(rows: list[Record]) -> dict[str, list[Record]]:
    """Records of real sizes by model and batch, as a page names them."""
    found: dict[str, list[Record]] = {}
    for r in rows:
        more = "" if int(r["batch"]) == 1 else f", batch of {r['batch']}"
        found.setdefault(f"`{r['model']}`{more}", []).append(r)
    return found


def deciding(found: Results) -> str:
    """Shares of a forward that deciding takes at real sizes: a line for every method, a column for model and batch."""
    sizes = _sizes(found.records("encoder", "deciding"))
    lines = []
    for name in dict.fromkeys(r["method"] for rows in sizes.values() for r in rows):
        cells = []
        for rows in sizes.values():
            own = next((r for r in rows if r["method"] == name), None)
            cells.append("" if own is None else f"{percent(own['decision_share'])} ({own['speedup']:.2f})")
        work = [
            r["decision_work"] for rows in sizes.values() for r in rows if r["method"] == name and "decision_work" in r
        ]
        lines.append([f"`{name}`", *cells, percent(work[0], digits=2) if work else ""])
    header = ["", *sizes, "multiply-adds, %"]
    return table(header, sorted(lines), 1) if lines else NOTHING


def deciding_claims(found: Results) -> str:
    """Whose deciding stays within the aim at real sizes, and what a random choice takes there."""
    lines = []
    aim = f"the aim that deciding takes at most {percent(DECIDING, digits=0)} % of a forward"
    for size, rows in _sizes(found.records("encoder", "deciding")).items():
        share = {r["method"]: r["decision_share"] for r in rows}
        own = [n for n in LEARNED if n in share]
        met = [n for n in own if share[n] <= DECIDING]
        aside = f"; `random_prune` takes {percent(share['random_prune'])} %" if "random_prune" in share else ""
        never = [r["method"] for r in rows if r.get("decision_work", 0) > DECIDING]
        aside += f"; deciding's own multiply-adds are more than that in {code(never)}" if never else ""
        lines.append(f"- On {size} {aim} is met by {len(met)} of {len(own)} learned methods ({code(met)}){aside}.")
    return "\n".join(lines) or NOTHING


def learned_dinov2_claims(found: Results) -> str:
    """Who is first on DINOv2, and what Cropr and DynamicViT lose beside the best method without weights."""
    goal, text = "0.45", "41 to 46 %"
    rows = {c: r for c, r in _records(found, "dinov2", goal).items() if _split(c)[1]}
    same = {c: value(r, "top1", 100) for c, r in rows.items() if str(r["goal"]) == goal}
    if not same or "dense" not in rows:
        return NOTHING
    dense, best = 100 * rows["dense"]["top1"], max((n for n in same if n not in LEARNED), key=lambda n: same[n].value)
    lines, most = [_first(same, text)], PART * (dense - same[best].value)
    for name in (n for n in AIMED if n in same):
        v = same[name]
        low, high = (v.value if end is None else end for end in (v.low, v.high))
        verdict = "met" if dense - low <= most else "missed" if dense - high > most else "not told apart"
        lines.append(
            f"- The aim that `{name}` loses at most half of what the best method without weights loses, trained as "
            f"long: {verdict}, {v.value - dense:+.1f} points beside the dense model ({low - dense:+.1f} to "
            f"{high - dense:+.1f}), `{best}` {same[best].value - dense:+.1f}."
        )
    return "\n".join(lines)


def _first(trained: dict[str, Value], text: str) -> str:
    best, level = ranked(trained)
    v = trained[best]
    said = f"- At {text} of the work, trained: `{best}` has the highest top-1, {v.value:.1f} %"
    said += f" ({v.low:.1f} to {v.high:.1f})" if v.low is not None else ""
    blind = [n for n in (best, *level) if n in ("random_prune", "downsample", "smaller")]
    return f"{said}; level with it: {code(level)}. Random, down-sampled or smaller models among these: {code(blind)}."


def _aims(rows: dict[str, Record], goal: str, text: str) -> list[str]:
    """What the learned ones lose beside the best of those without weights, as it is and trained as long."""
    if goal != "0.33":
        return []
    lines = []
    for suffix, how in (("-untrained", "as they are"), ("", "trained as long")):
        dense = rows.get(f"dense{suffix}")
        others = [n for n in map(_split, rows) if n[1] != bool(suffix) and n[0] not in (*LEARNED, "dense", "smaller")]
        if dense is None or not others:
            continue
        best = max((f"{name}{suffix}" for name, _ in others), key=lambda c: rows[c]["top1"])
        lost = dense["top1"] - rows[best]["top1"]
        for name in (n for n in AIMED if n in rows):
            own = dense["top1"] - rows[name]["top1"]
            lines.append(
                f"- The aim that `{name}` loses at most half of what the best method without weights loses at {text} "
                f"of the work, the others {how}: {'met' if own <= PART * lost else 'missed'}, {-100 * own:+.1f} points "
                f"beside the dense model, `{_split(best)[0]}` {-100 * lost:+.1f}."
            )
    return lines
