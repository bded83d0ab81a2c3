"""The marked parts of pages: which function makes which part of which page."""

from __future__ import annotations

from benchmarks.pages import (
    caches,
    clips,
    diffusion,
    encoder,
    face,
    held,
    learned,
    needed,
    steps,
    tasks,
    trained,
    tune,
    vlm,
)
from benchmarks.pages.markdown import ROOT, Results, table
from tokred.bench import results
from tokred.bench.metrics import METRICS

DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"


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


_PARTS = (
    provenance, metrics, encoder.demo, encoder.demo_claims, encoder.vit_speed, trained.learned,
    trained.learned_claims, trained.deciding, trained.deciding_claims, trained.learned_vlm, encoder.operators,
    diffusion.diffusion,
    diffusion.diffusion_claims, diffusion.diffusion_speed, vlm.vlm, vlm.vlm_claims, vlm.vlm_cost, vlm.vlm_cost_claims,
    needed.questions, clips.clips, clips.clips_claims, clips.clips_times, clips.early, clips.pixels,
    clips.streams, clips.streams_claims,
    tasks.kv_tasks_kept, tasks.kv_tasks, tasks.kv_tasks_claims, caches.kv_perplexity, caches.kv_perplexity_claims,
    caches.kv_keys, caches.kv_keys_claims, caches.kv_gemma3, caches.kv_speed, caches.kv_scoring,
    caches.kv_scoring_claims, caches.kv_decode, caches.kv_decode_claims, steps.kv_steps, steps.kv_steps_claims,
    steps.kv_stores, steps.kv_stores_claims,
    caches.kvpress, caches.kv_long, held.kv_bytes, held.kv_bytes_keys, held.kv_bytes_claims, learned.kv_learned,
    learned.kv_learned_claims,
)  # fmt: skip
PAGES = {
    PAGE: {part.__name__: part for part in _PARTS},
    ROOT / "README.md": {"face": face.face},
    DOCS / "index.md": {"face": face.face},
    DOCS / "methods" / "diffusion" / "keymerge.md": {"keymerge": diffusion.keymerge},
    DOCS / "methods" / "encoder" / "spatten.md": {"text": encoder.text, "text_claims": encoder.text_claims},
    DOCS / "methods" / "encoder" / "ltp.md": {"text": encoder.text, "text_claims": encoder.text_claims},
    DOCS / "caches.md": {"kv_take": held.kv_take, "kv_long": caches.kv_long},
    DOCS / "methods" / "kv" / "kv.md": {"kv_memory": caches.kv_memory},
    DOCS / "finetune.md": {
        "learned_dinov2": trained.learned_dinov2,
        "learned_dinov2_claims": trained.learned_dinov2_claims,
    },
    DOCS / "tune.md": {"tune": tune.tune, "tune_claims": tune.tune_claims},
    DOCS / "tutorials" / "kv.md": {"kv_limit": caches.kv_limit},
    DOCS / "tutorials" / "audio.md": {"audio": encoder.audio, "audio_claims": encoder.audio_claims},
    DOCS / "tutorials" / "segmentation.md": {"segmentation": encoder.segmentation},
}
