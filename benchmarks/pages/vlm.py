"""Marked parts about vision-language models: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from benchmarks.pages.markdown import Record, Results, beside, code, percent, ranked, table, value

BUDGETS = (64, 32, 16)
CHANCE = 0.1


def _answers(found: Results, budget: int) -> dict[str, Record]:
    return {r["method"]: r for r in found.records("vlm", "answers", setting=f"budget={budget}")}


def vlm(found: Results) -> str:
    """Exact answers and speed of every method."""
    every = [_answers(found, b) for b in BUDGETS]
    lines = []
    for name in every[0]:
        cells = [f"`{name}`"]
        for budget, rows in zip(BUDGETS, every, strict=True):
            r = rows.get(name)
            left = "" if r is None or abs(r["tokens_left"] - budget) < 0.5 else f" ({r['tokens_left']:.0f})"
            cells.append("" if r is None else f"{100 * r['exact']:.0f}{left}, {r['speedup']:.2f}x")
        lines.append(cells)
    return table(["method", "64 of 256", "32", "16"], lines, 1)


def vlm_claims(found: Results) -> str:
    """Who is best, and where random and uniform choices stand."""
    lines = []
    for budget in BUDGETS:
        rows = _answers(found, budget)
        values = {name: value(r, "exact", 100) for name, r in rows.items()}
        best, level = ranked(values)
        low, high = values[best].low, values[best].high
        text = f"- With {budget} tokens, `{best}` answers most, {values[best].value:.0f} % ({low:.0f} to {high:.0f}); "
        text += f"level with it: {code(level)}. "
        where = beside(values, "random_visual")
        text += f"A random choice has {values['random_visual'].value:.0f} %: better are {code(where['better than'])}, "
        lines.append(text + f"worse {code(where['worse than'])}.")
    return "\n".join([*lines, f"- Chance is {100 * CHANCE:.0f} %: there are ten classes."])


def vlm_cost(found: Results) -> str:
    """Own work at the shapes of real models."""
    shapes = [found.records("vlm", "cost", model=m, keeps="1/4") for m in ("llava15", "qwen25vl")]
    names = dict.fromkeys(r["method"] for rows in shapes for r in rows if r["method"] not in ("dense", "short"))
    lines = []
    for name in names:
        cells = [f"`{name}`"]
        for rows in shapes:
            mine = [r for r in rows if r["method"] == name]
            own = [(f"{r['own_full_depth_ms']:.0f}", f"{percent(r['share_of_full_depth'], digits=2)} %") for r in mine]
            cells += own[0] if own else ("", "")
        lines.append(cells)
    header = ["method", "LLaVA-1.5-7B, real depth: own work, ms", "share of the prompt", "Qwen2.5-VL-7B: own work, ms"]
    return table([*header, "share of the prompt"], lines, 1)
