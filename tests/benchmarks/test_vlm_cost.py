"""``benchmarks/vlm/cost.py``: its rows can be read, times are taken where the work is, and nothing stays patched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.vlm import cost
from benchmarks.vlm.watched import CASES, PARTS, build, prompt
from tokred.adapters.vlm.hooks import EnterLanguage
from tokred.bench import results

METHODS = "random_visual,fastervlm,visionzip,fastv,saint_layer"


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, own = tmp_path / "cost.csv", EnterLanguage.__call__
    options = ["--quick", "--methods", METHODS, "--short", "random_visual", "--out", str(out)]
    cost.run(cost.parser().parse_args(options))
    assert EnterLanguage.__call__ is own
    rows = results.records(results.read(out))
    found = {(row["model"], row["method"], row["keeps"]): row for row in rows}
    assert len(found) == len(rows) == (4 + 5 + 2) + (4 + 4 + 2)
    assert ("qwen25vl", "visionzip", "1/4") not in found, "there is no class token"
    assert "attention='received'" in found["qwen25vl", "fastervlm", "1/4"]["setting"]
    for (_, name, keeps), row in found.items():
        assert row["visual"] == 64
        assert float(row["prefill_ms"]) > float(row["layers_ms"]) > 0
        assert row["commit"] is not None
        if name in ("dense", "short"):
            assert not {"own_ms", "share_of_measured", "times_short"} & {*row}
            continue
        assert float(row["own_ms"]) > float(row["decide_ms"]) > 0
        assert float(row["own_full_depth_ms"]) >= float(row["own_ms"])
        for column in ("share_of_measured", "share_of_full_depth"):
            low, middle, high = (float(row[column + end]) for end in ("_low", "", "_high"))
            assert 0 < low <= middle <= high
        before = name not in ("fastv", "saint_layer")
        assert ("times_short" in row) == ("times_short_full_depth" in row) == before
        if before:
            assert int(row["tokens_left"]) == 64 // int(keeps[2:])
        else:
            assert int(row["tokens_left"]) < 64
    printed = capsys.readouterr()
    assert "own work, share of the dense prompt" in printed.out
    assert "visionzip does not run here" in printed.err


@pytest.mark.parametrize("name", CASES)
def test_real_shapes_build(name: str) -> None:
    shape = CASES[name]
    model = build(shape, 1, 2, torch.device("meta"), torch.bfloat16)
    layer = model.model.language_model.layers[0]
    count = sum(p.numel() for p in layer.parameters())
    assert count * shape.depth == pytest.approx(6.5e9, rel=0.01)
    for keeps in (1, *cost.SHARES):
        given = prompt(shape, keeps, torch.device("cpu"), torch.float32)
        assert given["input_ids"].shape[1] == shape.visual // keeps + shape.text


def test_shares_are_scaled_to_the_depth() -> None:
    assert cost.Round(1.0, 0.8, 0.0, 0.0, 0.0).deep(32 / 4 - 1) == pytest.approx(6.6)
    assert cost._stages(0.125) == pytest.approx((0.5, 0.25, 0.125))


def test_parts_are_entered_once_and_given_back() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def enter(part: str) -> Iterator[None]:
        seen.append(part)
        yield

    shape = CASES["llava15"].tiny()
    model = build(shape, 2, 2, torch.device("cpu"), torch.float32)
    given = prompt(shape, 1, torch.device("cpu"), torch.float32)
    given |= given.pop("features")
    method = tokred.make("cat", policy="pool", total=0.25, n_min=1)
    own = [owner.__dict__[name] for owner, name, _ in PARTS]
    with cost.around(enter), tokred.applied(model, method), torch.no_grad():
        model.model(**given)
    assert seen.count("decide") == 1, "and not again for the method inside"
    assert {"core", "language", "tower"} <= {*seen}
    assert [owner.__dict__[name] for owner, name, _ in PARTS] == own


def test_refusals() -> None:
    for given, words in (
        (["--methods", "tome"], "no setting is known for tome"),
        (["--tower-layers", "1"], "the tower at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            cost.run(cost.parser().parse_args(["--quick", *given]))
