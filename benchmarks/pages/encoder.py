"""Marked parts about encoders: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from benchmarks.pages.markdown import Results, between, code, compared, percent, table, value
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


def demo_claims(found: Results) -> str:
    """Whether any row's top-1 is apart from the unpatched model's, and from random merging's."""
    rows = found.records("encoder", "demo")
    base = value(rows[0], "top1", 100)
    apart = [r for r in rows[1:] if not results.level(value(r, "top1", 100), base)]
    others = [f"`{r['method']} {r['setting']}` ({100 * r['top1']:.1f} %)" for r in apart]
    if others:
        return f"Outside of the unpatched model's interval of top-1 are {', '.join(others)}."
    return "By the 95 % intervals no row's top-1 is apart from the unpatched model's, random merging's included."


def operators(found: Results) -> str:
    """Every operator on a CPU beside its plain chain, and which are slower than it."""
    rows = [r for r in found.records("kernels", "cpu") if "speedup" in r]
    lines = []
    for r in rows:
        shape = " ".join(part for part in r["setting"].split() if not part.startswith("goal="))
        lines.append([r["method"], f"`{shape}`", between(r, "speedup"), f"{r['memory_ratio']:.3f}"])
    slower = [
        f"{r['method']} (`{line[1][1:-1]}`)" for r, line in zip(rows, lines, strict=True) if r["speedup_high"] < 1
    ]
    text = "Slower than the plain chain by their quartiles: " + (", ".join(slower) or "none") + "."
    header = ["operator", "shapes", "times as fast as the chain (quartiles)", "of the chain's memory"]
    return f"{table(header, lines)}\n\n{text}"


def audio(found: Results) -> str:
    """Whisper with fewer audio tokens."""
    lines = []
    for r in found.records("encoder", "audio")[1:]:
        cells = [f"`{r['method']} {r['setting']}`", f"{r['tokens_out']:,}", f"{percent(r['gmacs_share'], digits=0)} %"]
        lines.append([*cells, f"{percent(r['word_error'])} %", between(r, "unchanged", "{:.0f}", 100)])
    header = ["setting", "tokens left of 1,500", "multiply-adds of the encoder", "word error"]
    return table([*header, "prompts unchanged, % (95 % interval)"], lines, 1)


def audio_claims(found: Results) -> str:
    """Merging beside random choices at equal tokens, by the intervals of unchanged prompts."""
    rows = {f"{r['method']} {r['setting']}": r for r in found.records("encoder", "audio")[1:]}
    lines = []
    for amount in ("r=200", "r=300"):
        mine = rows[f"tome {amount}"]
        words = []
        for rival in ("random", "random_prune"):
            if (other := rows.get(f"{rival} {amount}")) is not None:
                word = compared(value(mine, "unchanged"), value(other, "unchanged"))
                words.append(f"{word} `{rival} {amount}`")
        lines.append(f"- `tome {amount}` is {' and '.join(words)}, by the intervals of unchanged prompts.")
    ends = [value(rows[f"tome r=300{more}"], "unchanged") for more in (" expose=last", "")]
    lines.append(f"- `tome r=300` with `expose=last` is {compared(*ends)} without it, by the same intervals.")
    return "\n".join(lines)


def text(found: Results) -> str:
    """Sentence embeddings with fewer tokens."""
    lines = []
    for r in found.records("encoder", "text"):
        name = f"`{r['method']} {r['setting']}`".replace(" `", "`") if r["method"] != "unpatched" else "unpatched"
        cells = [name, f"{percent(r['gmacs_share'])} %", between(r, "cosine", "{:.3f}")]
        lines.append([*cells, between(r, "accuracy", "{:.3f}")])
    return table(["setting", "work", "cosine (95 % interval)", "accuracy (95 % interval)"], lines, 1)


def text_claims(found: Results) -> str:
    """Which settings are nearer than a random choice of at most as much work."""
    rows = {f"{r['method']} {r['setting']}": r for r in found.records("encoder", "text")}
    rival = rows["random_prune r=5"]
    near = {n: r for n, r in rows.items() if r["gmacs_share"] <= rival["gmacs_share"] + 0.01 and r is not rival}
    lines = []
    for metric, word in (("cosine", "cosine"), ("accuracy", "accuracy of the probe")):
        where = {n: compared(value(r, metric), value(rival, metric)) for n, r in near.items()}
        words = [w for w in ("better than", "level with", "worse than") if w in where.values()]
        parts = [f"{w} it are {code(n for n in near if where[n] == w)}" for w in words]
        share = f"{percent(rival['gmacs_share'], digits=0)} %"
        lines.append(f"- Of at most the work of `random_prune r=5` ({share}), by {word}: {'; '.join(parts)}.")
    return "\n".join(lines)


def segmentation(found: Results) -> str:
    """Maps that DINOv2's saliency decoder draws from un-merged tokens."""
    lines = []
    for r in found.records("encoder", "bench", model="dinov2")[1:]:
        cells = [f"`{r['method']} {r['setting']}`", str(r["tokens_out"]), f"{percent(r['gmacs_share'], digits=0)} %"]
        cells += [f"{r['saliency_mae']:.3f}", f"{r['saliency_correlation']:.3f}", f"{r['saliency_iou']:.3f}"]
        lines.append(cells)
    header = ["setting", "tokens left of 257", "multiply-adds", "mean error of the map (0 to 1)", "correlation"]
    return table([*header, "IoU of what exceeds 0.5"], lines, 1)
