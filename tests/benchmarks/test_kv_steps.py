"""The benchmark of steps: what its arms hold and run, and the page that is made of its rows."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.kv import steps as script
from benchmarks.pages import steps as page
from benchmarks.pages.markdown import Results
from tokred.bench import results
from tokred.bench.arms import BASE

TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
}  # fmt: skip
OPTIONS = {"layers": None, "batch": 1, "device": "cpu", "dtype": "float32", "rounds": 2, "clock": "cpu", "arm": None}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(script.SHAPES, "tiny", TINY)


@pytest.mark.parametrize("name", script.PARTS)
def test_every_part_makes_rows(name: str) -> None:
    part = script.PARTS[name]._replace(steps=2 if script.PARTS[name].steps else 0)
    options = Namespace(**OPTIONS)
    with torch.inference_mode():
        rows = script.measure(name, part, "tiny", 48, options)
    plain = [BASE, "in-place"] if part.steps else [BASE]
    assert [r["method"] for r in rows] == [*plain, *(text.split()[0] for text in part.arms)]
    for row in rows:
        assert results.rows(row, "steps"), "every field is known"
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["clock"] == "cpu"
        assert ("ratio_in_place" in row) == bool(part.steps)


@pytest.mark.parametrize("text", ["streaming_llm budget=48", "h2o budget=48"])
def test_a_filled_cache_is_one_that_has_read_its_prompt(text: str) -> None:
    """It holds its budget, and every step lets one row go for the one that comes."""
    options = Namespace(**OPTIONS)
    with torch.inference_mode():
        arm = script.filled(text, script.build("tiny", None, torch.float32, "cpu"), options, 48)
        cache = arm.reset()
        for _ in range(3):
            assert {layer.width for layer in cache.layers} == {48}
            assert not any(layer.engine.idle for layer in cache.layers)
            arm.model(torch.zeros(1, 1, dtype=torch.long), **tokred.cache_kwargs(cache))
        assert {layer.seen for layer in cache.layers} == {51}
        assert {layer.seen for layer in arm.reset().layers} == {48}


def test_the_page(tmp_path: Path) -> None:
    assert page.kv_steps(Results(tmp_path)) == page.kv_steps_claims(Results(tmp_path)) == page.NOTHING
    base: dict[str, Any] = {
        "model": "m",
        "case": "evicting",
        "rows": 1024,
        "setting": "budget=1024",
        "dtype": "float32",
    }
    ends = {
        "unpatched": (1, 1, 1),
        "h2o": (0.8, 0.7, 0.9),
        "streaming_llm": (1.1, 1.05, 1.2),
        "snapkv": (1.02, 1.0, 1.1),
    }
    made = [
        {**base, "method": name, "ms_a_token": 2.0, **results.between("ratio", *three)} for name, three in ends.items()
    ]
    made += [{"model": "m", "case": "prompt", "tokens": 4096, "setting": "budget=0.25", "method": "h2o",
              "dtype": "float32", "prefill_ms": 900.0, **results.between("ratio", 1.3, 1.2, 1.35)}]  # fmt: skip
    results.write(tmp_path / "kv.csv", made, "steps")
    found = Results(tmp_path)
    assert "| evicting | m | float32 | `h2o` | 1,024 | 2 | 0.80 (0.70 to 0.90) |  |" in page.kv_steps(found)
    said = page.kv_steps_claims(found)
    assert (
        "`streaming_llm`, at most 1 times the unpatched model's time: missed at 1,024 rows of m in float32 (1.10 (1.05"
        in said
    )
    assert "`snapkv`, at most 1.03 times the unpatched model's time: not told apart at 1,024 rows" in said
    assert (
        "a whole prompt, `h2o`, at most 1.4 times the unpatched model's time: met at 4,096 tokens of m in float32"
        in said
    )


def test_the_page_of_stores(tmp_path: Path) -> None:
    assert page.kv_stores(Results(tmp_path)) == page.kv_stores_claims(Results(tmp_path)) == page.NOTHING
    made: list[dict[str, Any]] = []
    for rows, (ratio, half) in {1024: (1.2, 0.3), 8192: (0.8, 0.2)}.items():
        base: dict[str, Any] = {"model": "m", "rows": rows, "dtype": "float32", "ms_a_token": 2.0, "bytes": 2**20}
        for name, setting, a, b in (
            ("dense", "type=float32", 1.0, 0.4),
            ("kivi", "bits=4", ratio, half),
            ("mustafar", "", 2.0, 0.5),
        ):
            spread = {**results.between("ratio", a, a, a), **results.between("ratio_bfloat16", b, b, b)}
            made.append({**base, "method": name, "setting": setting, **spread})
    results.write(tmp_path / "kv.csv", made, "stores")
    found = Results(tmp_path)
    assert "| m | 1,024 | dense, float32 | 1.0 | 2 | 1.00 (1.00 to 1.00) | 0.40" in page.kv_stores(found)
    said = page.kv_stores_claims(found)
    assert "in bfloat16, by the quartiles: at every size `kivi` `bits=4`, `mustafar`." in said
    assert "in float32, by the quartiles: at some sizes `kivi` `bits=4` (1 of 2); nowhere `mustafar`." in said
