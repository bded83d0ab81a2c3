"""Marked parts about denoisers: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pages.markdown import Record, Results, Value, between, compared, percent, table, value
from tokred.bench import results

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
        "Which token of a cell is the destination decides much on this model: `tomesd` with a fixed one has "
        f"{_swing(of('ToMeSD, fixed choice', 'psnr'))}.",
        f"`todo` with `nearest` reads the first token of each cell, with `nearest-exact` the middle one: at factor 2 "
        f"{_denoised(found, 'ToDo, nearest', '2')['psnr']:.1f} against {exact.value:.1f} dB.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _swing(values: Sequence[Value]) -> str:
    return ", ".join(f"{v.value:.0f} dB at {ratio}" for v, ratio in zip(values, RATIOS, strict=True))


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
