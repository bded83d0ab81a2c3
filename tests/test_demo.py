"""The demo and the benchmark on a few images: columns, finite ratios, pictures that show something, files kept."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
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
from tokred.bench import arms, demo, embedded, probe, tasks, timing
from tokred.bench import images as photos
from tokred.bench import models as subjects
from tokred.bench import results as outputs
from tokred.bench import run as bench
from tokred.core.settings import parse_pairs, parse_setting

COLUMNS = {
    "demo": ("method", "setting", "tokens_out", "gmacs", "top1", "top1_difference", "images_per_second", "speedup"),
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


def test_the_demo_measures_and_writes(model, images, tmp_path):
    chosen = demo.choose(model, counts=(8, 16), methods=("tome", "pitome", "evit", "random"))
    assert [a.label for a in chosen[:3]] == ["unpatched", "tome r=8", "tome r=16"]
    for target in chosen[1:3]:
        near = [a for a in chosen if abs(a.macs - target.macs) < 0.02 * target.macs]
        assert {a.name for a in near} == {"tome", "pitome", "evit", "random"}
    some = [chosen[0], *(a for a in chosen if a.tokens_out < 60)]
    calls = []
    rows = demo.measure(model, some, *images, batch=4, tick=lambda: calls.append(1))
    assert len(calls) == demo.ticks(some, 8, 4)
    assert rows[0].top1_difference == 0
    assert rows[0].agreement == 1
    assert rows[0].timing.speedup == (1, 1, 1)
    named = outputs.free(tmp_path, demo.FILES)
    demo.save(named["demo.csv"], rows, 8, 4)
    demo.draw(rows, model, *images, named, batch=4)
    paths = list(named.values())
    assert [p.name for p in paths] == ["demo.csv", "demo.png", "merged.png"]
    written = rows_of(paths[0])
    assert len(written) == len(some)
    for row in written:
        assert set(COLUMNS["demo"] + COLUMNS["where"]) <= set(row)
        assert math.isfinite(float(row["speedup"]))
        assert 0 < float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
    for path in paths[1:]:
        assert_picture(path)
    assert outputs.free(tmp_path, demo.FILES)["demo.csv"].name == "demo-2.csv"


def test_the_model_is_unpatched_after_the_demo(model, images):
    with torch.inference_mode():
        before = model(images[0])
        demo.measure(model, demo.choose(model, counts=(16,), methods=("tome",)), *images, batch=8)
        assert torch.equal(model(images[0]), before)


def test_top1_is_that_of_a_plain_loop(model, images):
    arm = arms.arm(model, embedded.SHAPE, "tome", r=16)
    rows = demo.measure(model, [arms.unpatched(model, embedded.SHAPE), arm], *images, batch=4)
    with torch.inference_mode(), tokred.applied(model, "tome", r=16):
        expected = (model(images[0]).argmax(1) == images[1]).double().mean().item()
    assert rows[1].top1 == expected


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


def test_an_interrupted_demo_keeps_its_rounds(model, images):
    rounds = demo.Rounds(model, demo.choose(model, methods=["tome r=16"]), *images, batch=2)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds.run(stop)
    assert rounds.interrupted
    assert rounds.images == 4
    assert [row.arm.label for row in rounds.rows()] == ["unpatched", "tome r=16"]
    rounds.run()
    assert rounds.images == 8


def test_the_demo_table_fits_narrow_terminals(model, images):
    from rich.console import Console

    from tokred.cli import tables

    rows = demo.measure(model, demo.choose(model, methods=["tome r=16", "pitome ratio=0.9"]), *images, batch=4)
    for width in (60, 80):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(tables.demo_table(rows, 8, width))
        text = console.export_text()
        assert "…" not in text
        assert "pitome" in text
        assert "(quartiles)" in text


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
    found = photos.load(folder, (28, 28), 1, crop=0.9, count=100)
    assert found.images.shape == (6, 1, 28, 28)
    assert found.classes == ("bright", "dark")
    assert found.labels is not None
    assert [int(x.float().mean()) > 128 for x in found.images] == [label == 0 for label in found.labels.tolist()]
    flat = photos.load(folder / "dark", (10, 20), 3, crop=1, count=2)
    assert flat.images.shape == (2, 3, 10, 20)
    assert flat.labels is None
    (folder / "dark" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        photos.load(folder, (28, 28), 3, crop=1, count=100)
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


def test_a_probe_says_which_extra_it_needs(model, tmp_path, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'tokred\[bench\]'"):
        tasks.choose(subjects.load("embedded", random_weights=True), str(_folder(tmp_path, 4)))


def test_a_class_that_was_not_seen_is_never_answered():
    features, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2 * 2
    fitted = probe.fit(features, labels, strength=1.0)
    assert fitted.weight.shape == (3, 4)
    assert set(fitted.logits(features).argmax(1).tolist()) == {0, 2}


def test_settings_are_parsed():
    assert parse_setting("tome r=(16, -1) metric=k") == ("tome", {"r": (16, -1), "metric": "k"})
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
    timed = timing.summarise(seconds, [10] * 6)
    assert timed[0].speedup == (1, 1, 1)
    assert all(t.images_per_second.low <= t.images_per_second.median <= t.images_per_second.high for t in timed)


def test_peak_memory_sees_what_a_forward_needs():
    found = timing.peak_memory(lambda: torch.ones(64, 2**20 // 4).sum())
    assert found.peak > 0
    if "high-water" in found.kind:
        assert 60 < found.forward < 200


@pytest.mark.slow
@pytest.mark.weights
def test_dinov2_of_the_zoo_has_every_measure():
    try:
        subject = subjects.load("dinov2", size=98)
        task = tasks.choose(subject, "textile", count=6)
    except subjects.NoModelError as error:
        pytest.skip(str(error))
    task = replace(task, photos=task.photos.subset(torch.arange(4)))
    chosen = bench.choose(subject, [], ["tome r=3"])
    rows = bench.quality(subject, task, chosen, bench.Options(batch=4))
    assert rows[0]["saliency_mae"] == 0
    assert rows[0]["cosine"] == pytest.approx(1)
    assert 0 < rows[1]["saliency_mae"] < 0.3
    assert 0.3 < rows[1]["cosine"] < 1
    assert {"top1", "saliency_iou", "saliency_correlation"} <= set(rows[1])
