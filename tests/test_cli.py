"""The command line: help that teaches, lists, counts, and refusals in one line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("timm")

from typer.testing import CliRunner

import tokred
from tokred.cli.main import app

COMMANDS = ("demo", "bench", "viz", "list", "flops", "explain", "doctor")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})


def refused(*arguments: str) -> str:
    """The one line that a wrong input is answered with."""
    done = run(*arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tokred: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_name_options_of_the_command(command):
    text = run(command, "--help").output
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"tokred {command}")]
    assert len(examples) >= 4
    options = {word for line in text.partition("Options:")[2].splitlines() for word in line.split()[:2]}
    for example in examples:
        for word in example.split():
            if word.startswith("--"):
                assert word in {o.rstrip(",") for o in options}, (example, word)


def test_help_without_a_command_lists_all():
    text = run().output
    assert "Examples:" in text
    assert all(f"  {command} " in text for command in COMMANDS)


def test_version():
    assert run("--version").output.strip() == f"tokred {tokred.__version__}"


def test_list_has_every_method_and_library_on_one_line_each():
    done = run("list")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    for name in (*tokred.list_methods(), "timm", "transformers", "open_clip"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1, name


def test_list_of_a_model():
    text = run("list", "--model", "embedded").output
    assert all(any(line.split()[:2] == [n, "yes"] for line in text.splitlines()) for n in ("tome", "pitome", "evit"))


def test_list_of_a_model_that_cannot_run():
    done = run("list", "--model", "swin_tiny_patch4_window7_224")
    assert done.exit_code == 0
    assert "No method runs" in done.output
    assert "windows" in done.output


def test_flops_are_those_of_the_function():
    from tokred.bench.data.model import build

    expected = tokred.flops(build(), "tome", (1, 1, 28, 28), r=13)
    text = run("flops", "--method", "tome", "--set", "r=13").output
    assert f"{expected.gmacs:.3f} GMACs an image of 1x28x28" in text
    assert f"{197 - 12 * 13}" in text.splitlines()[-2]
    assert "of " not in run("flops").output.splitlines()[-1].partition("28x28")[2]


def test_flops_takes_literals():
    text = run("flops", "--method", "evit", "--set", "kappa=0.5", "--set", "blocks=(3, 6)").output
    assert "197 -> 100" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("flops", "--method", "tom"), "did you mean 'toma' or 'tome'"),
        (("flops", "--model", "deit_smal"), "did you mean 'deit_small"),
        (("flops", "--method", "tome", "--set", "r"), "key=value"),
        (("flops", "--method", "tome", "--set", "s=1"), "has no parameter 's'"),
        (("flops", "--method", "tome", "--set", "r=-1"), "must not be negative"),
        (("flops", "--method", "evit", "--set", "kappa=7"), "kappa"),
        (("flops", "--set", "r=1"), "needs a --method"),
        (("bench", "--methods", "pitom"), "did you mean 'pitome'"),
        (("bench", "--dtype", "int4"), "--dtype"),
        (("bench", "--device", "abacus"), "--device"),
        (("bench", "--shares", "2"), "between 0 and 1"),
        (("bench", "--random-weights", "--methods", "none"), "nothing to measure"),
        (("bench", "--random-weights", "--images", "no/such/folder"), "no/such/folder"),
        (("bench", "--random-weights", "--methods", "none", "--setting", "tome 13"), "key=value"),
        (("bench", "--model", "swin_tiny_patch4_window7_224", "--random-weights"), "windows"),
        (("viz", "--random-weights", "--method", "tom"), "did you mean 'toma' or 'tome'"),
        (("viz", "--random-weights", "--method", "tome s=1"), "has no parameter 's'"),
        (("viz", "--random-weights", "--image", "no/such.png"), "no/such.png is neither an image nor a folder"),
        (("viz", "--random-weights", "--layers", "0,12"), "the model has 12"),
        (("viz", "--random-weights", "--layers", "first"), "--layers is a list of blocks"),
        (("viz", "--model", "swin_tiny_patch4_window7_224", "--random-weights"), "windows"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, words):
    assert words in refused(*arguments)


def test_a_device_that_is_not_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no CUDA device" in refused("bench", "--device", "cuda")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    import timm

    def fail(*arguments, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", fail)
    line = refused("bench", "--model", "vit_tiny_patch16_224")
    assert "no network" in line
    assert "--random-weights" in line


def test_viz_refuses_what_is_no_image(tmp_path):
    assert "holds no image" in refused("viz", "--random-weights", "--image", str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    line = refused("viz", "--random-weights", "--image", str(tmp_path / "broken.png"), "--out", str(tmp_path / "out"))
    assert "broken.png cannot be read" in line
    assert not (tmp_path / "out").exists()


def test_viz_writes_a_page_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "shades").mkdir()
    for i in range(3):
        image.linear_gradient("L").rotate(90 * i).save(tmp_path / "shades" / f"{i}.png")
    out = tmp_path / "out"
    command = ["viz", "--random-weights", "--method", "tome", "--method", "random_prune r=8", "--layers", "0,11"]
    command += ["--image", str(tmp_path / "shades"), "--count", "2", "--out", str(out)]
    done = run(*command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.split() == ["Written", "to", f"{out.resolve()}:", "viz.html,", "viz.png"]
    page = (out / "viz.html").read_text("utf-8")
    assert "0.png" in page
    assert "1.png" in page
    assert "2.png" not in page
    assert re.search(r"tome r=[1-9]", page), "a name alone would remove nothing"
    with image.open(out / "viz.png") as picture:
        assert min(picture.size) > 200
    assert run(*command).exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["viz-2.html", "viz-2.png", "viz.html", "viz.png"]


def test_viz_of_the_embedded_model(tmp_path):
    from tokred.bench import embedded

    if not (embedded.FOLDER / embedded.WEIGHTS).exists():
        pytest.skip("the weights are not in this copy")
    done = run("viz", "--count", "1", "--method", "tome r=13", "--layers", "11", "--out", str(tmp_path))
    assert done.exit_code == 0, (done.output, done.exception)
    page = (tmp_path / "viz.html").read_text("utf-8")
    assert "Ankle boot" in page
    assert len(page) < 60_000


def test_outside_a_checkout_the_zoo_is_explained(monkeypatch):
    from tokred.core import environment

    monkeypatch.setattr(environment, "checkout", lambda: None)
    assert "checkout" in refused("bench", "--model", "dinov2")


def test_import_of_tokred_stays_cheap():
    code = (
        "import sys, tokred\n"
        "print([m for m in ('typer', 'rich', 'matplotlib', 'pandas', 'timm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
