"""The demo on a few images, and what it is made of: columns, ratios, pictures that show something, files kept."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")

import tokred
from tokred.bench import arms, demo, embedded, probe, results, timing
from tokred.bench import images as photos
from tokred.bench import results as outputs
from tokred.cli import tables
from tokred.core.settings import parse_pairs, parse_setting

COLUMNS = {
    "demo": ("method", "setting", "tokens_out", "gmacs", "top1", "difference", "seconds", "speedup"),
    "where": ("device", "threads", "versions", "commit", "date"),
}


@pytest.fixture(scope="module")
def model():
    from tokred.bench.data.model import build

    torch.manual_seed(0)
    return build().eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, *embedded.SHAPE[1:], generator=generator), torch.tensor([9, 0, 8, 7, 3, 1, 2, 9])


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A record an arm, of a table that says of every number where it comes from."""
    table = outputs.read(path)
    for name in ("torch", "timm", "tokred"):
        assert all(f"{name}=" in row.versions for row in table)
    return outputs.records(table)


def assert_picture(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_the_demo_measures_and_writes(model, images, tmp_path, capsys):
    chosen = demo.choose(model, counts=(8, 16), methods=("tome", "pitome", "evit", "random"))
    assert [a.label for a in chosen[:3]] == ["unpatched", "tome r=8", "tome r=16"]
    for target in chosen[1:3]:
        near = [a for a in chosen if abs(a.macs - target.macs) < 0.02 * target.macs]
        assert {a.name for a in near} == {"tome", "pitome", "evit", "random"}
    some = [chosen[0], *(a for a in chosen if a.tokens_out < 80)]
    named = outputs.free(tmp_path, demo.FILES)
    result = demo.measure(model, some, *images, named["demo.csv"], batch=4)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == [f"{i}/{len(some)} {a.label}" for i, a in enumerate(some, 1)]
    assert [row["method"] for row in result.by("agreement").rows] == [a.name for a in some]
    assert (result.by("agreement").rows[0]["quality"], result.rows[0]["difference"]) == (1, 0)
    for width in (60, 80):
        told = tables.coloured(demo.brief(result), width).plain
        assert max(map(len, told.splitlines())) <= width
        assert all(word not in told for word in ("agreement", "seconds"))
    assert "at equal work" in result.summary
    demo.draw(result, model, *images, named)
    paths = list(named.values())
    assert [p.name for p in paths] == ["demo.csv", "demo.png", "merged.png"]
    written = [r for r in rows_of(paths[0]) if r["scored_by"] == "top1"]
    assert len(written) == len(some)
    for row in written:
        assert set(COLUMNS["demo"] + COLUMNS["where"]) <= set(row)
        assert math.isfinite(float(row["speedup"]))
        assert 0 < float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
    for path in paths[1:]:
        assert_picture(path)
    assert outputs.free(tmp_path, demo.FILES)["demo.csv"].name == "demo-2.csv"
    with torch.inference_mode(), tokred.applied(model, "tome", r=16):
        expected = (model(images[0]).argmax(1) == images[1]).double().mean().item()
    assert next(row for row in result.rows if row["setting"] == "r=16")["quality"] == expected
    assert not tokred.patched(model)


def test_an_interrupted_demo_keeps_its_rows(model, images, tmp_path, monkeypatch):
    """What was measured is in the table, and is the result without being measured again."""
    table, chosen = tmp_path / "demo.csv", demo.choose(model, methods=["tome r=16", "pitome ratio=0.9"])
    own, calls = results.write, []

    def write(*args, **options):
        calls.append(1)
        own(*args, **options)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "write", write)
    with pytest.raises(KeyboardInterrupt):
        demo.measure(model, chosen, *images, table, batch=4, progress=False)
    assert not tokred.patched(model)
    there = demo.measured(table, chosen)
    assert [arm.label for arm in there] == ["unpatched", "tome r=16"]
    result = demo.measure(model, there, *images, table, batch=4, progress=False)
    assert len(calls) == 2
    assert [row["method"] for row in result.measured] == ["unpatched", "tome"]


@pytest.mark.skipif(not (embedded.FOLDER / embedded.WEIGHTS).exists(), reason="the weights are not in this copy")
def test_the_embedded_model_knows_its_sample():
    sample = embedded.sample(200)
    assert sample.images.shape == (200, 3, 112, 112)
    with torch.inference_mode():
        top1 = (embedded.load()(sample.images).argmax(1) == sample.labels).double().mean().item()
    assert top1 > 0.75
    assert "top1" in str(embedded.notes())
    with pytest.raises(ValueError, match="images are embedded"):
        embedded.sample(10**6)


def _folder(root: Path, each: int) -> Path:
    """Dark and bright pictures, a folder each."""
    from PIL import Image

    for name, level in (("dark", 30), ("bright", 220)):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (40 + i, 30), (level + i, level, level)).save(root / "pictures" / name / f"{i}.png")
    return root / "pictures"


def test_folders_of_images(tmp_path):
    folder = _folder(tmp_path, 3)
    found = photos.find(folder)
    pictures = [photos.read(path, (28, 28), 1, 0.9) for path in found.files]
    assert [tuple(x.shape) for x in pictures] == [(1, 28, 28)] * 6
    assert found.classes == ("bright", "dark")
    assert [int(x.float().mean()) > 128 for x in pictures] == [label == 0 for label in found.labels]
    flat = photos.find(folder / "dark")
    assert photos.read(flat.files[0], (10, 20), 3).shape == (3, 10, 20)
    assert (flat.labels, flat.classes) == ([-1] * 3, ())
    (folder / "dark" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        photos.read(folder / "dark" / "broken.png", (28, 28), 3)
    with pytest.raises(FileNotFoundError):
        photos.find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("classes", "outputs_of_head", "expected"),
    [
        (("7", "3"), 10, [7, 3]),
        (("7", "13"), 10, None),
        (("a", "b"), 2, [0, 1]),
        (("a", "b"), 3, None),
        (("n01440764", "n01484850"), 1000, [0, 2]),
    ],
)
def test_classes_that_fit_a_head(classes, outputs_of_head, expected):
    assert photos.fit_head(classes, outputs_of_head) == expected


def test_the_probe_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 16, generator=generator) + 4 * torch.eye(16)[labels]
    fitted = probe.fit(features, labels)
    assert (fitted.logits(features).argmax(1) == labels).double().mean() > 0.98
    assert torch.equal(probe.fit(features, labels).weight, fitted.weight)
    with pytest.raises(ValueError, match="two classes"):
        probe.fit(features, torch.zeros(90, dtype=torch.int64))


def test_a_probe_says_which_extra_it_needs(model, images, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'tokred\[bench\]'"):
        tokred.benchmark(model, "tome r=3", [images], "probe", read="features")


def test_a_class_that_was_not_seen_is_never_answered():
    features, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2 * 2
    fitted = probe.fit(features, labels, strength=1.0)
    assert fitted.weight.shape == (3, 4)
    assert set(fitted.logits(features).argmax(1).tolist()) == {0, 2}


def test_settings_are_parsed():
    assert parse_setting("tome r=(16, -1) metric=k") == ("tome", {"r": (16, -1), "metric": "k"})
    inner = {"base": "fastvid context=0 step=2", "budget": 0.1}
    assert parse_setting("restore base='fastvid context=0 step=2' budget=0.1") == ("restore", inner)
    assert parse_setting('restore budget=0.1 base="fastvid context=0 step=2"') == ("restore", inner)
    assert parse_setting("evit kappa=0.7 blocks=(3, 6) fuse=False")[1] == {
        "kappa": 0.7,
        "blocks": (3, 6),
        "fuse": False,
    }
    with pytest.raises(ValueError, match="twice"):
        parse_pairs(["r=1", "r=2"])


def test_a_ladder_meets_its_targets(model):
    full = arms.unpatched(model, embedded.SHAPE).macs
    found = arms.ladder(model, embedded.SHAPE, ["tome", "pitome"], [int(full * s) for s in (0.8, 0.6)])
    assert [round(a.macs / full, 1) for a in found] == [0.8, 0.6, 0.8, 0.6]
    with pytest.raises(tokred.UnknownMethodError):
        arms.knob("nothing")


def test_paired_timing_is_shuffled_and_complete():
    from contextlib import nullcontext

    seen: list[tuple[int, int]] = []
    seconds = timing.paired([nullcontext] * 3, lambda i: i, 6, collect=lambda arm, i, _: seen.append((i, arm)))
    assert sorted(seen) == [(i, arm) for i in range(6) for arm in range(3)]
    assert seen != sorted(seen)
    ratios = timing.ratios(seconds)
    assert timing.spread(ratios[0]) == (1, 1, 1)
    for found in map(timing.spread, ratios):
        assert found.low <= found.median <= found.high


def test_peak_memory_sees_what_a_forward_needs():
    found = timing.peak_memory(lambda: torch.ones(64, 2**20 // 4).sum())
    assert found.peak > 0
    if "high-water" in found.kind:
        assert 60 < found.forward < 200
