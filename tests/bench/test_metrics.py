"""Ready metrics beside examples worked by hand, torchmetrics' objects, groups, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import tokred
from tokred.bench import ready, samples, texts
from tokred.bench.metrics import METRICS
from tokred.bench.outputs import Generated
from tokred.bench.read import DENSE
from tokred.bench.ready import READY
from tokred.bench.scoring import FITS, Scorer, Tally, scorer


def scored(name, output, batch, dense=None):
    values, weights = Scorer(name, READY[name].better)(output, batch, dense)
    assert len(values) == len(weights)
    return pytest.approx(values, abs=1e-5), weights


def said(*words: str) -> Generated:
    ids = torch.tensor([[ord(w[0]) if w else 0, len(w)] for w in words])
    return Generated(ids, (2,) * len(words), words)


# ------------------------------------------------------------------------------------------ the list


def test_every_ready_metric_is_a_column_of_results():
    for name, one in READY.items():
        assert name in METRICS, name
        assert (METRICS[name].unit == "share") == (one.unit == "share"), name
        assert METRICS[name].interval, name
        assert one.ends[0] < one.ends[1]
        assert one.better in ("higher", "lower")
    assert all(set(names) <= set(READY) for names in FITS.values())


def test_the_page_lists_every_ready_metric():
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text("utf8")
    against = {"labels": "labels", "dense": DENSE, "references": f"references, else {DENSE}", "": ""}
    lines = [line for line in page.splitlines() if line.startswith('| `"')]
    assert lines == [
        f'| `"{name}"` | {one.reads} | {against[one.against]} | {one.better} | {one.doc} |'
        for name, one in READY.items()
    ]


# ----------------------------------------------------------------------------------------- tensors


def test_right_answers_and_agreement():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    batch = {"labels": torch.tensor([1, 1, 1])}
    assert scored("top1", logits, batch) == ([1, 0, 0], [1.0] * 3)
    assert scored("top5", logits, batch) == ([1, 1, 1], [1.0] * 3)
    assert scored("agreement", logits, {}, logits.flip(1)) == ([1, 0, 0], [1.0] * 3)
    assert scored("cosine", torch.eye(2), {}, torch.tensor([[1.0, 1.0], [0.0, -1.0]])) == ([0.5**0.5, -1], [1.0] * 2)


def test_agreement_of_texts_is_that_of_all_tokens():
    a = Generated(torch.tensor([[4, 5, 0], [4, 5, 6]]), (2, 3))
    b = Generated(torch.tensor([[4, 5, 9], [4, 5, 7]]), (2, 3))
    assert scored("agreement", a, {}, b) == ([1, 0], [1.0] * 2), "what lies behind the end counts for nothing"


def test_overlap_of_maps():
    """Two of three pixels of class 1, and one of class 0, of two: worked by hand."""
    pytest.importorskip("torchmetrics")
    right = torch.tensor([[[0, 0], [1, 1]], [[0, 255], [255, 255]]])
    found = torch.tensor([[[0, 1], [1, 1]], [[0, 1], [1, 1]]])
    logits = torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()
    values, _ = scored("miou", logits, (None, right))
    assert values == [(1 / 2 + 2 / 3) / 2, 1.0], "classes that no one has, and pixels without a class, do not count"
    # Heads answer at a part of the size.
    wide = right.repeat_interleave(4, 1).repeat_interleave(4, 2)
    values, weights = scored("miou", logits, (None, wide.where(torch.tensor([[[1]], [[0]]]) == 1, 255)))
    assert weights == [1.0, 0.0], "a map without any class is no sample"
    with pytest.raises(ValueError, match=r"reads logits \(B, classes, H, W\)"):
        scored("miou", torch.zeros(2, 3), (None, right))
    with pytest.raises(ValueError, match="255 everywhere"):
        scored("miou", logits, (None, torch.full((2, 2, 2), 255)))


# ------------------------------------------------------------------------------------------ images


def test_images_beside_the_unpatched_models():
    pytest.importorskip("torchmetrics")
    dense = torch.full((3, 3, 16, 16), 0.5)
    mine = torch.stack([dense[0], dense[0] + 0.1, dense[0] - 0.2])
    values, _ = scored("psnr", mine, {}, dense)
    assert values == [100.0, 20.0, -10 * math.log10(0.04)]
    # Of constant images only the term of means is left: (2ab + c) / (a^2 + b^2 + c), c = 0.01^2.
    pairs = [(0.5, 0.5), (0.6, 0.5), (0.3, 0.5)]
    expected = [(2 * a * b + 1e-4) / (a * a + b * b + 1e-4) for a, b in pairs]
    assert Scorer("ssim", "higher")(mine, {}, dense)[0] == pytest.approx(expected, abs=1e-4)
    for i in range(3):
        alone = Scorer("ssim", "higher")(mine[i : i + 1], {}, dense[i : i + 1])[0]
        assert alone == pytest.approx(expected[i : i + 1], abs=1e-4), "a sample's value does not hang on the others"


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (torch.zeros(2, 3), r"reads images \(B, C, H, W\)"),
        (torch.randn(1, 3, 16, 16), r"reads images in \[0, 1\], and the model returns values from -"),
        ("text", "the model returns str"),
        (torch.zeros(1, 3, 8, 16), "windows of 11 pixels"),
    ],
)
def test_outputs_that_are_no_images(output, says):
    pytest.importorskip("torchmetrics")
    with pytest.raises((TypeError, ValueError), match=says):
        Scorer("ssim", "higher")(output, {}, output)


def test_lpips_without_its_weights_is_refused_before_anything_runs(monkeypatch):
    pytest.importorskip("torchvision")
    lpip = pytest.importorskip("torchmetrics.image.lpip")

    def fetch(*args, **kwargs):
        raise OSError("no route to host")

    ready._judge.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", fetch)
        with pytest.raises(ValueError, match=r"weights could not be had \(no route to host\).*or take metric='ssim'"):
            scorer("lpips", "forward", "higher")

    class Judge:
        """Stands for the network: the mean absolute difference."""

        def __init__(self, **_):
            pass

        def eval(self):
            return self

        def to(self, device):
            return self

        def __call__(self, a, b):
            assert a.shape == (1, 3, 16, 16)
            return (a - b).abs().mean()

    with monkeypatch.context() as m:
        m.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", Judge)
        assert scorer("lpips", "forward", "higher").better == "lower"
        dense = torch.full((2, 3, 16, 16), 0.5)
        assert scored("lpips", torch.stack([dense[0], dense[0] + 0.25]), {}, dense)[0] == [0, 0.25]
    ready._judge.cache_clear()


# ------------------------------------------------------------------------------------------- texts


def test_answers_beside_right_ones():
    batch = {"answers": ["Paris", ["the dog", "a hound"], "A"]}
    assert scored("exact", said("paris.", "A  hound!", "a"), batch) == ([1, 1, 1], [1.0] * 3)
    assert scored("exact", said("in Paris", "", "the"), batch) == ([0, 0, 0], [1.0] * 3), "'A' is an answer"
    assert scored("contains", said("It is PARIS", "the doghouse", "b"), batch)[0] == [1, 1, 0]
    assert scored("contains_all", said("Paris", "the dog", "b"), batch)[0] == [1, 0.5, 0]


def test_common_words_of_summaries():
    """``the cat sat`` in ``the cat sat on the mat``: precision 1, recall 1/2."""
    pytest.importorskip("torchmetrics")
    batch = {"answers": ["the cat sat on the mat", ["Ей нравится лето", "зима"], "x"]}
    values, _ = scored("overlap", said("The cat sat.", "ей нравится зима", ""), batch)
    assert values == [2 / 3, 2 / 3, 0.0]


def test_word_errors_are_a_ratio_of_sums():
    pytest.importorskip("torchmetrics")
    batch = {"text": ["one two three four", "Don't stop", ""]}
    values, weights = scored("wer", said("one too three", "don't, STOP!", "hm hm"), batch)
    assert values == [0.5, 0.0, 2.0]
    assert weights == [4.0, 2.0, 1.0]
    tally, score = Tally(), Scorer("wer", "lower")
    tally.take(score, said("one too three", "don't stop", "hm hm"), batch, said("one two three four", "don't stop", ""))
    record = tally.record(score)
    assert record["wer"] == pytest.approx(4 / 7), "not the mean of the ratios"
    assert record["difference"] == pytest.approx(4 / 7)
    assert record["wer_low"] == 0.0
    assert tally.against == "text"


def test_weights_of_word_errors_do_not_hang_on_the_nearest_reference():
    pytest.importorskip("torchmetrics")
    right = ["one two", "one two three four"]
    assert texts.word_errors("one two three four", right) == (0, 2)
    assert texts.word_errors("one", right) == (0.5, 2)


def test_texts_without_references_are_compared_with_the_unpatched_models():
    pytest.importorskip("torchmetrics")
    score = Scorer("wer", "lower")
    dense, batch = said("one two", "three"), {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    assert score(said("one", "three"), batch, dense) == ([0.5, 0.0], [2.0, 1.0])
    assert score.against(batch) == "the unpatched model"
    assert score.against({"labels": torch.zeros(2), "text": ["a", "b"]}) == "text"
    tally = Tally()
    tally.take(score, dense, batch, dense)
    with pytest.raises(ValueError, match="some batches of data are compared with the unpatched model, and others"):
        tally.take(score, dense, {**batch, "text": ["one two", "three"]}, dense)


@pytest.mark.parametrize(
    ("output", "batch", "says"),
    [
        (Generated(torch.zeros(1, 2), (2,)), {"answers": ["a"]}, "give a tokenizer"),
        (torch.zeros(1, 2), {"answers": ["a"]}, "there is no text"),
        (said("a", "b"), {"answers": ["a"]}, r"batch\['answers'\] has 1 entries for 2 texts"),
    ],
)
def test_texts_that_cannot_be_compared(output, batch, says):
    with pytest.raises((TypeError, ValueError), match=says):
        Scorer("exact", "higher")(output, batch, output)


def test_a_generated_answer_is_no_tensor():
    with pytest.raises(TypeError, match="the model generates, and this metric reads tensors"):
        Scorer("cosine", "higher")(said("a"), {}, said("a"))


# ------------------------------------------------------------------------------ torchmetrics' objects


def test_an_object_gives_a_value_a_batch():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MeanSquaredError()
    metric.update(torch.ones(3), torch.zeros(3))
    score = scorer(metric, "forward", "higher")
    assert (score.name, score.better, score.field) == ("MeanSquaredError", "lower", "quality")
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert score(a, a, b) == ([1.0], [2.0]), "beside the unpatched model's, with the batch's samples as weight"
    assert score(a, (a, b / 2), b) == ([0.25], [2.0]), "beside labels, where there are any"
    assert [score.against(a), score.against((a, b))] == ["the unpatched model", "labels"]
    assert float(metric.compute()) == 1, "the user's own stays as it was"
    words = scorer(torchmetrics.text.WordErrorRate(), "generate", "higher")
    assert words(said("one two"), {"answers": ["one three"]}, said("")) == ([0.5], [1.0])
    assert words(said("one two"), {}, said("one two")) == ([0.0], [1.0])


def test_objects_of_a_whole_set_are_refused():
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.text import BLEUScore

    with pytest.raises(ValueError, match="BLEUScore is about a whole set of samples"):
        scorer(BLEUScore(), "generate", "higher")
    with pytest.raises(ValueError, match="MeanMetric takes value"):
        scorer(torchmetrics.MeanMetric(), "forward", "higher")


# -------------------------------------------------------------------------------- groups and samples


def test_groups_of_a_batch():
    score = Scorer("top1", "higher")
    logits, labels = torch.eye(4), torch.tensor([0, 1, 0, 0])
    tally = Tally()
    tally.take(score, logits, {"labels": labels, "group": ["a", "a", "b", "b"]}, logits)
    tally.take(score, logits, {"labels": labels, "group": torch.tensor([3, 3, 4, 4])}, logits)
    assert tally.groups == ["a", "a", "b", "b", "3", "3", "4", "4"]
    record = tally.record(score)
    alone = Tally(tally.values, tally.base, tally.weights).record(score)
    assert record["top1"] == alone["top1"] == 0.5
    assert record["top1_low"] < alone["top1_low"], "questions of one picture are right together"
    assert record["top1_high"] > alone["top1_high"]
    with pytest.raises(ValueError, match="some batches have 'group'"):
        tally.take(score, logits, {"labels": labels}, logits)
    with pytest.raises(ValueError, match=r"batch\['group'\] has 2 keys and the metric 4 values"):
        Tally().take(score, logits, {"labels": labels, "group": ["a", "b"]}, logits)


def test_samples_survive_an_interruption(tmp_path):
    path = samples.beside(tmp_path / "deep" / "quality.csv")
    assert path.name == "quality.samples.jsonl"
    head = {"model": "m", "threads": 2}
    one, two = Tally([1.0, 0.1], [0.0, 0.3], [1.0, 2.0], ["a", "b"], "labels"), Tally([2.0], [0.0], [1.0])
    samples.write(path, {**head, "method": "tome", "setting": "r=2"}, one)
    with path.open("a") as f:
        f.write('{"row": {"model": "m", "thr')
    samples.write(path, {**head, "method": "tome", "setting": "r=3"}, two)
    samples.write(path, {**head, "model": "other", "method": "tome", "setting": "r=2"}, two)
    assert samples.read(path, head) == {("tome", "r=2"): one, ("tome", "r=3"): two}
    samples.write(path, {**head, "method": "tome", "setting": "r=2"}, two)
    assert samples.read(path, head)["tome", "r=2"] == two, "measured again"
    assert samples.read(tmp_path / "none.jsonl", head) == {}


# --------------------------------------------------------------------------------- through a benchmark


def small(batches: int = 2):
    """A tiny vision transformer and its batches, two samples of a group."""
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build

    g = torch.Generator().manual_seed(0)
    groups = ["a", "a", "b", "b"]
    data = [
        {"x": torch.randn(4, 3, 40, 40, generator=g), "labels": torch.randint(0, 7, (4,), generator=g), "group": groups}
        for _ in range(batches)
    ]
    return build("vit"), data


def quick(model, methods, data, metric, **options):
    return tokred.benchmark(model, methods, data, metric, **{"rounds": 1, "progress": False, **options})


def test_a_benchmark_of_groups_resumes_with_its_samples(tmp_path):
    model, data = small()
    first = quick(model, "tome r=4", data, "top1", out=tmp_path)
    assert first.against == "labels"
    again = quick(model, "tome r=4", data, "top1", out=tmp_path)
    assert again.samples == first.samples
    assert set(again.samples) == {f"{row['method']} {row['setting']}".strip() for row in again.rows}
    assert first.samples["tome r=4"].groups == ["a", "a", "b", "b"] * 2
    found = again.compare("tome", "random")
    assert (found.paired, found.samples) == (True, 8)
    assert again.compare("unpatched", "unpatched").difference.value == 0
    # Without the file the rows are there, and are compared as if the samples were different ones.
    (tmp_path / "benchmark.samples.jsonl").unlink()
    late = quick(model, "tome r=4", data, "top1", out=tmp_path)
    assert not late.samples
    assert not late.compare("tome", "random").paired
    assert "were not kept" in late.compare("tome", "random").note


@pytest.mark.hosts
def test_images_and_texts_through_a_benchmark():
    """A run of the user's own returns images, or texts, of which the ready metrics are made."""
    torchmetrics = pytest.importorskip("torchmetrics")
    model, data = small(1)

    def picture(model, batch):
        grey = model(batch["x"]).sigmoid()[:, None, None]
        return torch.nn.functional.interpolate(grey, (16, 16)).expand(-1, 3, -1, -1)

    def words(model, batch):
        found = model(batch["x"]).topk(3).indices.tolist()
        return Generated(torch.tensor(found), (3,) * len(found), tuple(" ".join(map(str, row)) for row in found))

    for metric, run, base in (("psnr", picture, 100), ("ssim", picture, 1), ("wer", words, 0), ("exact", words, 1)):
        found = quick(model, "tome r=8", data, metric, run=run, baselines=False)
        assert found.rows[0]["quality"] == pytest.approx(base)
        assert found.against == "the unpatched model"
        assert found.rows[1]["samples"] == 4
        assert "nan" not in str(found)
    bare = [{"x": batch["x"]} for batch in data]
    own = quick(model, "tome r=8", bare, torchmetrics.MeanSquaredError(), run=picture, baselines=False)
    assert (own.metric, own.better, own.against) == ("MeanSquaredError", "lower", "the unpatched model")
    assert (own.rows[0]["quality"], own.rows[1]["samples"]) == (0, 1)


class Numbers:
    """A tokenizer that writes tokens as numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize("metric", ["exact", "contains", "overlap", "wer", "agreement"])
def test_answers_that_are_generated(metric):
    """Beside right ones, where the batches have them; else beside the unpatched model's."""
    pytest.importorskip("torchmetrics")
    kv = pytest.importorskip("tokred.adapters.tiny.kv")
    model, prompts = kv.build("llama"), [kv.prompt(30, 2, seed=s) for s in range(2)]
    with torch.inference_mode():
        answers = [
            Numbers().batch_decode(model.generate(ids, do_sample=False, max_new_tokens=4)[:, 30:].tolist(), True)
            for ids in prompts
        ]
    options = {"run": "generate", "tokenizer": Numbers(), "max_new_tokens": 4, "baselines": False}
    methods = ["snapkv budget=1.0", "snapkv budget=0.3 window=4"]
    bare = quick(model, methods, [{"input_ids": ids} for ids in prompts], metric, **options)
    right = [{"input_ids": ids, "answers": words} for ids, words in zip(prompts, answers, strict=True)]
    known = quick(model, methods, right, metric, **options)
    assert bare.against == "the unpatched model"
    assert known.against == ("the unpatched model" if metric == "agreement" else "answers")
    best = 0 if metric == "wer" else 1
    for a, b in zip(bare.rows, known.rows, strict=True):
        assert a["quality"] == b["quality"], "the right answers are the unpatched model's"
        assert a["difference"] == pytest.approx(a["quality"] - best)
    assert bare.rows[1]["quality"] == best, "a budget of everything changes nothing"
    assert (bare.rows[2]["quality"] != best) == (bare.rows[2]["difference"] != 0)


def test_metrics_that_fit_no_such_run():
    for metric, run, says in (
        ("top1", "generate", "does not fit the run 'generate', whose ready metrics are 'agreement', 'exact'"),
        ("exact", "pipeline", "does not fit the run 'pipeline', whose ready metrics are 'psnr', 'ssim'"),
        ("wer", "forward", "does not fit the run 'forward'"),
    ):
        with pytest.raises(ValueError, match=says):
            scorer(metric, run, "higher")
