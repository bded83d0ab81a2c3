"""``benchmarks/engine.py``: rows of ``tokred.benchmark`` by several metrics become records of one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from benchmarks.engine import measured
from tokred.bench import embedded, results

QUICK: dict[str, Any] = {"rounds": 1, "progress": False}


def confident(output: Tensor, batch: Any) -> Tensor:
    return output.softmax(-1).amax(-1)


def test_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = embedded.load()
    images, labels = embedded.sample(12)
    chosen = {"tome budget=1": tokred.ToMe(r=16), "evit kappa=0.5": "evit kappa=0.5", "snapkv budget=2": "snapkv"}
    options = {"rounds": 2, "values": tmp_path / "values", "progress": False}
    metrics = {"top1": "top1", "quality": confident}
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    found = measured(
        model, chosen, batches, metrics, name="embedded", data_from="some-data=1", more={"batch": 6}, **options
    )
    assert "snapkv budget=2: " in capsys.readouterr().err, "what cannot run is told"
    out = results.write(tmp_path / "table.csv", found, "methods")
    rows = results.records(results.read(out))
    assert [(r["method"], r["setting"]) for r in rows] == [
        ("unpatched", ""),
        ("tome", "budget=1"),
        ("evit", "kappa=0.5"),
    ]
    assert all(r["batch"] == 6 and r["versions"].endswith("some-data=1") for r in rows)
    assert all(
        {"top1", "top1_low", "top1_count", "quality", "speedup", "gmacs_share", "tokens_out"} <= r.keys() for r in rows
    )
    assert rows[1]["gmacs_share"] < 1 == rows[0]["gmacs_share"]
    assert rows[0]["top1_count"] == 12
    assert {p.name for p in (tmp_path / "values").glob("*.csv")} == {"values.csv"}
    assert all({"top1_difference", "top1_difference_low"} <= r.keys() for r in rows)
    alone = tokred.benchmark(model, "evit kappa=0.5", batches, "cosine", baselines=False, **QUICK)
    _, again = measured(model, ["evit kappa=0.5"], batches, {"cosine": "cosine"}, name="embedded", **QUICK)
    assert again["rounds"] == 2, "a pair is timed on every batch"
    assert again["cosine_lowest"] == min(alone.samples["evit kappa=0.5"].values)
    assert not tokred.patched(model)
    assert torch.equal(images, embedded.sample(12)[0])
