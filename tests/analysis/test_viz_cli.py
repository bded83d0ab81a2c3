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


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return saved.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def animated(tmp_path_factory):
    """A GIF of six frames, on which a square moves to the right."""
    from PIL import Image

    shown = []
    for i in range(6):
        shown.append(Image.new("RGB", (20, 20), "navy"))
        shown[-1].paste("orange", (2 * i, 4, 2 * i + 8, 12))
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    shown[0].save(path, save_all=True, append_images=shown[1:])
    return path


def test_a_clip(tmp_path, llava, animated):
    page = drawn(
        tmp_path / "out", llava, "-m", "divprune budget=0.25", "--clip", animated, "--count", 3, "--prompt",
        "what runs", "--tokens", 1,
    )  # fmt: skip
    labels = [attributes["aria-label"] for attributes, _ in page.all("canvas")]
    assert labels == [f"picture 1, frame {i}, divprune budget=0.25" for i in (1, 2, 3)]


def test_a_clip_as_a_stream(tmp_path, llava, animated):
    page = drawn(
        tmp_path / "out", llava, "-m", "stc budget=4 + streaming_llm budget=12", "--clip", animated, "--count", 4,
        "--stream", "--prompt", "what runs", "--tokens", 1,
    )  # fmt: skip
    assert page.data["axes"][0]["labels"] == ["the frames", "entry", "the end of the stream"]
    assert [note.split()[0] for note in page.data["notes"][0]][:2] == ["64", "16"]


def test_a_clip_that_cannot_be_is_refused(tmp_path, llava, animated):
    flat = " ".join(
        run(llava, "--clip", saved.pictures(tmp_path / "a", 1) / "0.png", "--prompt", "what").output.split()
    )
    assert "is neither a folder" in flat or "is a single picture: a clip is a folder of frames" in flat
    both = run(llava, "--clip", animated, "--image", animated, "--prompt", "what").output
    assert "give --image or --clip" in both
    assert "--stream watches a clip" in run(llava, "--image", animated, "--stream", "--prompt", "what").output
    assert "is for models of images and text" in " ".join(run("--clip", animated).output.split())


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
