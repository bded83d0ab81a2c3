"""The command line: help that teaches, lists, counts, and refusals in one line."""

from __future__ import annotations

import json
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

COMMANDS = ("demo", "bench", "tune", "train", "calibrate", "viz", "app", "list", "flops", "explain", "doctor")


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
    text = run("list", "embedded").output
    assert all(any(line.split()[:2] == [n, "yes"] for line in text.splitlines()) for n in ("tome", "pitome", "evit"))


def test_list_of_a_model_that_cannot_run():
    done = run("list", "--model", "swin_tiny_patch4_window7_224")
    assert done.exit_code == 0
    assert "No method runs" in done.output
    assert "windows" in done.output


def test_flops_are_those_of_the_function():
    from tokred.bench.data.model import build

    expected = tokred.flops(build(), "tome", (1, 3, 112, 112), r=13)
    text = run("flops", "-m", "tome r=13").output
    assert f"{expected.gmacs:.3f} GMACs an image of 3x112x112" in text
    assert f"{197 - 8 * 13}" in text.splitlines()[-2]
    assert "of " not in run("flops").output.splitlines()[-1].partition("112x112")[2]


def test_flops_takes_literals():
    text = run("flops", "-m", "evit kappa=0.5 blocks=(3, 6)").output
    assert "197 -> 100" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("flops", "-m", "tom"), "did you mean 'toma' or 'tome'"),
        (("flops", "deit_smal"), "did you mean 'deit_small"),
        (("flops", "-m", "tome r"), "key=value"),
        (("flops", "-m", "tome r=13,metric=k"), "separated by spaces"),
        (("flops", "-m", "tome s=1"), "has no parameter 's'"),
        (("flops", "-m", "tome r=-1"), "must not be negative"),
        (("flops", "-m", "evit kappa=7"), "kappa"),
        (("flops", "-m", "divprune budget=4"), "tokred bench embedded -m 'divprune budget=4'"),
        (("flops", "-m", "tome r=2 + evit kappa=0.7"), "one method at a time"),
        (("flops", "-m", "tome r=2 + "), "' + ' between"),
        (("flops", "sdxl"), "tokred explain sdxl"),
        (("flops", "embedded", "--model", "resnet50"), "two models are named"),
        (("list", "no/such/folder"), "no folder is named"),
        (("list", "nowhere.at.all:build"), "no module 'nowhere.at.all'"),
        (("list", "nowhere.py:build"), "nowhere.py is not there"),
        (("bench", "-m", "pitom"), "did you mean 'pitome'"),
        (("bench", "--dtype", "int4"), "--dtype"),
        (("bench", "--device", "abacus"), "--device"),
        (("bench", "--shares", "2"), "between 0 and 1"),
        (("bench", "--random-weights", "--data", "no/such/folder"), "no/such/folder"),
        (("bench", "--random-weights", "-m", "tome 13"), "key=value"),
        (("bench", "--prompt", "a fox"), "--prompt is for pipelines"),
        (("bench", "--checkpoint", "none.pth"), "for models of timm's"),
        (("bench", "vit_tiny_patch16_224", "--checkpoint", "none.pth"), "none.pth is no file"),
        (("bench", "swin_tiny_patch4_window7_224", "--random-weights"), "windows"),
        (("explain", "embedded"), "explain is for denoisers"),
        (("explain", "sd14"), "sd15"),
        (("explain", "--size", "big"), "the size is a number"),
        (("viz", "--random-weights", "-m", "tom"), "did you mean 'toma' or 'tome'"),
        (("viz", "--random-weights", "-m", "tome s=1"), "has no parameter 's'"),
        (("viz", "--random-weights", "--image", "no/such.png"), "no/such.png is neither an image nor a folder"),
        (("viz", "--random-weights", "--layers", "0,8"), "the model has 8"),
        (("viz", "--random-weights", "--layers", "first"), "--layers is a list of blocks"),
        (("viz", "swin_tiny_patch4_window7_224", "--random-weights"), "windows"),
        (("demo", "-m", "tom"), "did you mean 'toma' or 'tome'"),
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
    line = refused("bench", "vit_tiny_patch16_224")
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
    command = ["viz", "--random-weights", "-m", "tome", "--method", "random_prune r=8", "--layers", "1,8"]
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
    done = run("viz", "--count", "1", "-m", "tome r=13", "--layers", "8", "--out", str(tmp_path))
    assert done.exit_code == 0, (done.output, done.exception)
    page = (tmp_path / "viz.html").read_text("utf-8")
    assert "Ankle boot" in page
    assert len(page) < 60_000


def test_outside_a_checkout_the_zoo_is_explained(monkeypatch):
    from tokred.core import environment

    monkeypatch.setattr(environment, "checkout", lambda: None)
    assert "checkout" in refused("bench", "dinov2")


def test_flops_says_when_fewer_tokens_can_be_removed_than_asked_for():
    done = run("flops", "-m", "tome r=500")
    assert "from block 0 on fewer tokens than r=500" in done.stderr


def test_several_settings_are_counted_one_after_the_other_and_as_json():
    found = json.loads(run("flops", "-m", "tome r=13", "-m", "evit kappa=0.7", "--json").stdout)
    assert [one["setting"] for one in found] == ["tome r=13", "evit kappa=0.7"]
    assert all(one["macs"] < one["macs_unpatched"] and len(one["blocks"]) == 8 for one in found)


def test_lists_as_json():
    rows = json.loads(run("list", "--json").stdout)
    assert [row["name"] for row in rows] == tokred.list_methods()
    found = json.loads(run("list", "embedded", "--json").stdout)
    assert found["kind"] == "encoder"
    assert {row["method"] for row in found["methods"] if row["works"]} >= {"tome", "evit"}


def test_python_m_tokred():
    done = subprocess.run([sys.executable, "-m", "tokred", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"tokred {tokred.__version__}"


def test_completion():
    from tokred.cli.options import complete_method, complete_model

    assert "deit_small_patch16_224" in complete_model("deit_small_p")
    assert complete_model("emb") == ["embedded"]
    assert complete_method("pit") == ["pitome"]
    assert "tome r=" in complete_method("tome ")
    assert complete_method("tome r=13 met") == ["tome r=13 metric="]
    assert complete_method("divprune budget=64 + snap") == ["divprune budget=64 + snapkv"]
    assert complete_method("nothing ") == []
    assert "--install-completion" in run("--help").output


def test_completion_of_folders(tmp_path):
    from tokred.cli.options import complete_model

    (tmp_path / "llama").mkdir()
    assert complete_model(f"hf:{tmp_path}/ll") == [f"hf:{tmp_path}/llama"]
    assert complete_model(f"{tmp_path}/ll") == [f"{tmp_path}/llama"]


def test_the_demo_speaks_where_there_is_no_terminal(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    from tokred.bench import embedded

    if not (embedded.FOLDER / embedded.WEIGHTS).exists():
        pytest.skip("the weights are not in this copy")
    command = ["demo", "--images", "10", "--batch", "5", "-m", "tome r=16", "-m", "evit kappa=0.6"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)], env={"COLUMNS": "60"})
    assert done.exit_code == 0, (done.output, done.exception)
    assert "1/3 unpatched: top1 " in done.stderr
    assert "3/3 evit kappa=0.6: top1 " in done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 60
    files = {"demo.csv", "demo.samples.jsonl", "demo.png", "merged.png"}
    assert {p.name for p in tmp_path.iterdir()} == files


def test_the_demo_runs_without_the_libraries_of_other_hosts(tmp_path):
    """Those that the extra ``bench`` does not bring."""
    pytest.importorskip("matplotlib")
    absent = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "diffusers", "open_clip", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["tokred", "demo", "--images", "20", "--batch", "10", "-m", "tome r=16", "--out", sys.argv[1]]
from tokred.cli.main import main

main()
"""
    done = subprocess.run([sys.executable, "-c", absent, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged.png").exists()


def test_the_demo_asks_for_what_it_draws_with_before_it_measures(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pandas" else real(name, *a))
    assert "pip install 'tokred[bench]'" in refused("demo", "--images", "50")


def test_import_of_tokred_stays_cheap():
    code = (
        "import sys, tokred\n"
        "print([m for m in ('typer', 'rich', 'matplotlib', 'pandas', 'timm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("viz",),
        ("demo",),
        ("bench", "-m", "tome"),
        ("tune", "--speedup", "2"),
        ("train", "cropr"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_built(arguments, tmp_path, monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model was built")

    for place in ("tokred.bench.sources.model", "tokred.bench.embedded.load"):
        monkeypatch.setattr(place, build)
    (tmp_path / "file").touch()
    line = refused(*arguments, "--out", str(tmp_path / "file" / "x"))
    assert "nothing can be written into" in line
    assert "is a file, not a folder" in line
