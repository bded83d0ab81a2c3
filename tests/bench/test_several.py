"""Several metrics of one pass, and metrics of something else than a run's output: features, modules, a probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build
from tokred.bench import probe, results
from tokred.bench.entries import entry
from tokred.bench.scoring import scorers
from tokred.bench.table import WIDTH, Benchmark

QUICK: dict[str, Any] = {"rounds": 1, "progress": False, "baselines": False}


def labelled(batches: int = 3, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 40, 40, generator=g), torch.randint(0, 7, (size,), generator=g)) for _ in range(batches)
    ]


def apart(output, batch, dense):
    return (output - dense).abs().mean(1)


def confident(output, batch):
    return output.softmax(1).amax(1)


@pytest.fixture(scope="module")
def several():
    model, calls = build("vit"), []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    given = {"cosine": "cosine", "apart": apart, "confident": confident}
    found = tokred.benchmark(model, ["tome r=4", "snapkv"], labelled(), given, better={"apart": "lower"}, **QUICK)
    once = len(calls)
    hook.remove()
    return model, found, once


# ----------------------------------------------------------------------------------- several metrics


def test_several_metrics_are_of_one_pass(several):
    """Each has the values that it has alone, and the forwards are those of one."""
    model, found, once = several
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    for metric in ("cosine", apart, confident):
        alone = tokred.benchmark(model, ["tome r=4", "snapkv"], labelled(), metric, **QUICK)
        assert len(calls) == once, "as many forwards for one metric as for three"
        calls.clear()
        for one, row in zip(alone.rows, found.by(alone.metric).rows, strict=True):
            kept = ("method", "setting", "metric", "quality", "low", "high", "difference", "samples", "reason")
            assert [one[name] for name in kept] == [row[name] for name in kept]
    hook.remove()


def test_each_method_has_a_row_of_each(several):
    _, found, _ = several
    assert found.metrics == ("cosine", "apart", "confident")
    assert [(row["method"], row["metric"]) for row in found.rows[:4]] == [
        ("unpatched", "cosine"), ("unpatched", "apart"), ("unpatched", "confident"), ("tome", "cosine"),
    ]  # fmt: skip
    mine = [row for row in found.rows if row["method"] == "tome"]
    assert len({row["speedup"] for row in mine}) == 1, "they were timed together"
    assert "stage cache" in found.rows[-1]["reason"]
    assert (found.by("apart").better, found.by("confident").better) == ("lower", "higher")
    assert found.by("apart").against == "the unpatched model"


def test_answers_go_by_the_first(several):
    _, found, _ = several
    first = found.by("cosine")
    for ask in (lambda x: x.measured, lambda x: x.pareto(), lambda x: x.best(loss=2.0), lambda x: x.summary):
        assert ask(found) == ask(first)
    assert found.compare("tome", "unpatched").units.metric == "cosine"
    assert found.by("apart").compare("tome", "unpatched").better == "unpatched"
    with pytest.raises(ValueError, match=r"result.by\('apart'\) compares these"):
        found.compare(found.rows[4], "unpatched")
    with pytest.raises(ValueError, match="metric is 'top1'; allowed are 'cosine', 'apart', 'confident'"):
        found.by("top1")


def test_all_forms_have_all_metrics(several, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    _, found, _ = several
    for width in (60, WIDTH):
        lines = found.text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.startswith("tome r=4 ") for line in lines) >= 3
        assert [line for line in lines if line.startswith("apart")] == ["apart, against the unpatched model"]
    assert "apart, difference [95 %]" in found.to_markdown()
    assert found._repr_html_().count("<th>apart") == 2
    assert list(found.to_pandas()["metric"]) == [row["metric"] for row in found.rows]
    assert found.plot(tmp_path / "a.png").stat().st_size > 5000
    again = Benchmark.load(found.save(tmp_path / "kept"))
    assert (again.rows, again.metrics, str(again)) == (found.rows, found.metrics, str(found))
    assert again.by("apart").samples == found.by("apart").samples


@pytest.mark.hosts
def test_a_run_with_several_goes_on(tmp_path):
    """A row is there when all of its metrics are; one metric more is another pass."""
    model, calls = build("vit"), []

    def run(*metrics):
        calls.clear()
        return tokred.benchmark(model, "tome r=2", labelled(1), [*metrics], out=tmp_path, **QUICK)

    model.register_forward_hook(lambda *_: calls.append(1))
    first = run("top1", "cosine")
    full = len(calls)
    second = run("top1", "cosine")
    assert len(calls) < full
    assert [row["quality"] for row in second.rows] == pytest.approx([row["quality"] for row in first.rows], rel=1e-4)
    assert second.by("cosine").samples == first.by("cosine").samples
    run("cosine")
    assert len(calls) < full, "one of two is there already"
    run("cosine", "agreement")
    assert len(calls) == full
    table = results.records(results.read(tmp_path / "benchmark.csv"), "benchmark")
    assert sorted((r["method"], r["scored_by"]) for r in table) == [
        (method, metric) for method in ("tome", "unpatched") for metric in ("agreement", "cosine", "top1")
    ]


@pytest.mark.parametrize(
    ("metric", "better", "says"),
    [
        ([], "higher", "metric names none"),
        (["top1", "top1"], "higher", "metric names one twice: top1, top1; give a dict"),
        ({"mine": "cosine"}, "higher", "metric has 'mine' for 'cosine': ready metrics keep their names"),
        ({"cosine": confident}, "higher", "metric has 'cosine', the name of a ready metric, for another one"),
        (["top1", "no"], "higher", "metric is 'no'; allowed are"),
        ([confident], {"sure": "lower"}, "better has 'sure'; the metrics are 'confident'"),
        ([confident], {"confident": "more"}, "better is 'more'"),
    ],
)
def test_wrong_lists_are_refused(metric, better, says):
    with pytest.raises(ValueError, match=says):
        scorers(metric, None, better)


def test_the_unpatched_model_need_not_run_beside_every_batch(monkeypatch):
    """With ``pairs`` its outputs are kept; where they do not fit, it runs."""
    from tokred.bench import engine

    model, calls = build("vit"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = {}
    for name, options, room in (("all", {}, 2**24), ("two", {"pairs": 2}, 2**24), ("none", {"pairs": 2}, 0)):
        monkeypatch.setattr(engine, "KEPT", room)
        calls.clear()
        result = tokred.benchmark(model, ["tome r=2", "tome r=4"], labelled(8), [apart, "agreement"], **QUICK | options)
        found[name] = (len(calls), [(row["quality"], row["difference_low"]) for row in result.rows])
    assert found["all"] == found["none"]
    assert found["two"][1] == found["all"][1]
    assert found["all"][0] - found["two"][0] == 2 * 6, "two rows of eight batches"
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 1, got 0"):
        tokred.benchmark(model, "tome r=2", labelled(1), pairs=0)


# ------------------------------------------------------------------------------- what metrics are given


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return found


def test_features_modules_and_functions_are_read():
    """The same features by the head's input, by a module, and by a function of tokens that a run returns."""
    model, data = build("vit"), labelled(1)
    with tokred.applied(model, "tome", r=4):
        mine = features(model, data[0][0])
    expected = F.cosine_similarity(mine, features(model, data[0][0])).mean().item()

    def tokens(model, batch):
        return model.forward_features(batch[0])

    def pooled(output, batch):
        assert len(output) == len(batch[1])
        return model.forward_head(output, pre_logits=True)

    for read, run in (("features", "auto"), ("head_drop", "auto"), (pooled, tokens)):
        found = tokred.benchmark(model, "tome r=4", data, None, read=read, run=run, **QUICK)
        assert found.metric == "cosine"
        assert found.rows[1]["quality"] == pytest.approx(expected, abs=1e-6)

    def through_a_module(output, batch):
        return model.head(output[:, 0])  # its weights take gradients elsewhere

    assert tokred.benchmark(model, "tome r=4", data, "cosine", read=through_a_module, run=tokens, **QUICK).measured
    assert not model.head._forward_pre_hooks
    assert not model.head_drop._forward_hooks


def test_features_of_transformers_and_of_models_around():
    pytest.importorskip("transformers")
    from tests.encoder import tiny_transformers

    for family in ("ViT classifier",):
        model, seen = tiny_transformers.build(family), []

        def keep(output, batch, seen=seen):
            seen.append(output.shape)
            return 0.0

        tokred.benchmark(model, "tome r=3", [{"pixel_values": labelled(1)[0][0]}], keep, read="features", **QUICK)
        assert {*seen} == {(4, model.classifier.in_features)}


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = build("vit")

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("read", "kind", "says"),
    [
        (3, TypeError, "read must be 'features', the name of a module, or a function of"),
        ("blocks.99", ValueError, "read names 'blocks.99', and Bare has no such module"),
        ("features", ValueError, "read='features' finds no head in Bare"),
        ("idle", ValueError, "read names 'idle', a module that does not run in run='forward'"),
    ],
)
def test_what_cannot_be_read_is_refused(read, kind, says):
    model = Bare()
    model.idle = nn.Identity()
    with pytest.raises(kind, match=says):
        tokred.benchmark(model, "tome r=4", labelled(1), "cosine", read=read, **QUICK)


def test_features_are_no_answers():
    with pytest.raises(
        ValueError, match="metric='top1' does not fit read 'features', whose ready metrics are 'cosine'"
    ):
        tokred.benchmark(build("vit"), "tome r=4", labelled(1), "top1", read="features", **QUICK)


def test_a_probe_is_fitted_to_the_other_half():
    """Of classes that stand apart it is right; of labels that mean nothing it is not, though it has seen them all."""
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    right = torch.arange(60) % 3
    images = 0.3 * torch.randn(60, 3, 40, 40, generator=g) + torch.randn(3, 3, 40, 40, generator=g)[right]
    model = build("vit")
    for labels, low, high in ((right, 0.9, 1.0), (torch.randint(0, 3, (60,), generator=g), 0.0, 0.7)):
        data = [*zip(images.split(7), labels.split(7), strict=True)]
        found = tokred.benchmark(model, ["tome r=1"], data, ["probe", "cosine"], read="features", **QUICK)
        rows = found.by("probe").rows
        assert found.against == "labels"
        assert low <= rows[0]["quality"] <= high
        assert [row["samples"] for row in rows] == [60, 60]
        with torch.inference_mode():
            seen = [probe.Seen(str(i), features(model, x), y) for i, (x, y) in enumerate(data)]
        turned = [probe.crossed(order).right(seen[3]).tolist() for order in (seen, seen[::-1])]
        assert turned[0] == turned[1], "the order of batches does not matter"


def test_a_probe_reads_features():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=r"reads features \(B, F\) and labels \(B,\), got .* give read='features'"):
        tokred.benchmark(build("vit"), "tome r=1", labelled(1), "probe", read="norm", **QUICK)


# ------------------------------------------------------------------------------------ options of apply


def test_a_setting_says_how_it_is_applied():
    """As tokred.apply takes it, and both are rows of one table."""
    model, data = build("vit"), labelled(1)

    def tokens(model, batch):
        return model.forward_features(batch[0])

    def count(output, batch):
        return float(output.shape[1])

    found = tokred.benchmark(model, ["tome r=4", "tome r=4 expose=last"], data, count, run=tokens, **QUICK)
    few, full = (row["quality"] for row in found.rows[1:])
    assert (few, full) == (found.rows[1]["tokens_out"], found.rows[0]["quality"])
    assert entry("tome r=4").methods[0].origin is None
    with pytest.raises(ValueError, match="expose is 'both'"):
        entry("tome r=4 expose=both")
