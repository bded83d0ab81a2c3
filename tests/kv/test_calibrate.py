"""``tokred calibrate``: files from the command line, and wrong input in one line."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import tokred
from tests.kv.tiny import build, prompt
from tokred.cli.main import app

MINE = """
from tokred.adapters.tiny import kv


class Letters:
    encode = decode = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def model():
    return kv.build("llama"), Letters()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "book.txt").write_text("Keys are turned by their positions, and so are queries. " * 12)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, ["calibrate", "mine.py:model", *arguments], env={"COLUMNS": "140"})


@pytest.mark.parametrize(
    ("method", "given"),
    [("triattention", {"stats": "made.safetensors"}), ("lukv score=key_norm", {"curves": "made.safetensors"})],
)
def test_a_file_is_made_and_taken(place, method, given):
    done = run("book.txt", "-o", "made.safetensors", "--length", "64", "--tokens", "128", "-m", method)
    assert done.exit_code == 0, done.output
    assert "128 tokens of book.txt" in done.stderr
    assert "made.safetensors" in done.stdout
    name, _, more = method.partition(" ")
    options = {"score": "key_norm"} if more else {"budget": 3, "every": 1}
    model = tokred.apply(build("llama"), name, **given, **options)
    with torch.no_grad():
        made = model.generate(prompt(20), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 26)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere.txt", "-o", "x"), "neither a text file"),
        (("book.txt", "-o", "no/folder/x"), "no file in a folder that is there"),
        (("book.txt", "-o", "x", "-m", "snapkv"), "method must be triattention or lukv"),
        (("book.txt", "-o", "x", "--device", "tpu"), "--device must be"),
    ],
)
def test_wrong_input_is_one_line(place, arguments, text):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "x").exists()
