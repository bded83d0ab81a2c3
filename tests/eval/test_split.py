"""VTC-Bench's split, on logs of every form."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import tokred
from tokred.bench.results import wilson

#           both right      down-sampling fails   the dense model fails
DENSE = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
DOWN = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0]
MINE = [1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1]
LOG = {"unpatched": DENSE, "downsample_visual budget=0.25": DOWN, "divprune budget=0.25": MINE}


def rows(split):
    return {(row["method"], row["group"]): row for row in split.rows}


def records():
    return [{"sample": i, "method": m, "correct": v} for m, values in LOG.items() for i, v in enumerate(values)]


def test_groups_and_their_accuracies():
    split = tokred.eval.vtc_split(LOG)
    assert split.groups == {"A": [6, 7, 8, 9], "B": [0, 1, 2, 3, 4, 5]}
    assert split.left_out == 2
    found = rows(split)
    mine = found["divprune budget=0.25", "A"]
    assert (mine["samples"], mine["right"], mine["accuracy"]) == (4, 3, 0.75)
    assert (mine["low"], mine["high"]) == wilson(0.75, 4)
    assert found["divprune budget=0.25", "B"]["accuracy"] == pytest.approx(5 / 6)
    assert found["divprune budget=0.25", "all"]["accuracy"] == pytest.approx(9 / 12)
    bounds = [found[m, g]["accuracy"] for m in list(LOG)[:2] for g in "AB"]
    assert bounds == [1, 1, 0, 1], "the dense model and down-sampling are the bounds, by definition"
    text = str(split)
    assert "75.0 [" in text
    assert "A: 4 samples that downsample_visual budget=0.25 gets wrong and unpatched right; B: 6" in text.replace(
        "\n", " "
    )
    assert all(len(line) <= 120 for line in text.splitlines())


def test_logs_of_every_form_say_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    expected = tokred.eval.vtc_split(LOG).rows
    frame = pandas.DataFrame(records())
    frame.to_csv(tmp_path / "log.csv", index=False)
    frame.assign(correct=frame.correct.astype(bool)).to_csv(tmp_path / "words.csv", index=False)
    tallies = {
        m: SimpleNamespace(values=[float(v) for v in vs], base=[float(v) for v in DENSE]) for m, vs in LOG.items()
    }
    without = {m: t for m, t in tallies.items() if m != "unpatched"}
    shuffled = {m: dict(reversed(list(enumerate(vs)))) for m, vs in LOG.items()}
    forms = [frame, frame.sample(frac=1, random_state=0).sort_values("method", key=lambda m: m.map(list(LOG).index)),
             tmp_path / "log.csv", str(tmp_path / "words.csv"), records(), shuffled,
             SimpleNamespace(samples=tallies), SimpleNamespace(samples=without)]  # fmt: skip
    for form in forms:
        assert tokred.eval.vtc_split(form).rows == expected
    assert list(tokred.eval.vtc_split(LOG).to_pandas()["group"])[:3] == ["A", "B", "all"]


def test_graded_values_and_empty_groups():
    split = tokred.eval.vtc_split({"unpatched": [0.9, 0.4], "downsample": [0.8, 0.9], "x": [0.6, 0]}, right=0.7)
    assert split.groups == {"A": [], "B": [0]}
    assert rows(split)["x", "A"]["accuracy"] is None
    assert rows(split)["x", "B"]["accuracy"] == 0
    assert "-" in str(split)


def write(path, values, form):
    path.write_text("".join(json.dumps(form(i, v)) + "\n" for i, v in enumerate(values)), "utf-8")
    return path


def test_logs_of_lm_eval_and_lmms_eval(tmp_path):
    lm = {m: write(tmp_path / f"{i}.jsonl", v, lambda i, v: {"doc_id": i, "filter": "none", "doc": {"answer": 1},
          "metrics": ["exact_match"], "exact_match": float(v), "resps": [["x"]]})
          for i, (m, v) in enumerate(LOG.items())}  # fmt: skip
    lmms = {m: write(tmp_path / f"m{i}.jsonl", v, lambda i, v: {"doc_id": i, "target": "a", "doc_hash": "0",
            "mme_score": {"question_id": i, "score": v}}) for i, (m, v) in enumerate(LOG.items())}  # fmt: skip
    expected = tokred.eval.vtc_split(LOG).rows
    assert tokred.eval.vtc_split(tokred.eval.read_samples(lm)).rows == expected
    assert tokred.eval.vtc_split(tokred.eval.read_samples(lmms)).rows == expected
    assert tokred.eval.vtc_split(tokred.eval.read_samples(lmms, "mme_score")).rows == expected
    two = write(tmp_path / "two.jsonl", [1, 0], lambda i, v: {"doc_id": 0, "filter": ["strict", "loose"][i], "acc": v})
    with pytest.raises(ValueError, match="sample 0 twice: give filtered=, such as 'loose'"):
        tokred.eval.read_samples({"a": two})
    assert tokred.eval.read_samples({"a": two}, filtered="strict") == {"a": {0: 1.0}}
    many = write(tmp_path / "many.jsonl", [1], lambda i, v: {"doc_id": i, "acc": v, "f1": v})
    with pytest.raises(ValueError, match=r"metric= has to name a field.*acc, f1"):
        tokred.eval.read_samples({"a": many})
    for metric, words in (("em", "without 'em'"), ("acc", "no sample of filter")):
        with pytest.raises(ValueError, match=words):
            tokred.eval.read_samples({"a": many}, metric, filtered=None if metric == "em" else "none")


def test_samples_of_lm_eval():
    fixed = {"task": "words", "filter": "none", "target": "x", "answers": ["x"], "length": 1}
    samples = [{**fixed, "sample": i, "method": m, "exact_match": v} for m, vs in LOG.items() for i, v in enumerate(vs)]
    split = tokred.eval.vtc_split(SimpleNamespace(samples=samples))
    assert len(split.groups["A"]) == 4
    samples[0]["f1"] = 1.0
    with pytest.raises(ValueError, match="several metrics"):
        tokred.eval.vtc_split(SimpleNamespace(samples=samples))


@pytest.mark.parametrize(
    ("log", "options", "error", "words"),
    [
        (LOG, {"dense": "full"}, ValueError, "dense is 'full'; the log has 'unpatched'"),
        (LOG, {"downsample": "x"}, ValueError, "downsample is 'x'; the log has"),
        (LOG | {"downsample budget=0.5": DOWN}, {}, ValueError, "several: 'downsample_visual"),
        ({"unpatched": DENSE}, {}, ValueError, "none among 'unpatched'"),
        (LOG | {"short": [1]}, {}, ValueError, "1 samples of 'short' and 12 of 'unpatched'"),
        (LOG | {"odd": ["yes"] * 12}, {}, ValueError, "correct is 'yes' for sample 0 of 'odd'"),
        (records() + records()[:1], {}, ValueError, "sample 0 of 'unpatched' twice"),
        (7, {}, TypeError, "got int"),
        (LOG, {"right": "half"}, TypeError, "right is the least value"),
        (SimpleNamespace(samples={}), {}, ValueError, "kept no values"),
    ],
)
def test_bad_input(log, options, error, words):
    with pytest.raises(error, match=words):
        tokred.eval.vtc_split(log, **options)


def test_a_table_without_the_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(records()).rename(columns={"correct": "right"})
    frame.to_csv(tmp_path / "log.csv", index=False)
    for log in (frame, tmp_path / "log.csv"):
        with pytest.raises(ValueError, match="no column correct"):
            tokred.eval.vtc_split(log)


def test_a_benchmark_of_this_process():
    """Down-sampling is among its rows by itself."""
    pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    from tests.encoder.tiny_timm import build

    model = build("vit")
    with torch.inference_mode():
        images = torch.randn(12, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        labels = model(images).argmax(1)
    labels = torch.cat([(labels[:2] + 1) % 7, labels[2:]])
    result = tokred.benchmark(model, ["tome r=4"], [(images, labels)], "top1", rounds=1, progress=False)
    split = tokred.eval.vtc_split(result)
    found = rows(split)
    assert split.downsample.startswith("downsample")
    assert split.left_out == 2
    assert sum(found["tome r=4", group]["samples"] for group in "AB") == 10
    assert found["tome r=4", "all"]["accuracy"] == next(r for r in result.rows if r["method"] == "tome")["quality"]
