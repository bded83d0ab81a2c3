"""The marked parts of docs/benchmarks.md: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.pages.markdown import (
    ROOT,
    Record,
    Results,
    Value,
    beside,
    between,
    code,
    compared,
    percent,
    ranked,
    table,
    value,
)
from tokred.bench import results
from tokred.bench.metrics import METRICS
from tokred.bench.plots import NAMES

PAGE = ROOT / "docs" / "benchmarks.md"
KEYMERGE = ROOT / "docs" / "methods" / "diffusion" / "keymerge.md"
SHARES = ("0.5", "0.25", "0.125", "0.05")


def provenance(found: Results) -> str:
    """How many rows trace to a clean commit."""
    lines, every = [], []
    for wing, rows in found.tables.items():
        every += rows
        counted = results.provenance(rows)
        lines.append([f"`{wing}.csv`", *(f"{n:,}" for n in counted)])
    total = results.provenance(every)
    lines.append(["all", *(f"{n:,}" for n in total)])
    text = (
        f"Of {total.rows:,} rows {total.clean:,} name device, versions, date and a clean commit. The others were "
        "measured before every script wrote them down: what a row does not know is empty."
    )
    header = ["table", "rows", "traced to a clean commit", "commit with uncommitted changes", "no commit"]
    return f"{text}\n\n{table(header, lines, 1)}"


def metrics(found: Results) -> str:
    """What each metric in the tables means, and what its ends are."""
    used = {row.metric for rows in found.tables.values() for row in rows}
    lines = [[f"`{n}`", m.unit, m.doc, m.interval] for n, m in METRICS.items() if n in used]
    return table(["metric", "unit", "meaning", "`low` and `high`"], lines, 4)


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


# ---------------------------------------------------------------------------------------------- denoisers

FAMILIES = {
    "ToMeSD": ("tomesd", "ratio={} max_downsample=4"),
    "ToMeSD, shared plan": ("tomesd", "ratio={} max_downsample=4 share=resolution"),
    "ToMeSD, fixed choice": ("tomesd", "ratio={} max_downsample=4 use_rand=False"),
    "random pruning": ("random_latent_prune", "ratio={} max_downsample=4"),
    "KeyMerge": ("keymerge", "ratio={} max_downsample=4"),
    "KeyMerge, a plan a block": ("keymerge", "ratio={} max_downsample=4 share=block"),
    "KeyMerge, queries too": ("keymerge", "ratio={} max_downsample=4 queries=True"),
    "ToMA": ("toma", "ratio={} max_downsample=4 cover=attention first_full=0"),
    "AsymRnR, queries": ("asymrnr", "q={} kv=0 first_full=0"),
    "AsymRnR, keys": ("asymrnr", "q=0 kv={} first_full=0"),
}
RATIOS = ("0.25", "0.5", "0.6", "0.75")
MODES = ("nearest", "nearest-exact", "average")


def _denoised(found: Results, family: str, amount: str) -> Record:
    if family.startswith("ToDo"):
        method, setting = "todo", f"factors=(1,1,{amount}) mode={family.partition(', ')[2]}"
    else:
        method, setting = FAMILIES[family][0], FAMILIES[family][1].format(amount)
    return results.one(found.records("diffusion", "quality"), method=method, setting=setting)


def diffusion(found: Results) -> str:
    """PSNR and speed of each method on a real denoiser."""

    def cells(family: str, amounts: Sequence[str]) -> list[str]:
        rows = [_denoised(found, family, a) for a in amounts]
        return [family, *(f"{r['psnr']:.1f}, {r['speedup']:.2f}x" for r in rows)]

    ratios = table(["method", "ratio 0.25", "0.5", "0.6", "0.75"], [cells(f, RATIOS) for f in FAMILIES], 1)
    factors = [cells(f"ToDo, {mode}", "234") for mode in MODES]
    return f"{ratios}\n\n{table(['method', 'factor 2', '3', '4'], factors, 1)}"


def diffusion_claims(found: Results) -> str:
    """KeyMerge beside the others, by the intervals of PSNR and the quartiles of speed."""

    def of(family: str, metric: str) -> list[Value]:
        return [value(_denoised(found, family, r), metric) for r in RATIOS]

    def words(a: str, b: str, metric: str = "psnr") -> list[str]:
        return [compared(x, y) for x, y in zip(of(a, metric), of(b, metric), strict=True)]

    def gap(a: str, b: str) -> str:
        gaps = sorted(x.value - y.value for x, y in zip(of(a, "psnr"), of(b, "psnr"), strict=True))
        return f"{gaps[0]:.0f} to {gaps[-1]:.0f} dB"

    def said(found: Sequence[str]) -> str:
        if len(set(found)) == 1:
            return f"{found[0]} it at every ratio"
        return ", ".join(f"{word} it at {ratio}" for word, ratio in zip(found, RATIOS, strict=True))

    ours, both, queries = "KeyMerge", "KeyMerge, queries too", "AsymRnR, queries"
    exact, quarter = (value(_denoised(found, f, a), "psnr") for f, a in (("ToDo, nearest-exact", "2"), (ours, "0.75")))
    lines = [
        f"[`keymerge`](methods/diffusion/keymerge.md) (ours) beside `tomesd` with its random choice: "
        f"{gap(ours, 'ToMeSD')} nearer to the unmerged image, {said(words(ours, 'ToMeSD'))}; in speed "
        f"{said(words(ours, 'ToMeSD', 'speedup'))}. With queries merged too: {gap(both, 'ToMeSD')} nearer, "
        f"{said(words(both, 'ToMeSD'))}.",
        f"`asymrnr` of the queries beside `keymerge`: {gap(queries, ours)} nearer, {said(words(queries, ours))}; in "
        f"speed {said(words(queries, ours, 'speedup'))}.",
        "`keymerge` with queries too beside `tomesd` with a fixed choice: "
        f"{said(words(both, 'ToMeSD, fixed choice'))}.",
        f"`todo` with `nearest-exact` and 256 of 1,024 keys left ({exact.value:.1f} dB) is {compared(exact, quarter)} "
        f"`keymerge` with as many ({quarter.value:.1f} dB).",
    ]
    return "\n".join(f"- {line}" for line in lines)


def keymerge(found: Results) -> str:
    """PSNR of KeyMerge's forms beside ToMeSD's, with intervals."""
    shown = ("ToMeSD", "ToMeSD, fixed choice", "KeyMerge", "KeyMerge, a plan a block", "KeyMerge, queries too")
    lines = [[name, *(between(_denoised(found, name, r), "psnr", "{:.1f}") for r in RATIOS)] for name in shown]
    return table(["method", *RATIOS], lines, 1)


def diffusion_speed(found: Results) -> str:
    """Denoising steps at 512 pixels."""
    lines = []
    for r in found.records("diffusion", "speed", model="sd15", size=512)[1:]:
        lines.append([f"`{r['method']} {r['setting']}`", between(r, "speedup"), f"{r['ceiling']:.2f}"])
        lines[-1].append(f"{percent(r['plan_share'])} %")
    header = ["at 512 pixels (4,096 tokens)", "times as fast (quartiles)", "ceiling by multiply-adds"]
    return table([*header, "deciding, share of a step"], lines, 1)


# ---------------------------------------------------------------------------------------------- VLMs

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


# ---------------------------------------------------------------------------------------------- caches


def _policies(found: Results, metric: str, **fields: Any) -> dict[str, dict[str, Record]]:
    """By policy and share of the cache; the full cache under ``"1"``."""
    out: dict[str, dict[str, Record]] = {}
    for r in found.records("kv", "quality", **fields):
        if metric in r:
            share = r["setting"].removeprefix("budget=") or "1"
            out.setdefault(r["method"], {})[share] = r
    order = [r["method"] for r in found.records("kv", "quality", length=4096, batch=1) if "perplexity" in r]
    return {name: out[name] for name in dict.fromkeys(order) if name in out}


def _name(method: str) -> str:
    return "the full cache" if method == "unpatched" else f"`{method}`"


def kv_perplexity(found: Results) -> str:
    """Perplexity by share of the cache."""
    plain = _policies(found, "perplexity", length=4096, batch=1)
    padded = _policies(found, "perplexity", length=4096, batch=3)

    def cell(row: Record | None) -> str:
        return f"{row['perplexity']:.2f}" if row else ""

    lines = []
    for name, by in plain.items():
        full = name == "unpatched"
        cells = [cell(by.get("1" if full and s == "0.5" else s)) for s in SHARES]
        lines.append([_name(name), *cells, cell(padded.get(name, {}).get("1" if full else "0.25"))])
    return table(["policy", "50 %", "25 %", "12.5 %", "5 %", "25 %, padded"], lines, 1)


def kv_perplexity_claims(found: Results) -> str:
    """Lowest by value, which without intervals is no claim; and whom a random choice beats."""
    plain = _policies(found, "perplexity", length=4096, batch=1)
    lines = []
    for share, text in zip(SHARES, ("a half", "a quarter", "an eighth", "a twentieth"), strict=True):
        rows = {n: by[share] for n, by in plain.items() if share in by}
        order = sorted(rows, key=lambda n: rows[n]["perplexity"])
        first, second = (f"`{n}` ({rows[n]['perplexity']:.2f})" for n in order[:2])
        random = rows["random_evict"]["perplexity"]
        beaten = [n for n in order if rows[n]["perplexity"] > random]
        known = all(f"perplexity{end}" in r for r in rows.values() for end in ("_low", "_high"))
        said = f"At {text}, {first} has the lowest figure, then {second}"
        if known:
            values = {n: value(r, "perplexity") for n, r in rows.items()}
            said += f"; level with the first: {code(ranked(values, higher=False)[1])}"
        else:
            said += ", of rows without an interval: no order of near ones can be claimed"
        lines.append(
            f"- {said}. `random_evict` ({random:.2f}) is below {len(beaten)} of {len(rows) - 1}: {code(beaten)}."
        )
    trials = sorted({r["loss"] for r in found.records("kv", "search")})
    mine = "score=reconstruction budget=all-share fate=merge share=0.25"
    rank = trials.index(results.one(found.records("kv", "search"), setting=mine)["loss"]) + 1
    lines.append(f"- By the loss of the search itself the composition of `composed` is number {rank} of {len(trials)}.")
    return "\n".join(lines)


def kv_keys(found: Results) -> str:
    """Keys found, asked after and before."""
    lengths = ((1024, 1), (2048, 1), (4096, 1), (2048, 4))
    found_keys = {
        (n, b, asked): _policies(found, "retrieval", length=n, batch=b, asked=asked)
        for n, b in lengths
        for asked in ("after", "before")
    }
    columns = [(n, 1, s) for n in (1024, 2048, 4096) for s in SHARES[:3]] + [(2048, 4, "0.25")]
    lines = []
    for name in _policies(found, "perplexity", length=4096, batch=1):
        if name == "unpatched":
            continue
        cells = []
        for n, b, share in columns:
            pair = [found_keys[n, b, asked].get(name, {}).get(share) for asked in ("after", "before")]
            cells.append(" / ".join("" if r is None else f"{100 * r['retrieval']:.0f}" for r in pair))
        lines.append([f"`{name}`", *cells])
    header = ["policy", "1,024 tokens: 50 %", "25 %", "12.5 %", "2,048: 50 %", "25 %", "12.5 %", "4,096: 50 %"]
    return table([*header, "25 %", "12.5 %", "2,048 padded: 25 %"], lines, 1)


def kv_keys_claims(found: Results) -> str:
    """All lengths together at a quarter, asked after."""
    counts: dict[str, list[int]] = {}
    for r in found.records("kv", "quality", batch=1, asked="after"):
        if "retrieval" in r and r["setting"] in ("", "budget=0.25"):
            mine = counts.setdefault(r["method"], [0, 0])
            mine[0] += round(r["retrieval"] * r["retrieval_count"])
            mine[1] += r["retrieval_count"]
    full = counts.pop("unpatched")
    values = {n: Value(right / count, *results.wilson(right / count, count)) for n, (right, count) in counts.items()}
    best, level = ranked(values)
    text = (
        f"- Asked after, at a quarter of the cache and all lengths together, `{best}` finds {counts[best][0]} of "
        f"{counts[best][1]} and the full cache {full[0]}; level with `{best}` by the 95 % intervals: "
    )
    text += ", ".join(f"`{n}` ({counts[n][0]})" for n in level) or "none"
    rest = [n for n in values if n != best and n not in level]
    most = max(rest, key=lambda n: counts[n][0])
    text += f". Of all others none finds more than {counts[most][0]} (`{most}`); "
    return text + f"`random_evict` finds {counts['random_evict'][0]}."


def kv_speed(found: Results) -> str:
    """Time and bytes at a quarter."""
    every = [_policies(found, "prefill_s", length=2048, batch=b) for b in (1, 4)]
    lines = []
    for name in every[0]:
        cells = [_name(name)]
        for by in every:
            r = by[name]["1" if name == "unpatched" else "0.25"]
            cells += [f"{r['prefill_s']:.1f}", f"{r['decode_tokens_per_s']:.1f}", f"{r['bytes_timed'] / 1e6:.1f}"]
        lines.append(cells)
    header = ["policy at 25 %", "prompt, s", "tokens/s", "MB", "batch of 4, padded: prompt, s", "tokens/s"]
    return table([*header, "MB a sample"], lines, 1)


def kv_scoring(found: Results) -> str:
    """What a policy costs at the end of a prompt."""
    lines = []
    for r in found.records("kv", "scoring"):
        more = r["setting"].replace("budget=0.25", "").strip()
        cells = [f"`{r['method']} {more}`" if more else f"`{r['method']}`", f"{r['score_ms']:.1f}"]
        lines.append([*cells, f"{r['policy_ms']:.1f}", f"{percent(r['policy_share'], digits=2)} %"])
    return table(["policy", "score, ms", "all, ms", "share of the prompt"], lines, 1)


def kv_decode(found: Results) -> str:
    """A token over a cache that was cut."""
    rows = found.records("kv", "decode")
    named = {"smollm2-135m": "SmolLM2-135M", "llama-3.2-1b": "Llama 3.2 1B, four layers"}
    lines = []
    for model, count in dict.fromkeys((r["model"], r["rows"]) for r in rows):
        mine = [results.one(rows, model=model, rows=count, method=m) for m in ("even", "flat", "rectangle")]
        lines.append([named[model], f"{count:,}", *(between(r, "ratio") for r in mine)])
    return table(["shapes", "rows", "even", "flat", "rectangle"], lines, 1)


def kvpress(found: Results) -> str:
    """Scores, rows, bytes and times beside kvpress's, and the rows that differ."""
    lines = []
    for r in found.records("kv", "kvpress"):
        more = r["setting"].replace("budget=0.25", "").strip()
        cells = [f"`{r['method']} {more}`" if more else f"`{r['method']}`"]
        cells += [f"{r['max_abs_difference']:.2g}", f"{r['largest']:.2g}"]
        cells += [f"{r['rows_differ']} of {r['rows_differ_count']:,}" if "rows_differ" in r else ""]
        cells += [f"{r['kvpress_bytes'] / 1e6:.1f}", f"{r['bytes'] / 1e6:.1f}"]
        lines.append([*cells, f"{r['kvpress_ms']:.3g}", f"{r['score_ms']:.3g}"])
    header = ["policy", "largest difference of scores", "largest score", "rows that differ", "MB kvpress", "MB tokred"]
    return table([*header, "ms kvpress", "ms tokred"], lines, 1)


_PARTS = (
    provenance, metrics, demo, vit_speed, diffusion, diffusion_claims, diffusion_speed, vlm, vlm_claims, vlm_cost,
    kv_perplexity, kv_perplexity_claims, kv_keys, kv_keys_claims, kv_speed, kv_scoring, kv_decode, kvpress,
)  # fmt: skip
PAGES = {PAGE: {part.__name__: part for part in _PARTS}, KEYMERGE: {"keymerge": keymerge}}
