"""``tokred bench`` from the command line: every kind of model and data, JSON, resuming, interruptions, refusals."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from tests.bench import saved
from tests.bench.test_models import MINE
from tokred.bench import results
from tokred.cli.main import app

SETTING = "tome r=2 prop_attn=False"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def run(tmp_path):
    """``tokred bench`` with few rounds, into a folder of the test; the JSON document, or the whole answer."""

    def bench(*arguments, plain: bool = False, plot: bool = False, code: int = 0):
        command = ["bench", *map(str, arguments), "--rounds", "1", "--out", str(tmp_path / "out")]
        command += [] if plot else ["--no-plot"]
        done = CliRunner().invoke(app, command if plain else [*command, "--json"], env={"COLUMNS": "80"})
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done if plain else json.loads(done.stdout)

    return bench


def labels(found) -> list[str]:
    return [f"{row['method']} {row['setting']}".strip() for row in found["rows"]]


def test_a_fine_tuned_timm_model_and_a_folder(run, root, tmp_path):
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), root / "mine.pth")
    folder = saved.pictures(root / "pictures")
    found = run(
        "test_vit", "--checkpoint", root / "mine.pth", "--data", folder, "-m", "tome r=8", "-m", "tome r=12", plot=True
    )
    assert (found["kind"], found["metric"], found["run"]) == ("encoder", "top1", "forward")
    assert {"unpatched", "tome r=8", "tome r=12", "random r=8"} <= set(labels(found))
    assert all(row["samples"] == 8 and row["speedup"] > 0 for row in found["rows"] if not row["reason"])
    assert {"bench-test_vit.csv", "bench-test_vit.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    table = results.records(results.read(tmp_path / "out" / "bench-test_vit.csv"))
    assert {f"{r['method']} {r['setting']}".strip() for r in table} == set(labels(found))


def test_several_metrics_and_how_a_setting_is_applied(run, root):
    command = [
        "test_vit",
        "--num-classes",
        2,
        "--random-weights",
        "--data",
        saved.pictures(root / "few"),
        "--no-baselines",
    ]
    found = run(*command, "--metric", "top1,cosine", "-m", "tome r=8 expose=last")
    assert found["metrics"] == ["top1", "cosine"]
    assert [(row["setting"], row["metric"]) for row in found["rows"][2:]] == [
        ("r=8 expose=last", "top1"), ("r=8 expose=last", "cosine"),
    ]  # fmt: skip
    done = run(*command, "--metric", "top1", "--read", "features", "-m", "tome", plain=True, code=2)
    assert "does not fit read 'features'" in done.stderr


def test_the_table_fits_80_columns_and_progress_is_on_standard_error(run):
    done = run("test_vit", "--random-weights", "--count", 2, "-m", "tome r=8", "--no-baselines", plain=True)
    assert max(map(len, done.stdout.partition("Written to")[0].splitlines())) <= 80
    assert "tome r=8" in done.stdout
    assert "2/2 tome r=8: " in done.stderr
    assert "2/2" not in done.stdout


def test_the_same_command_goes_on_where_it_stopped(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    own = (f"{file}:model", "--data", f"{file}:batches", "--no-baselines")

    def seconds(found) -> list[float]:
        return [pytest.approx(row["seconds"], rel=1e-4) for row in found["rows"]]

    before = run(*own, "-m", "tome r=8")
    after = run(*own, "-m", "tome r=8", "-m", "tome r=4")
    assert labels(after) == ["unpatched", "tome r=8", "tome r=4"]
    assert [row["seconds"] for row in after["rows"][:2]] == seconds(before)
    anew = run(*own, "-m", "tome r=8", "--force")
    assert [row["seconds"] for row in anew["rows"]] != seconds(before)


def test_functions_of_the_users_own(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    found = run(
        f"{file}:model", "--data", f"{file}:batches", "--metric", f"{file}:score", "-m", "tome r=8", "--no-baselines"
    )
    assert found["metric"] == "score"
    assert found["rows"][0]["samples"] == 4
    done = run(f"{file}:model", "--data", f"{file}:batches", "--metric", f"{file}:nothing", plain=True, code=2)
    assert "has no 'nothing'" in done.stderr


def test_a_transformers_classifier(run, root):
    folder = saved.pictures(root / "vit-pictures")
    found = run(saved.vit(root / "vit"), "--data", folder, "-m", SETTING, "--no-baselines")
    assert found["metric"] == "top1"
    assert labels(found) == ["unpatched", SETTING]


def test_two_towers_by_the_names_of_the_folders(run, root):
    found = run(
        saved.clip(root / "clip"), "--data", saved.pictures(root / "clip-pictures"), "-m", "tome r=2", "--no-baselines"
    )
    assert (found["kind"], found["metric"]) == ("dual encoder", "top1")
    assert "zero-shot" in found["notes"][0]


def test_a_language_model_and_a_text_file(run, root):
    model, book = saved.llama(root / "llama"), saved.book(root / "book.txt")
    found = run(f"hf:{model}", "--data", book, "--length", 96, "-m", "snapkv")
    assert (found["kind"], found["metric"], found["run"]) == ("language model", "perplexity", "text")
    assert {"snapkv budget=0.75", "snapkv budget=0.5"} <= set(labels(found))
    assert any(label.startswith("random_evict") for label in labels(found))
    assert all(row["bytes"] > 0 for row in found["rows"] if not row["reason"])


def test_a_text_encoder(run, root):
    (root / "lines.txt").write_text("a red fox sits on grass\nthe dog runs\n" * 8)
    found = run(saved.bert(root / "bert"), "--data", root / "lines.txt", "-m", "tome r=1", "--no-baselines")
    assert (found["kind"], found["metric"]) == ("text encoder", "cosine")
    assert found["rows"][1]["samples"] == 16


def test_an_audio_encoder(run, root):
    found = run(
        saved.ast(root / "ast"),
        "--data",
        saved.recordings(root / "ast-sounds"),
        "-m",
        "pitome ratio=0.8",
        "--no-baselines",
    )
    assert (found["kind"], found["metric"]) == ("audio encoder", "agreement")


def test_a_denoiser_alone(run, root):
    pytest.importorskip("diffusers")
    found = run(saved.unet(root / "unet"), "--count", 2, "-m", "tomesd ratio=0.5", "--no-baselines")
    assert (found["kind"], found["metric"]) == ("denoiser", "cosine")
    assert found["rows"][1]["method"] == "tomesd"
    assert found["rows"][1]["quality"] < 1


def test_a_pipeline(run, root):
    pytest.importorskip("diffusers")
    model = saved.pipeline(root / "pipeline")
    found = run(model, "--count", 2, "--steps", 2, "-m", "tomesd ratio=0.5", "-m", "todo factors=2", "--no-baselines")
    assert (found["kind"], found["metric"], found["run"]) == ("pipeline", "psnr", "pipeline")
    assert found["rows"][1]["samples"] == 2


def test_a_model_with_vision_and_questions(run, root):
    model, questions = saved.llava(root / "llava"), saved.questions(root / "vqa")
    both = "divprune budget=8 + snapkv budget=0.5"
    found = run(
        model, "--data", questions, "-m", both, "-m", "divprune budget=8", "--max-new-tokens", 3, "--no-baselines"
    )
    assert (found["kind"], found["metric"], found["run"]) == ("vision-language model", "contains", "generate")
    row = next(row for row in found["rows"] if row["method"] == "divprune+snapkv")
    assert row["samples"] == 2
    assert row["reason"] == ""


def test_whisper_and_recordings(run, root):
    model, sounds = saved.whisper(root / "whisper"), saved.recordings(root / "whisper-sounds")
    found = run(model, "--data", sounds, "-m", "pitome ratio=0.8", "--max-new-tokens", 3, "--no-baselines")
    assert (found["kind"], found["metric"], found["better"]) == ("speech", "wer", "lower")
    assert found["rows"][1]["samples"] == 2


def test_where_nothing_could_be_measured_the_status_says_so(run):
    done = run("test_vit", "--random-weights", "--count", 2, "-m", "tome r=8 + evit kappa=0.7", plain=True, code=1)
    assert "not measured" in done.stdout


def test_ctrl_c_says_how_to_go_on(run, tmp_path, monkeypatch):
    import tokred

    def stopped(*arguments, out, **options):
        out.write_text("a row\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(tokred, "benchmark", stopped)
    done = run("test_vit", "--random-weights", "-m", "tome r=8", plain=True, code=130)
    assert f"the rows so far are in {tmp_path / 'out' / 'bench-test_vit.csv'}: the same command goes on" in done.stderr


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = run("test_vit", "--random-weights", "-m", "tome r=8", plain=True, code=2)
    assert "is a file, not a folder" in done.stderr


def test_a_metric_that_does_not_fit_is_refused_in_one_line(run):
    done = run("test_vit", "--random-weights", "--metric", "perplexity", "-m", "tome r=8", plain=True, code=2)
    assert len([line for line in done.stderr.splitlines() if line.startswith("tokred: ")]) == 1
    assert "perplexity" in done.stderr


def test_a_model_that_fails_on_the_data_says_so_in_one_line(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE + "\n\ndef wrong():\n    return [torch.zeros(2, 1, 32, 32)]\n")
    done = run(f"{file}:model", "--data", f"{file}:wrong", "-m", "tome r=8", plain=True, code=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tokred: ")]
    assert "the unpatched model on the first batch" in line


def test_a_probe_is_named_beside_its_numbers(run, root):
    pytest.importorskip("sklearn")
    folder = saved.pictures(root / "probed")
    done = run("test_vit", "--random-weights", "--data", folder, "-m", "tome r=8", "--no-baselines", plain=True)
    assert "Note: top-1 is that of a linear probe" in done.stdout
    assert "tested on 4 others" in " ".join(done.stdout.split())
