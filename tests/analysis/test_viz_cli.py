"""``tokred viz`` for models that are no encoders: saved ones of each kind, by the names that ``tokred bench`` takes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from typer.testing import CliRunner

from tests.analysis.pages import sound
from tests.bench import saved
from tokred.cli.main import app


def run(*given):
    return CliRunner().invoke(app, ["viz", *map(str, given)])


def drawn(out, *given):
    done = run(*given, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(p.name for p in out.iterdir()) == ["viz.html", "viz.png"]
    return sound((out / "viz.html").read_text("utf8"))


def test_a_language_model(tmp_path):
    book = saved.book(tmp_path / "book.txt")
    page = drawn(
        tmp_path / "out", f"hf:{saved.llama(tmp_path / 'llama')}", "-m", "snapkv", "-m", "h2o budget=0.5",
        "--text", book, "--length", 60, "--prompt", "which dog", "--tokens", 3,
    )  # fmt: skip
    assert [attributes["aria-label"] for attributes, _ in page.all("div") if "data-method" in attributes] == [
        "snapkv budget=0.25", "h2o budget=0.5"
    ]  # fmt: skip
    assert 60 <= len(page.data["pieces"]) <= 64


def test_a_model_with_vision(tmp_path):
    seen = saved.pictures(tmp_path / "seen", 1)
    page = drawn(
        tmp_path / "out", saved.llava(tmp_path / "llava"), "-m", "divprune budget=4 + fastv layer=2 ratio=0.5",
        "--image", seen, "--count", 2, "--prompt", "what colour is this", "--tokens", 2,
    )  # fmt: skip
    assert len(page.all("canvas")) == 2


def test_a_denoiser_and_a_pipeline(tmp_path):
    page = drawn(tmp_path / "a", saved.unet(tmp_path / "unet"), "-m", "tomesd ratio=0.5")
    assert page.data["axes"][1]["labels"] == ["step 1 of 1"]
    page = drawn(tmp_path / "b", saved.pipeline(tmp_path / "pipe"), "-m", "tomesd ratio=0.5", "--steps", 2)
    assert page.data["axes"][1]["labels"] == ["step 1 of 2", "step 2 of 2"]


def test_what_is_missing_is_said(tmp_path):
    assert "give --text FILE, --prompt TEXT" in run(saved.llama(tmp_path / "llama")).output
    assert "give --image FILE and --prompt TEXT" in run(saved.llava(tmp_path / "llava")).output
    output = run(saved.whisper(tmp_path / "whisper")).output
    assert "is of kind speech, and viz draws encoders of images" in " ".join(output.split())
    assert "is no file" in run(tmp_path / "llama", "--text", tmp_path / "no.txt").output
