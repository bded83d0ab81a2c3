"""Marked parts about vision-language models: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.pages.markdown import Record, Results, beside, code, compared, percent, ranked, table, value

BUDGETS = (64, 32, 16)
CHANCE = 0.1  # one of ten classes
BLIND = ("random_visual", "uniform_visual", "downsample_visual")
AIM = 0.03  # of the prompt's time


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
        text += f"worse {code(where['worse than'])}."
        blind = [n for n in (best, *level) if n in BLIND]
        lines.append(text + f" Blind choices among the first: {code(blind)}.")
    every = {b: _answers(found, b) for b in BUDGETS}
    for more, fewer in pairwise(BUDGETS):
        for n in every[fewer]:
            if n in every[more] and every[fewer][n]["exact"] > every[more][n]["exact"]:
                a, b = (value(every[x][n], "exact", 100) for x in (fewer, more))
                lines.append(
                    f"- `{n}` has {a.value:.0f} % with {fewer} tokens and {b.value:.0f} % with {more}: "
                    f"{compared(a, b)} itself with more."
                )
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


def vlm_cost_claims(found: Results) -> str:
    """Who takes more of the prompt's time than was aimed at, and pruned prompts beside short ones."""
    rows = [r for r in found.records("vlm", "cost") if "share_of_full_depth" in r]
    over = sorted({f"`{r['method']}` on {r['model']}" for r in rows if r["share_of_full_depth"] > AIM})
    most = max(rows, key=lambda r: r["share_of_full_depth"])
    times = sorted(r["times_short_full_depth"] for r in found.records("vlm", "cost") if "times_short_full_depth" in r)
    kept = sorted({str(r["keeps"]) for r in rows if "keeps" in r}, reverse=True)
    return (
        f"- The aim was at most {percent(AIM, digits=0)} % of the prompt: missed by {', '.join(over) or 'none'}. The "
        f"largest share is {percent(most['share_of_full_depth'], digits=2)} %, "
        f"of `{most['method']}` on {most['model']}.\n"
        f"- A pruned prompt takes {times[0]:.2f} to {times[-1]:.2f} times as long as an unpatched prompt that has only "
        f"so many visual tokens, at {', '.join(kept)} of them and at full depth (aim: within 10 %)."
    )
