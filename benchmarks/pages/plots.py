"""The plots in docs/img that tables of results are enough for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.pages import held, tasks, tune
from benchmarks.pages.clips import answers as clip_answers
from benchmarks.pages.clips import weights
from benchmarks.pages.diffusion import FAMILIES, MODES, RATIOS
from benchmarks.pages.markdown import Results
from tokred.bench import plots, results
from tokred.bench.plots import Panel

MIB = 2**-20
MEASURES = ("top1", "cosine", "saliency_mae")
KV = ("perplexity", "retrieval", "bytes", "bytes_window", "bytes_timed", "prefill_s", "decode_tokens_per_s")


def draw(found: Results, folder: Path) -> list[Path]:
    """All plots whose scenario has rows."""
    (folder / "kv").mkdir(parents=True, exist_ok=True)
    made = []
    for part in (
        methods,
        demo,
        learned,
        diffusion,
        vlm,
        clips,
        horizon,
        streams,
        kv_tasks,
        kv_quality,
        kv_limit,
        kv_memory,
        held.plot,
        tune.plot,
    ):
        made += part(found, folder)
    return made


def _frame(found: Results, wing: str, scenario: str) -> pd.DataFrame:
    return results.wide(found.tables.get(wing, ()), scenario)


def methods(found: Results, folder: Path) -> list[Path]:
    """Quality of every vision method against speed."""
    made = []
    for model in ("embedded", "dinov2"):
        records = found.records("encoder", "methods", model=model)
        if records:
            made.append(plots.save(_methods(records), folder / f"methods_{model}.png"))
    return made


def _methods(records: list[dict[str, Any]]) -> Any:
    """A front of each measure that the records have, each point with its interval."""
    frame = pd.DataFrame(records)
    shown = tuple(m for m in MEASURES if m in frame and frame[m].notna().any())
    first = records[0]
    note = (
        f"{first['model']}, {first['input']} px, {first['tokens_in']} tokens, batch {first['batch']}, "
        f"{first['dtype']}, {first['device']}, {first['threads']} threads, tokred at {first['commit'] or 'a package'}"
    )
    if first.get("top1") is not None:
        note += f". Top-1: {first['answered_by']}, {first['top1_images']} images of {first['data']}"
    title = f"{first['model']}: quality against speed, each point paired with the unpatched model"
    return plots.pareto(frame, shown, title=title, note=note)


def demo(found: Results, folder: Path) -> list[Path]:
    """The plot of the demo."""
    frame = _frame(found, "encoder", "demo")
    if frame.empty:
        return []
    first = frame.iloc[0]
    note = f"Embedded ViT, {first['top1_count']} test images of Fashion-MNIST, {first['threads']} threads, "
    note += str(first["device"])
    figure = plots.pareto(frame, title="Fewer tokens: accuracy against speed", note=note)
    return [plots.save(figure, folder / "demo.png")]


def learned(found: Results, folder: Path) -> list[Path]:
    """Top-1 of encoders that were trained with fewer tokens, over speed: a line a name, a point a share of the work."""
    frame = _frame(found, "encoder", "learned")
    if frame.empty or "speedup" not in frame or not (frame["model"] == "embedded").any():
        return []
    frame = frame[(frame["model"] == "embedded") & (frame["goal"].astype(float) < 1)]
    dense = results.one(found.records("encoder", "learned", model="embedded"), case="dense")
    level = (100 * float(dense["top1"]), "dense, trained as long")
    frame = frame.assign(amount=[f"{float(g):.0%}" for g in frame["goal"]])
    faster, percents = "times as fast as the dense model", "top-1 (%)"
    panels = []
    for column, title, mine in (
        ("with", "trained with fewer tokens", ~frame["case"].str.endswith("-untrained")),
        ("without", "not trained", frame["case"].str.endswith("-untrained")),
    ):
        frame = frame.assign(**{column: (100 * frame["top1"]).where(mine)})
        panels.append(Panel("speedup", column, faster, percents, title, notes="amount", order="goal", level=level))
    frame = frame.assign(name=frame["case"].str.removesuffix("-untrained"))
    return [plots.save(plots.lines(frame, panels, by="name"), folder / "learned.png")]


def diffusion(found: Results, folder: Path) -> list[Path]:
    """Quality of a denoiser's images against speed, a line a family of settings."""
    frame = _frame(found, "diffusion", "quality")
    if frame.empty:
        return []
    family, amount = dict[tuple[str, str], str](), dict[tuple[str, str], str]()
    for name, (method, form) in FAMILIES.items():
        for ratio in RATIOS:
            family[method, form.format(ratio)], amount[method, form.format(ratio)] = name, ratio
    for mode in MODES:
        for factor in "234":
            key = ("todo", f"factors=(1,1,{factor}) mode={mode}")
            family[key], amount[key] = f"ToDo, {mode}", factor
    keys = list(zip(frame["method"], frame["setting"], strict=True))
    frame = frame.assign(family=[family.get(k, "unpatched") for k in keys], amount=[amount.get(k, "") for k in keys])
    faster = "times as fast as the unpatched denoiser"
    panels = [
        Panel("speedup", "psnr", faster, "PSNR to the unmerged image (dB)", notes="amount", order="amount"),
        Panel("speedup", "mae", faster, "mean absolute error (lower is better)", order="amount"),
        Panel("speedup", "spectrum_db", faster, "distance of spectra (dB, lower is better)", order="amount"),
    ]
    first = frame.iloc[0]
    title = f"Terrain UNet, {int(frame['psnr_count'].max())} samples; {first['device']}, {first['threads']} threads"
    return [plots.save(plots.lines(frame, panels, by="family", title=title), folder / "diffusion.png")]


def vlm(found: Results, folder: Path) -> list[Path]:
    """Exact answers over speed, and over the tokens left."""
    frame = _frame(found, "vlm", "answers")
    if frame.empty:
        return []
    base = frame[frame["method"] == "unpatched"].iloc[0]
    level = (float(base["exact"]), "unpatched")
    panels = [
        Panel("speedup", "exact", "times as fast, whole answer", "exact answers (%)", times=100, level=level,
              order="tokens_left"),
        Panel("tokens_left", "exact", "visual tokens left of 256", "exact answers (%)", times=100, level=level,
              xscale="log", ticks=((64, 32, 16), ("64", "32", "16"))),
    ]  # fmt: skip
    return [plots.save(plots.lines(frame, panels), folder / "vlm.png")]


def clips(found: Results, folder: Path) -> list[Path]:
    """Exact answers over the share of visual tokens: a panel for clips of so many frames and a model's weights."""
    frame = _frame(found, "vlm", "clips")
    if frame.empty or "exact" not in frame:
        return []
    frame = frame[frame["exact"].notna() & (frame["method"] != "restore")]
    frame = frame.assign(share=100 * frame["setting"].str.extract(r"share=(\S+)")[0].astype(float))
    panels = []
    for (frames, model), (kind, _) in clip_answers(found).items():
        mine = (frame["asked"] == kind) & (frame["model"] == model) & (frame["frames"].astype(int) == frames)
        dense = frame[mine & (frame["method"] == "unpatched")].iloc[0]
        name = f"{frames} {model}"
        frame = frame.assign(**{name: frame["exact"].where(mine & frame["share"].notna())})
        panels.append(
            Panel("share", name, "% of the visual tokens", "exact answers (%)",
                  f"{kind}? {frames} frames, {weights(model).strip('`')}", "log", times=100,
                  level=(float(dense["exact"]), "all tokens"), ticks=((25, 10, 5), ("25", "10", "5")))
        )  # fmt: skip
    return [plots.save(plots.lines(frame, panels), folder / "clips.png")]


def horizon(found: Results, folder: Path) -> list[Path]:
    """What is lost of the answer's probability where visual tokens leave before a layer, by kind of question."""
    frame = _frame(found, "vlm", "horizon")
    if frame.empty:
        return []
    frame = frame.assign(layer=frame["setting"].str.extract(r"layer=(\d+)")[0].astype(int))
    frame = frame.assign(method=frame["asked"] + ", " + frame["model"].map(lambda m: weights(m).strip("`")))
    panel = Panel("layer", "answer_lost", "decoder layer before which all visual tokens leave",
                  "probability of the answer that is lost (%)", times=100)  # fmt: skip
    return [plots.save(plots.lines(frame, [panel]), folder / "horizon.png")]


def streams(found: Results, folder: Path) -> list[Path]:
    """Memory and time of a frame along a stream, a row of panels for each model and size of its frames."""
    frame = _frame(found, "vlm", "stream")
    if frame.empty:
        return []
    frame = frame[frame["ms"].notna()]
    frame = frame.assign(method=frame["method"].replace("unpatched", "keeps everything"), held=frame["bytes"] * MIB)
    made = []
    shapes = ["model", *(name for name in ("size", "tokens") if name in frame)]
    for key, mine in frame.groupby(shapes, sort=False, dropna=False):
        model, *shape = key if isinstance(key, tuple) else (key,)
        # One setting has the method's name, several of one method theirs.
        several = mine.groupby("method")["setting"].transform("nunique") > 1
        mine = mine.assign(method=mine["method"].where(~several, mine["setting"]))
        ticks = sorted(mine["frames"].unique())
        panels = [
            Panel("frames", column, "frames seen", label, title, ylim=(0, 1.1 * float(mine[most].max())),
                  ticks=(ticks, [f"{n:,}" for n in ticks]) if len(ticks) < 9 else None)
            for column, most, label, title in (
                ("held", "held", "MiB that the stream holds", "Memory"),
                ("ms", "ms_high" if "ms_high" in mine else "ms", "ms a frame, median and quartiles", "Time of a frame"),
            )
        ]  # fmt: skip
        what = ", ".join([str(model), *(f"{name} {one:g}" for name, one in zip(shapes[1:], shape, strict=True))])
        name = "_".join(["stream", *([] if not made else [str(len(made) + 1)])])
        made.append(plots.save(plots.lines(mine, panels, title=what), folder / f"{name}.png"))
    return made


def kv_quality(found: Results, folder: Path) -> list[Path]:
    """A plot a measure of cache policies: lines over the budget, or bars where there is one."""
    frame = _frame(found, "kv", "quality")
    if frame.empty:
        return []
    share = frame["setting"].str.removeprefix("budget=").replace("", "1").astype(float)
    frame = frame.assign(share=share, asked=frame["asked"].fillna(""))
    made = []
    for metric in KV:
        for (asked, batch, length), mine in frame[frame[metric].notna()].groupby(["asked", "batch", "length"]):
            base = mine[mine["method"] == "unpatched"]
            level = (float(base[metric].iloc[0]), "unpatched") if len(base) else None
            budgets = sorted(mine.loc[mine["method"] != "unpatched", "share"].unique())
            what = f"{length} tokens" + f", asked {asked}" * bool(asked) + f", batch {batch}" * (batch != 1)
            if len(budgets) == 1:
                panel = Panel("", metric, metric, " ", f"{what}, {100 * budgets[0]:g} % of the cache", level=level)
            else:
                ticks = (budgets, [f"{100 * b:g} %" for b in budgets])
                panel = Panel("share", metric, "share of the cache kept", "", what, "log", ticks=ticks, level=level)
            parts = [str(part) for part in (metric, asked, batch, length) if part != ""]
            made.append(plots.save(plots.lines(mine, [panel]), folder / "kv" / f"{'_'.join(parts)}.png"))
    return made


def kv_tasks(found: Results, folder: Path) -> list[Path]:
    """Perplexity of every kind of windows at a quarter of the cache, as a multiple of the full cache's."""
    frame = _frame(found, "kv", "tasks")
    if frame.empty:
        return []
    frame = frame[frame["setting"] == "budget=0.25"]
    panels = []
    for kind in (k for k in tasks.WINDOWS if (frame["data"] == k).any()):
        column = f"ratio, {kind}"
        frame = frame.assign(**{column: frame["perplexity_ratio"].where(frame["data"] == kind)})
        panels.append(Panel("", column, "times the full cache's perplexity", " ", kind, level=(1.0, "full cache")))
    return [plots.save(plots.lines(frame, panels), folder / "kv_tasks.png")] if panels else []


def kv_limit(found: Results, folder: Path) -> list[Path]:
    """Bytes over tokens under a hard limit: MiB of one policy beside a full cache, several as shares of their limit."""
    frame = _frame(found, "kv", "limit")
    if frame.empty:
        return []
    frame = frame[frame["most_bytes"].notna()]
    limit = frame["setting"].str.extract(r"limit=(\d+)")[0].astype(float)
    several = frame.groupby("model")["method"].transform("nunique") > 1
    held = (frame["most_bytes"] * MIB).where(~several, 100 * frame["most_bytes"] / limit)
    dense = (frame["dense_bytes"] * MIB).where(~several, 100 * frame["dense_bytes"] / limit)
    frame = frame.assign(held=held, several=several, limit=limit)
    full = frame.assign(method="keeps everything", held=dense).drop_duplicates(["model", "tokens"])
    both = pd.concat([frame, full])
    panels = []
    for model, mine in frame.groupby("model", sort=False):
        many, most = bool(mine["several"].iloc[0]), float(mine["limit"].iloc[0])
        column = f"held, {model}"
        both[column] = both["held"].where(both["model"] == model)
        text = "% of the limit held, at most" if many else "MiB held, at most"
        panels.append(
            Panel("tokens", column, "tokens seen", text, f"{model}, {most * MIB:g} MiB",
                  yscale="linear" if many else "log", level=(100.0 if many else most * MIB, "limit"),
                  ylim=(0, 110) if many else None)
        )  # fmt: skip
    return [plots.save(plots.lines(both, panels, marks=False), folder / "kv_limit.png")]


def kv_memory(found: Results, folder: Path) -> list[Path]:
    """Memory of scoring and compressing over the length, beside the matrix that nobody makes."""
    frame = _frame(found, "kv", "memory")
    if frame.empty:
        return []
    lengths = sorted(frame["tokens"].unique())
    last = frame[frame["tokens"] == lengths[-1]].sort_values("extra_bytes", ascending=False)
    parts = [frame[frame["method"] == name] for name in last["method"]]
    first = parts[0]
    parts.append(first.assign(method="N x N numbers", extra_bytes=first["matrix_bytes"]))
    parts.append(first.assign(method="keys and values of the prompt", extra_bytes=first["dense_bytes"]))
    ticks = (lengths, [f"{n:,}" for n in lengths])
    panel = Panel("tokens", "extra_bytes", "tokens of the prompt", "MiB above the memory in use before",
                  "Scoring and compressing the cache of one layer", "log", "log", ticks, MIB)  # fmt: skip
    return [plots.save(plots.lines(pd.concat(parts), [panel]), folder / "kv_memory.png")]
