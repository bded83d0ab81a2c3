"""No page claims a rank beside a figure in a sentence that was typed: those are made from the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pages import comparison, markdown
from benchmarks.pages.claims import claims
from tokred.bench import results

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p != comparison.PAGE]

# Paragraphs that stay as they are typed, by how they begin.
ALLOWED = {
    # What an interval is for, with a number that is an example.
    "docs/evaluate.md": ("`print(result)` is a table", "`print(found)` says which one is better"),
    # Published figures, of others' tables.
    "docs/methods/diffusion/ibtm.md": ("Measured by others on SD 3.5",),
    "docs/methods/diffusion/toma.md": ("The authors: SDXL",),
    "docs/methods/encoder/saint.md": ("ViT-H/14 at 224 pixels on ImageNet-1k",),
    "docs/methods/encoder/zero_tprune.md": ("DeiT-S on ImageNet-1k",),
    "docs/methods/kv/adore.md": ("Llama 7B: as good as full attention",),
    "docs/methods/kv/fastcache.md": ("LLaVA-1.5-7B on GQA at `factor=5`",),
    "docs/methods/kv/tokenbutler.md": ("Llama-2-7B, Llama-3.1-8B",),
    "docs/methods/vlm/divprune.md": ("LLaVA-1.5-7B at about 15 %",),
    "docs/methods/vlm/sparsevlm.md": ('LLaVA-1.5-7B at "192" tokens',),
    # How Whisper works; the number is a length.
    "docs/tutorials/audio.md": ("Whisper pads every recording",),
}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_rank_is_typed_beside_a_figure(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), ())
    typed = [c for c in claims(path.read_text("utf8")) if not c.text.startswith(allowed or "\0")]
    assert not typed, (
        "let benchmarks/pages make these sentences from the tables, or name them in ALLOWED: "
        + "; ".join(f"line {c.line} ({', '.join(c.words)}): {c.text[:80]}" for c in typed)
    )


def test_what_is_allowed_is_there() -> None:
    for name, starts in ALLOWED.items():
        found = [c.text for c in claims((ROOT / name).read_text("utf8"))]
        assert all(any(text.startswith(start) for text in found) for start in starts), name


@pytest.mark.parametrize(
    "text",
    [
        "`keymerge` is the best of all, at 76.3 dB.",
        "At a quarter `composed`\nhas the lowest perplexity (14.2).",
        "- It beats random pruning by 3 points.",
        "| `tome` | fastest | 2.1x |",
    ],
)
def test_claims_are_found(text: str) -> None:
    (found,) = claims(f"# Page\n\nNothing here.\n\n{text}\n\nAnd 3.5 here.")
    assert found.line == 5
    assert found.words


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results: made -->\n\nThe best is `tome` (0.99).\n\n<!-- end of made -->",
        "```python\nbest = 0.5  # best of 3.2\n```",
        "The best pairs merge.\n\nIt has 3.5 dB.",
        "The best of two, arXiv 2602.05605.",
        "`best=0.5` is 3.5 dB.",
    ],
)
def test_what_is_no_claim(text: str) -> None:
    assert claims(text) == []


def test_figures_of_the_readme_are_those_of_the_table() -> None:
    rows = markdown.Results().records("encoder", "demo")
    base, tome, random = rows[0], *(results.one(rows, method=m, setting="r=25") for m in ("tome", "random_prune"))
    text = re.sub(r"\s+", " ", (ROOT / "README.md").read_text("utf8"))
    assert f"ToMe at `r=25` takes {100 * tome['gmacs'] / base['gmacs']:.0f} % of the multiply-adds" in text
    said = f"{100 * tome['top1']:.1f} instead of {100 * base['top1']:.1f} % of top-1"
    assert f"runs {tome['speedup']:.1f} times as fast at {said}" in text
    assert f"random pruning of as much leaves {100 * random['top1']:.1f} %" in text
    assert abs(random["gmacs"] / tome["gmacs"] - 1) < 0.02
    assert results.level(markdown.value(tome, "top1"), markdown.value(base, "top1"))
    assert not results.level(markdown.value(random, "top1"), markdown.value(base, "top1"))
