"""Rows of a benchmark under the names of timm's results tables."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("timm")
import timm

import tokred
from tokred.eval import timm_table

# The heads of timm's tables of accuracy and of speed, as it publishes them.
PUBLISHED = (
    "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation",
    "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count,infer_gmacs",
)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    data = [(torch.randn(4, 3, 160, 160), torch.randint(0, 7, (4,))) for _ in range(2)]
    both = tokred.benchmark(model, ["tome r=8", "snapkv"], data, ["top1", "top5"], rounds=1, progress=False)
    return model, both.by("top1"), both.by("top5"), both


def test_columns_are_timms(measured, tmp_path):
    model, one, five, both = measured
    file = tmp_path / "out" / "results.csv"
    rows = tokred.eval.timm_columns(one, file, model=model, batch_size=4, top5=five)
    assert tokred.eval.timm_columns(both, model=model, batch_size=4) == rows, "of one pass"
    for head in PUBLISHED:
        assert set(head.split(",")) <= set(timm_table.COLUMNS)
    assert tuple(PUBLISHED[0].split(",")) == timm_table.ACCURACY
    with file.open(newline="") as lines:
        assert next(csv.reader(lines)) == list(timm_table.COLUMNS)
    assert [r["method"] for r in rows] == [r["method"] for r in one.measured]
    assert "snapkv" not in {r["method"] for r in rows}, "it was not measured"
    dense, tome = rows[0], next(r for r in rows if r["method"] == "tome")
    assert {r["model"] for r in rows} == {"test_vit.r160_in1k"}, "as timm names these weights"
    assert dense["top1"] == round(100 * one.rows[0]["quality"], 3)
    assert dense["top1"] + dense["top1_err"] == 100
    assert tome["top5"] == round(100 * next(r for r in five.rows if r["method"] == "tome")["quality"], 3)
    assert (dense["img_size"], dense["infer_img_size"], dense["infer_batch_size"]) == (160, 160, 4)
    assert dense["param_count"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert (dense["crop_pct"], dense["interpolation"]) == (0.95, "bicubic")
    assert dense["infer_samples_per_sec"] == pytest.approx(4000 / dense["infer_step_time"], rel=0.01)
    assert dense["infer_gmacs"] > tome["infer_gmacs"] > 0
    assert (dense["top1_difference"], tome["setting"]) == (0, "r=8")


def test_rows_join_timms_on_model(measured):
    pandas = pytest.importorskip("pandas")
    model, one, *_ = measured
    theirs = pandas.DataFrame({"model": ["test_vit.r160_in1k", "other"], "top1": [40.1, 70.0]})
    joined = pandas.DataFrame(tokred.eval.timm_columns(one, model=model)).merge(
        theirs, on="model", suffixes=("", "_pub")
    )
    assert len(joined) == len(one.measured)
    assert set(joined["top1_pub"]) == {40.1}


def test_what_is_not_known_is_empty(measured):
    row = tokred.eval.timm_columns(measured[1])[0]
    assert row["model"] == measured[1].model
    assert [row[k] for k in ("top5", "param_count", "img_size", "infer_gmacs", "infer_batch_size")] == [None] * 5


def test_bad_input(measured, tmp_path):
    model, one, five, _ = measured
    with pytest.raises(ValueError, match="metric='top1', got 'top5'"):
        tokred.eval.timm_columns(five)
    with pytest.raises(ValueError, match="top5 must be a result"):
        tokred.eval.timm_columns(one, top5=one)
    with pytest.raises(ValueError, match="batch_size must be"):
        tokred.eval.timm_columns(one, batch_size=0)
    with pytest.raises(TypeError, match="Linear without a pretrained_cfg"):
        tokred.eval.timm_columns(one, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\.csv"):
        tokred.eval.timm_columns(one, tmp_path / "x.txt", model=model)
