"""The table that README and the home page begin with: one setting a task, its gain and loss, and chance beside it."""

from __future__ import annotations

from benchmarks.pages.markdown import Record, Results, between, percent, table
from tokred.bench import results


def _faster(record: Record) -> str:
    return f"{between(record, 'speedup')} times as fast"


def _image(found: Results) -> list[str]:
    rows = found.records("encoder", "methods", model="dinov2")
    tome, drawn = (results.one(rows, method=m, setting="r=13") for m in ("tome", "random"))
    low, high = (percent(-tome[f"top1_difference_{end}"]) for end in ("high", "low"))
    lost = f"{percent(-tome['top1_difference'])} points of top-1 ({low} to {high})"
    instead = f"{percent(-drawn['top1_difference'])} points"
    return ["classify images, DINOv2 ViT-S", "`tome r=13`", _faster(tome), lost, instead, "encoder: methods"]


def _speech(found: Results) -> list[str]:
    rows = found.records("encoder", "audio")
    tome, drawn = (results.one(rows, method=m, setting="r=200") for m in ("tome", "random"))
    gain = f"{percent(tome['gmacs_share'], digits=0)} % of the encoder's multiply-adds"
    lost, instead = (f"{percent(r['word_error'])} % of words differ" for r in (tome, drawn))
    return ["write down speech, Whisper tiny", "`tome r=200`", gain, lost, instead, "encoder: audio"]


def _denoised(found: Results) -> list[str]:
    rows = [r for r in found.records("diffusion", "quality") if r["setting"] == "ratio=0.5 max_downsample=4"]
    merged, drawn = (results.one(rows, method=m) for m in ("keymerge", "random_latent_prune"))
    lost, instead = (f"PSNR {r['psnr']:.0f} dB" for r in (merged, drawn))
    take = f"`keymerge {merged['setting']}`"
    return ["draw, UNet of 1,024 tokens", take, _faster(merged), lost, instead, "diffusion: quality"]


def _large(found: Results) -> list[str]:
    rows = found.records("diffusion", "speed", size=512)
    (merged,) = (r for r in rows if r["method"] == "tomesd" and r["setting"].startswith("ratio=0.5 max_"))
    cells = [_faster(merged), "not measured: random weights", "not measured", "diffusion: speed"]
    return ["a step of SD 1.5 at 512 pixels, narrowed", "`tomesd ratio=0.5`", *cells]


def _answers(found: Results) -> list[str]:
    rows = found.records("vlm", "answers")
    dense = results.one(rows, method="unpatched")
    names = ("fastv", "random_visual", "uniform_visual")
    pruned, drawn, even = (results.one(rows, method=m, setting="budget=64") for m in names)
    share = [percent(r["exact"], digits=0) for r in (pruned, dense, drawn, even)]
    lost = f"{share[0]} % right instead of {share[1]} %"
    instead = f"{share[2]} %; evenly spaced: {share[3]} %"
    return ["ask about images, 256 tokens each", "`fastv`, 64 left", _faster(pruned), lost, instead, "vlm: answers"]


def _cache(found: Results) -> list[str]:
    same = {"asked": "after", "data": "several"}
    rows = found.records("kv", "tasks", **same)
    dense, kept = results.one(rows, method="unpatched"), results.one(rows, method="kvzip")
    drawn = results.one(rows, method="random_evict")
    share = [percent(r["retrieval"], digits=0) for r in (kept, dense, drawn)]
    gain = f"{percent(kept['bytes'] / dense['bytes'], digits=0)} % of the cache's bytes"
    lost = f"{share[0]} % of keys found instead of {share[1]} %"
    return ["look up in 960 tokens, SmolLM2-135M", "`kvzip budget=0.25`", gain, lost, f"{share[2]} %", "kv: tasks"]


def _long(found: Results) -> list[str]:
    rows = found.records("kv", "limit", model="smollm2-135m", method="snapkv")
    last = max(rows, key=lambda r: r["tokens"])
    most = max(r["most_bytes"] for r in rows) / 2**20
    gain = f"{most:.0f} MiB at most instead of {last['dense_bytes'] / 2**20:,.0f} MiB"
    cells = [gain, "not measured at this length", "not measured", "kv: limit"]
    return [f"read and write {last['tokens']:,} tokens, SmolLM2-135M", "`limited`, `snapkv`", *cells]


def face(found: Results) -> str:
    """Task, setting, gain, loss, and what a random choice loses."""
    lines = [row(found) for row in (_image, _speech, _denoised, _large, _answers, _cache, _long)]
    return table(["task", "take this", "gain", "loss", "loss by a random choice", "table: scenario"], lines, 6)
