"""lm-eval on patched models: its own scores, batches that change nothing, and tasks that are refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tokred
from tests.eval import tiny
from tokred.eval import language, tasks
from tokred.eval.table import COLUMNS

POLICIES = ["snapkv budget=0.3 window=4", "h2o budget=0.4", "streaming_llm budget=12", "keydiff budget=0.5"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def index():
    """lm-eval's index of its own tasks, which takes seconds to read."""
    return tasks.manager(["ruler"], None, {})


def answers(model, methods, task, size, **more):
    found = tokred.eval.lm_eval(model, [task], methods, tiny.tokenizer(), batch_size=size, baselines=False, **more)
    return {m: [s["answers"][0] for s in found.samples if s["method"] == m] for m in ("unpatched", *methods)}, found


def plain(model, task, size):
    """lm-eval's own model on the same task, without anything of ours around it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=size)
    found = simple_evaluate(model=lm, tasks=[task])
    return found["results"]["words"], [s["filtered_resps"][0] for s in found["samples"]["words"]]


def scored(model, tmp_path, count=6):
    """The task, with the dense model's own answers as the right ones."""
    _, said = plain(model, tiny.task(tmp_path, count), 1)
    return tiny.task(tmp_path, count, answers=said)


@pytest.mark.hosts
def test_scores_are_those_of_lm_eval_itself(model, tmp_path):
    task = scored(model, tmp_path)
    said, found = answers(model, POLICIES[:2], task, 2)
    rows = {f"{r['method']} {r['setting']}".strip(): r for r in found.rows}
    assert rows["unpatched"]["score"] == 1, "the right answers are the dense model's"
    for name in POLICIES[:2]:
        with tokred.applied(model, name.split()[0], **tokred.core.settings.parse_setting(name)[1]):
            results, theirs = plain(model, task, 2)
        assert said[name] == theirs
        assert rows[name]["score"] == results["exact_match,none"]
        assert rows[name]["stderr"] == results["exact_match_stderr,none"]
        assert rows[name]["difference"] == pytest.approx(results["exact_match,none"] - 1)
        assert rows[name]["difference_low"] < rows[name]["difference"] <= rows[name]["difference_high"]
    assert any(said[name] != said["unpatched"] for name in said), "the cache that is left decides the answers"
    assert all(list(row) == list(COLUMNS) for row in found.rows)


@pytest.mark.hosts
def test_a_batch_of_eight_with_padding_answers_as_one_at_a_time(model, tmp_path):
    task = tiny.task(tmp_path, 10)
    alone, _ = answers(model, POLICIES, task, 1)
    together, found = answers(model, POLICIES, task, 8)
    assert alone == together
    lengths = {len(text.split()) for text in tiny.prompts(10)}
    assert len(lengths) > 3, "prompts of one length would need no padding"
    assert all(row["length"] <= 8 for row in found.rows)


def test_a_row_tells_time_length_and_what_the_cache_held(model, tmp_path):
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    found = tokred.eval.lm_eval(
        model, tiny.task(tmp_path), [POLICIES[0], "tome r=4"], tiny.tokenizer(), out=tmp_path / "out", batch_size=2,
        name="tiny", num_fewshot=0,
    )  # fmt: skip
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert not tokred.patched(model)
    rows = {row["method"]: row for row in found.rows}
    assert list(rows) == ["unpatched", "snapkv", "random_evict", "streaming_llm", "tome"]
    assert [rows[name]["baseline"] for name in rows] == [False, False, True, True, False]
    mine = rows["snapkv"]
    assert (rows["unpatched"]["speedup"], rows["unpatched"]["difference"]) == (1, 0)
    assert mine["seconds"] > 0
    assert mine["speedup_low"] <= mine["speedup"] <= mine["speedup_high"]
    assert mine["rows"] < 50
    assert 0.2 < mine["bytes"] / mine["dense_bytes"] < 0.7
    assert abs(rows["random_evict"]["bytes"] / mine["bytes"] - 1) < 0.1, "of as many bytes"
    assert "methods of the cache suit language models" in rows["tome"]["reason"]
    text = str(found)
    assert "exact_match" in text
    assert "tome r=4: not measured." in text
    table, samples = (tmp_path / "out" / name for name in ("lm_eval.csv", "samples.jsonl"))
    assert found.paths == [table, samples]
    with table.open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(rows)
    logged = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    assert len(logged) == 4 * 6
    assert {"task", "sample", "method", "exact_match", "length", "answers"} <= logged[0].keys()
    assert list(found.to_pandas()["method"]) == list(rows)


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    """What was answered is not asked again; a complete run leaves nothing to go on with."""
    from tokred.eval.harness_model import Several

    own, asked = Several._measured, []

    def measured(self, one, requests):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(one.label)
        return own(self, one, requests)

    def run(out):
        given = {"baselines": False, "batch_size": 2, "out": out, "progress": False}
        return tokred.eval.lm_eval(model, tiny.task(tmp_path), POLICIES[:2], tiny.tokenizer(), **given)

    monkeypatch.setattr(Several, "_measured", measured)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    stop, kept = None, (tmp_path / "out" / "answers.jsonl").read_text("utf8").count('"key"')
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write('{"head": "torn')
    again = run(tmp_path / "out")
    assert (kept, len(asked)) == (5, 9), "three rows of three batches"
    whole = run(tmp_path / "whole")
    columns = ("method", "setting", "task", "score", "difference", "bytes", "rows", "length", "samples")
    assert [[row[c] for c in columns] for row in again.rows] == [[row[c] for c in columns] for row in whole.rows]
    assert all(row["speedup"] > 0 for row in again.rows)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lm_eval.csv", "samples.jsonl"}


def of_two_lengths(doc, results):
    """A score for each length, as RULER's tasks have: those of the other lengths are marked by -1."""
    length = "16" if len(doc["text"].split()) > 20 else "8"
    return {"8": -1.0, "16": -1.0} | {length: float(results[0].split()[-1] == doc["answer"].split()[-1])}


def over_those_of_the_length(values):
    there = [value for value in values if value != -1]
    return sum(there) / len(there) if there else -1


@pytest.mark.hosts  # the one before asks the same of one task
def test_groups_and_tasks_of_several_lengths(model, tmp_path):
    task = scored(model, tmp_path)
    more = {"aggregation": over_those_of_the_length, "higher_is_better": True}
    lengths = {
        **task, "task": "lengths", "process_results": of_two_lengths,
        "metric_list": [{"metric": length, **more} for length in ("8", "16", "32")],
    }  # fmt: skip
    children = [{**task, "task": name} for name in ("one", "two")]
    group = {"group": "both", "task": children, "aggregate_metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "both.yaml").write_text(yaml.safe_dump(group), "utf-8")
    found = tokred.eval.lm_eval(
        model, ["both", lengths], POLICIES[0], tiny.tokenizer(), baselines=False, include=tmp_path / "mine"
    )
    rows = {(r["task"], r["metric"], r["method"]): r for r in found.rows}
    assert {key[:2] for key in rows} == {
        ("both", "exact_match"), ("both::one", "exact_match"), ("both::two", "exact_match"), ("lengths", "8"),
        ("lengths", "16"),
    }  # fmt: skip
    whole = rows["both", "exact_match", "snapkv"]
    assert whole["score"] == rows["both::one", "exact_match", "snapkv"]["score"]
    assert whole["difference"] == pytest.approx(whole["score"] - 1)
    assert (whole["difference_low"], whole["speedup"]) == (None, None), "a group has no samples of its own"
    for length in ("8", "16"):
        mine = rows["lengths", length, "snapkv"]
        assert mine["difference"] == pytest.approx(mine["score"] - rows["lengths", length, "unpatched"]["score"])
        assert rows["lengths", length, "unpatched"]["score"] == 1
    assert "both::two" in str(found)


def test_tasks_that_read_no_reduced_cache_are_refused_before_anything_is_loaded(index, monkeypatch):
    likely = {"task": "likely", "dataset_path": "json", "output_type": "loglikelihood"}
    fine = {"task": "fine", "dataset_path": "json", "output_type": "generate_until"}
    with pytest.raises(ValueError, match=r"'likely' \(loglikelihood\).*never reads the reduced cache.*generate_until"):
        tokred.eval.lm_eval("hf:no/such/folder", [likely, fine], "snapkv budget=0.3")
    monkeypatch.setattr(tasks, "manager", lambda *_: index)
    mixed = {"group": "mixed", "task": [fine, likely, {"group": "inner", "task": ["hellaswag", "gsm8k"]}]}
    with pytest.raises(ValueError, match=r"'likely' .*'hellaswag' \(multiple_choice\).*other 2 of the tasks") as error:
        tokred.eval.lm_eval("hf:no/such/folder", [mixed], "snapkv budget=0.3")
    assert "'fine'" not in str(error.value)
    assert "gsm8k (" not in str(error.value)


def test_names_of_tasks_are_known_without_a_network(index):
    index = index.task_index
    found = tasks.leaves(tasks.listed("ruler, longbench,gsm8k,fda"), index)
    tasks.check_reading(found)
    assert {"niah_single_1", "ruler_vt", "gsm8k", "fda"} <= {name for name, _ in found}
    assert len(found) > 30
    for name, kind in [("hellaswag", "multiple_choice"), ("wikitext", "loglikelihood_rolling"), ("squadv2", "several")]:
        with pytest.raises(ValueError, match=kind):
            tasks.check_reading(tasks.leaves([name], index))
    with pytest.raises(ValueError, match=r"'rulr'.*did you mean 'ruler'"):
        tasks.leaves(["rulr"], index)
    with pytest.raises(TypeError, match="got int"):
        tasks.leaves([3], index)
    with pytest.raises(ValueError, match="names no task"):
        tasks.listed(" , ")
    with pytest.raises(ValueError, match="51 more"):
        tasks.check_reading(tasks.leaves(["mmlu"], index))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be a whole number"),
        ({"methods": "snapkvv"}, tokred.UnknownMethodError, "snapkv"),
        ({"methods": []}, ValueError, "methods is empty"),
        ({"tasks": []}, ValueError, "names no task"),
        ({"model": 3}, TypeError, "got int"),
        ({"model": "models/llama"}, ValueError, "hf:FOLDER"),
        ({"model": torch.nn.Linear(2, 2)}, tokred.UnsupportedModelError, "Linear"),
        ({"tokenizer": None}, ValueError, "tokenizer is None"),
        ({"log_samples": False}, TypeError, "log_samples cannot be given"),
    ],
)
def test_bad_input(model, tmp_path, change, error, words):
    given = {
        "model": model,
        "tasks": tiny.task(tmp_path),
        "methods": "snapkv budget=0.3",
        "tokenizer": tiny.tokenizer(),
    }
    with pytest.raises(error, match=words):
        tokred.eval.lm_eval(**{**given, **change})


def test_a_patched_model_is_refused(model, tmp_path):
    with (
        tokred.applied(model, "snapkv", budget=0.3),
        pytest.raises(ValueError, match=r"already patched.*tokred\.remove"),
    ):
        tokred.eval.lm_eval(model, tiny.task(tmp_path), "h2o budget=0.3", tiny.tokenizer())


def test_a_missing_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs lm_eval: pip install 'tokred\[eval\]'"):
        tokred.eval.lm_eval(model, "gsm8k", "snapkv budget=0.3")


def test_an_older_lm_eval_is_named(model, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.9.2")
    with pytest.raises(ImportError, match=r"lm-eval 0\.4\.12 or newer, and 0\.4\.9\.2 is installed"):
        tokred.eval.lm_eval(model, "gsm8k", "snapkv budget=0.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer in a folder, and the task in a file beside it."""
    place = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(place / "llama")
    tiny.tokenizer().save_pretrained(place / "llama")
    (place / "words.yaml").write_text(yaml.safe_dump(tiny.task(place)), "utf-8")
    return place


def test_the_command(folder, tmp_path, capsys):
    from typer.testing import CliRunner

    from tokred.cli.evaluate import evaluate_app

    arguments = [
        "lm-eval",
        f"hf:{folder / 'llama'}",
        "-m",
        POLICIES[0],
        "--tasks",
        str(folder / "words.yaml"),
    ]
    done = CliRunner().invoke(evaluate_app, [*arguments, "--limit", "3", "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == ["unpatched", "snapkv", "random_evict", "streaming_llm"]
    assert rows[0]["samples"] == 3
    assert (tmp_path / "out" / "lm_eval.csv").is_file()
    for wrong, words in (
        ("--metadata=[1", "not JSON"),
        ("--metadata=[1]", "is an object"),
        ("-mnone_such", "none_such"),
    ):
        failed = CliRunner().invoke(evaluate_app, [*arguments, wrong])
        assert failed.exit_code == 2
        assert words in failed.stderr + failed.stdout


@pytest.mark.slow
@pytest.mark.hosts  # ours is in every run
def test_lm_evals_own_command_line_knows_the_model(folder, tmp_path):
    command = [
        sys.executable, "-m", "tokred.eval", "run", "--model", "tokred",
        "--model_args", f"pretrained={folder / 'llama'},method={POLICIES[0]}", "--tasks", str(folder / "words.yaml"),
        "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = tmp_path.rglob("samples_words_*.jsonl")
    theirs = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    loaded, tokenizer = language.load(f"hf:{folder / 'llama'}")
    found = tokred.eval.lm_eval(
        loaded, str(folder / "words.yaml"), POLICIES[0], tokenizer, batch_size=2, baselines=False
    )
    ours = {s["sample"]: s["answers"] for s in found.samples if s["method"] == POLICIES[0]}
    assert {s["doc_id"]: s["filtered_resps"] for s in theirs} == ours


def test_the_named_model_refuses_likelihoods(folder):
    from tokred.eval.harness_model import Patched

    place = str(folder / "llama")
    lm = Patched(pretrained=place, method=POLICIES[0], device="cpu")
    request = type("Request", (), {"task_name": "hellaswag", "args": ("w1 w2", " w3")})()
    for ask in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(ValueError, match=r"hellaswag.*never reads the reduced cache"):
            ask([request])
    tokred.remove(lm.model)
    assert len(lm.loglikelihood([request], disable_tqdm=True)) == 1
    with pytest.raises(ValueError, match="names no method"):
        Patched(pretrained=place, method="unpatched", device="cpu")
