"""``tokred.benchmark``: any model in memory, each method paired with the unpatched one."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build
from tokred.bench import benchmark as engine
from tokred.bench import intervals, results
from tokred.bench.feeds import batches as feeding
from tokred.bench.scoring import Scorer, Tally
from tokred.bench.table import COLUMNS, HEADS, WIDTH, Benchmark

kv = pytest.importorskip("tokred.adapters.tiny.kv")


def labelled(batches: int = 3, size: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of random images and labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 40, 40, generator=g), torch.randint(0, 7, (size,), generator=g)) for _ in range(batches)
    ]


def quick(model, methods, data, metric=None, **options):
    """A benchmark with few rounds and no progress."""
    return tokred.benchmark(model, methods, data, metric, **{"rounds": 1, "progress": False, **options})


def named(found: Benchmark) -> dict[str, dict]:
    return {f"{row['method']} {row['setting']}".strip(): row for row in found.rows}


# ------------------------------------------------------------------------------------------ encoders


def test_a_fine_tuned_model_and_its_loader():
    """Quality is what a loop of one's own finds; baselines cost what the method costs; the model is as it was."""
    model, data = build("vit").train(), labelled()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    found = quick(model, ["tome r=4"], DataLoader([(x, y) for b in data for x, y in zip(*b, strict=True)], 4), "top1")
    assert [m.training for m in model.modules()] == modes
    rows = named(found)
    model.eval()
    with torch.inference_mode():
        dense = torch.cat([model(x).argmax(1) == y for x, y in data])
        with tokred.applied(model, "tome", r=4):
            mine = torch.cat([model(x).argmax(1) == y for x, y in data])
            cost = tokred.report(model)
    row = rows["tome r=4"]
    assert (rows["unpatched"]["quality"], row["quality"]) == (float(dense.double().mean()), float(mine.double().mean()))
    assert row["difference"] == pytest.approx(row["quality"] - rows["unpatched"]["quality"])
    assert row["samples"] == 12
    assert row["tokens_out"] == cost.layers[-1].tokens_out
    assert row["work"] == cost.macs / cost.macs_unpatched
    assert row["low"] < row["quality"] < row["high"]
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["seconds"] > 0
    assert row["peak_mib"] > 0
    assert {r["method"] for r in found.rows if r["baseline"]} == {"random", "downsample"}
    assert (rows["unpatched"]["tokens_out"], rows["unpatched"]["work"]) == (26, 1)
    assert all(abs(r["work"] - row["work"]) < 0.1 for r in found.rows if r["baseline"])
    assert all(list(r) == list(COLUMNS) for r in found.rows)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not tokred.patched(model)


@pytest.mark.parametrize("family", ["ViT", "ViT classifier", "CLIP vision"])
def test_models_of_transformers_take_dicts(family):
    pytest.importorskip("transformers")
    from tests.encoder import tiny_transformers

    model = tiny_transformers.build(family)
    data = [{"pixel_values": x, "labels": y} for x, y in labelled(2)]
    rows = named(quick(model, ["tome r=3"], data, "cosine", baselines=False))
    assert rows["unpatched"]["quality"] == pytest.approx(1)
    assert -1 < rows["tome r=3"]["quality"] < 1


def test_a_tower_of_open_clip():
    pytest.importorskip("open_clip")
    from tests.encoder import tiny_open_clip

    family = next(iter(tiny_open_clip.FAMILIES))
    data = [tiny_open_clip.inputs(family)[0]]
    rows = named(quick(tiny_open_clip.build(family), "tome r=3", data, "cosine", baselines=False))
    assert -1 < rows["tome r=3"]["quality"] < 1


def test_a_module_that_holds_one():
    """A classifier around a backbone; agreement needs no labels."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = build("vit"), nn.Linear(7, 3)

        def forward(self, x):
            return {"logits": self.head(self.backbone(x))}

    torch.manual_seed(0)
    rows = named(quick(Classifier().eval(), [tokred.ToMe(r=2), "evit kappa=0.7"], [x for x, _ in labelled()]))
    assert rows["unpatched"]["quality"] == 1
    assert rows["tome r=2"]["metric"] == "agreement"
    assert {"random_prune", "random"} <= {row["method"] for row in rows.values()}, "dropping meets random dropping"


def test_several_methods_at_once_are_one_row():
    rows = named(quick(build("vit"), [["tome r=2"], ["tome r=2", "snapkv"]], labelled(1), baselines=False))
    assert list(rows) == ["unpatched", "tome r=2", "tome+snapkv r=2 + -"]
    assert "stage cache" in rows["tome+snapkv r=2 + -"]["reason"]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_metric_of_ones_own(better):
    """A number a batch and one a sample have the same mean, though the last batch is smaller."""
    data = [*labelled(2), *labelled(1, size=1, seed=5)]

    def each(output, batch):
        return F.cross_entropy(output, batch[1], reduction="none")

    def mean(output, batch):
        return each(output, batch).mean().item()

    model = build("vit")
    one, other = (quick(model, "tome r=4", data, f, better=better, baselines=False) for f in (each, mean))
    assert (one.metric, other.metric, one.better) == ("each", "mean", better)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a["quality"] == pytest.approx(b["quality"])
        assert (a["samples"], b["samples"]) == (9, 3)
        assert a["difference_low"] <= a["difference"] <= a["difference_high"]


# ------------------------------------------------------------------------------------ language models


def test_perplexity_of_the_unpatched_model_is_that_of_one_forward():
    model, texts = kv.build("llama"), [kv.prompt(40, 2, seed=s) for s in range(2)]
    rows = named(quick(model, ["snapkv budget=1.0", "snapkv budget=0.3 window=4"], texts))
    with torch.inference_mode():
        losses = [F.cross_entropy(model(x).logits[:, 29:-1].flatten(0, 1), x[:, 30:].flatten()) for x in texts]
    expected = math.exp(float(torch.stack(losses).mean()))
    assert rows["unpatched"]["quality"] == pytest.approx(expected, rel=1e-5)
    assert rows["snapkv budget=1.0"]["difference"] == pytest.approx(0, abs=1e-5)
    row = rows["snapkv budget=0.3 window=4"]
    assert row["difference"] == pytest.approx(row["quality"] / expected - 1, rel=1e-4)
    assert row["bytes"] < row["dense_bytes"]
    assert row["work"] == pytest.approx(row["bytes"] / row["dense_bytes"])
    random = next(r for r in rows.values() if r["method"] == "random_evict")
    assert random["work"] == pytest.approx(row["work"], abs=0.05)


def test_baselines_hold_as_many_bytes_where_some_layers_slide():
    """Their windows hold what they hold, so that budgets alone are no equal bytes."""
    rows = named(quick(kv.build("gemma3"), "snapkv budget=0.4 window=4", [kv.prompt(64)], "agreement"))
    own = rows.pop("snapkv budget=0.4 window=4")
    rivals = [row for row in rows.values() if row["baseline"]]
    assert [row["method"] for row in rivals] == ["random_evict", "streaming_llm"]
    assert all(row["work"] == pytest.approx(own["work"], abs=0.03) for row in rivals)


@pytest.mark.parametrize("method", ["knorm budget=0.5", pytest.param("h2o budget=0.5", marks=pytest.mark.hosts)])
def test_padding_on_the_left_changes_nothing(method):
    """A padded batch has the values of its texts; the policies choose among real rows."""
    model = kv.build("llama")
    ids, mask, _ = kv.padded((40, 32))
    values = {}
    for name, data in {"both": [{"input_ids": ids, "attention_mask": mask}], "first": [{"input_ids": ids[:1]}]}.items():
        seen = values[name] = []

        def keep(output, batch, seen=seen):
            seen.append(output.clone())
            return 0.0

        quick(model, method, data, keep, baselines=False)
    for both, first in zip(values["both"], values["first"], strict=True):
        torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-4)


def test_texts_as_lists_of_ids_and_agreement():
    rows = named(quick(kv.build("qwen2"), "knorm budget=0.5", [kv.prompt(24)[0].tolist()], "agreement"))
    assert rows["unpatched"]["quality"] == 1
    assert rows["knorm budget=0.5"]["samples"] == 1


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("a text", "tokenise texts first"),
        ({"pixel_values": torch.zeros(1, 3)}, "'input_ids'"),
        (torch.zeros(1, 4, dtype=torch.long), "at least 8 tokens"),
        (torch.zeros(1, 20), "whole numbers"),
        (
            {"input_ids": torch.ones(1, 20, dtype=torch.long), "attention_mask": torch.arange(20)[None].lt(18).long()},
            "padding must stand on the left",
        ),
    ],
)
def test_texts_that_cannot_be_scored(item, says):
    with pytest.raises((TypeError, ValueError), match=says):
        quick(kv.build("llama"), "snapkv", [item])


# --------------------------------------------------------------------------------------- resuming


def test_an_interrupted_run_goes_on(tmp_path):
    """Rows that are there are not measured again; the model is unpatched after the interruption."""
    model, data, calls = build("vit"), labelled(2), []
    methods = ["tome r=2", "tome r=4", "pitome ratio=0.9"]

    def metric(output, batch):
        metric.count()
        return output.argmax(1) == batch[1]

    def count():
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    metric.count = count  # what a metric closes over is part of it, and other rows come of another

    def run(**options):
        return quick(model, methods, data, metric, out=tmp_path, baselines=False, **options)

    stop = 13  # once to try, two batches of the unpatched model, four of the first pair, and into the second
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not tokred.patched(model)
    table = results.records(results.read(tmp_path / "benchmark.csv"))
    assert [(r["method"], r["setting"]) for r in table] == [("unpatched", ""), ("tome", "r=2")]
    before, stop = len(calls), 0
    assert len(calls) == 13
    first = run()
    after = len(calls) - before
    assert [r["quality"] is None for r in first.rows] == [False] * 4
    assert first.path == tmp_path / "benchmark.csv"
    second = run()
    assert (after, len(calls) - before - after) == (9, 1), "two rows of two batches and two arms, and a first try"
    assert [r["speedup"] for r in second.rows] == pytest.approx([r["speedup"] for r in first.rows], rel=1e-4)
    assert len({row.key for row in results.read(first.path)}) == len(results.read(first.path))


def test_other_weights_or_data_are_measured_anew(tmp_path):
    path, model, data = tmp_path / "deep" / "rows.csv", build("vit"), labelled(1)

    def count() -> int:
        quick(model, "tome r=2", data, out=path, baselines=False)
        return len(results.records(results.read(path)))

    assert [count(), count()] == [2, 2]
    with torch.no_grad():
        model.head.bias.add_(1)
    assert count() == 4
    data = labelled(1, seed=1)
    assert count() == 6


def test_out_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "notes.txt").write_text("text")
    for name, says in (("notes.csv", "no table of results"), ("notes.txt", "give a folder or a .csv")):
        with pytest.raises(ValueError, match=says):
            quick(build("vit"), "tome r=2", labelled(1), out=tmp_path / name)


# ------------------------------------------------------------------------------------------- data


def test_a_loader_that_shuffles_is_read_in_one_order(monkeypatch):
    """All rows see the same batches, also where they are read again for each."""
    monkeypatch.setattr(feeding, "HELD", 0)
    images, classes = (torch.cat(x) for x in zip(*labelled(), strict=True))
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(images, classes), 4, shuffle=True)
    rows = named(quick(build("vit"), ["tome r=2"], loader, "top1"))
    assert torch.equal(state, torch.get_rng_state())
    again = named(quick(build("vit"), ["tome r=2"], list(loader), "top1"))
    assert rows["unpatched"]["quality"] == again["unpatched"]["quality"]


def test_data_that_change_between_readings_are_refused(monkeypatch):
    monkeypatch.setattr(feeding, "HELD", 0)

    class Noise:
        def __iter__(self):
            return iter([torch.randn(2, 3, 40, 40, generator=source) for _ in range(2)])

    source = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"batch 0 of data is another one .* give list\(data\)"):
        quick(build("vit"), "tome r=2", Noise())


def test_an_iterator_is_read_once():
    rows = named(quick(build("vit"), ["tome r=2"], iter(labelled()), "top5"))
    assert rows["tome r=2"]["samples"] == 12


def test_data_that_fail_later_end_the_run(monkeypatch):
    monkeypatch.setattr(feeding, "HELD", 0)
    reads = []

    class Failing:
        def __iter__(self):
            reads.append(1)
            yield labelled(1)[0]
            if len(reads) == 3:
                raise OSError("disk")
            yield labelled(1, seed=1)[0]

    model = build("vit")
    with pytest.raises(ValueError, match="data failed at batch 1: OSError: disk"):
        quick(model, "tome r=2", Failing())
    assert not tokred.patched(model)


# -------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_before_anything_is_measured():
    model, data = build("vit"), labelled(1)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    bad = [
        (ValueError, "data yields no batch", {"data": []}),
        (TypeError, "data must be an iterable of batches, such as a DataLoader, .* got Tensor", {"data": data[0][0]}),
        (TypeError, "data must be", {"data": 3}),
        (ValueError, "without a tensor", {"data": ["a.png"]}),
        (tokred.UnknownMethodError, "tomee", {"methods": ["tomee r=3"]}),
        (TypeError, "no parameter 'q'", {"methods": ["tome q=3"]}),
        (ValueError, "methods is empty", {"methods": []}),
        (tokred.MissingInputError, "offers only stage 'block': take a method of that", {"methods": ["tomesd"]}),
        (ValueError, "run is 'backward'; allowed are 'auto', 'forward'", {"run": "backward"}),
        (ValueError, "max_new_tokens must be a whole number", {"max_new_tokens": 0}),
        (ValueError, "batch_size must be a whole number", {"batch_size": 0}),
        (ValueError, "metric is 'top2'; allowed are 'top1'", {"metric": "top2"}),
        (ValueError, "does not fit the run 'forward'", {"metric": "perplexity"}),
        (TypeError, "metric must be a name or a function", {"metric": 3}),
        (ValueError, "better is 'more'", {"better": "more"}),
        (ValueError, "rounds must be a whole number of at least 1, got 0", {"rounds": 0}),
        (TypeError, r"model must be a torch.nn.Module, a pipeline of diffusers, or .* got str", {"model": "vit"}),
        (tokred.UnknownModelError, "Linear is of no family", {"model": nn.Linear(2, 2)}),
    ]
    for kind, says, change in bad:
        given = {"model": model, "methods": "tome r=2", "data": data, **change}
        with pytest.raises(kind, match=says):
            quick(**given)
    assert not calls


def test_a_patched_model_is_refused_and_stays_patched():
    model = tokred.apply(build("vit"), "tome", r=2)
    with pytest.raises(ValueError, match="already patched"):
        quick(model, "tome r=3", labelled(1))
    assert tokred.patched(model)


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        ("good", "metric must return a number, or a tensor of one number a sample: 'metric' returned str"),
        (None, "returned NoneType"),
        (torch.zeros(2, 2), r"returned Tensor of shape \(2, 2\)"),
        (float("nan"), "returned nan, which is no number"),
    ],
)
def test_a_metric_that_returns_no_number(returns, says):
    def metric(output, batch):
        return returns

    model = build("vit").train()
    with pytest.raises((TypeError, ValueError), match=says):
        quick(model, "tome r=2", labelled(1), metric)
    assert model.training
    assert not tokred.patched(model)


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match="have no labels"):
        quick(build("vit"), "tome r=2", [labelled(1)[0][0]], "top1")


def test_an_input_that_does_not_fit_says_whose_it_is():
    with pytest.raises((AssertionError, RuntimeError)) as found:
        quick(build("vit"), "tome r=2", [torch.zeros(2, 3, 7, 7)])
    assert "the unpatched model on the first batch" in found.value.__notes__[0]


def test_a_row_that_fails_says_why_and_the_others_are_measured(monkeypatch):
    """At the first batch, or in the middle."""
    from tokred.methods.encoder.pitome import PiToMe

    own, calls = PiToMe.reduce, []

    def reduce(self, site):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of luck")
        return own(self, site)

    monkeypatch.setattr(PiToMe, "reduce", reduce)
    rows = named(quick(build("vit"), ["snapkv", "pitome ratio=0.8", "tome r=2"], labelled(), baselines=False))
    assert "stage cache" in rows["snapkv"]["reason"]
    assert rows["pitome ratio=0.8"]["reason"] == "out of luck"
    assert rows["pitome ratio=0.8"]["quality"] is None
    assert rows["tome r=2"]["quality"] is not None


def test_a_missing_library_names_its_extra(monkeypatch, tmp_path):
    model, data = build("vit"), labelled(1)
    found = quick(model, "tome r=2", data, baselines=False)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pandas", None)
        for use in (found.to_pandas, lambda: found.plot(tmp_path / "a.png")):
            with pytest.raises(ImportError, match=r"needs pandas: pip install 'tokred\[bench\]'"):
                use()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'tokred\[bench\]'"):
            found.plot(tmp_path / "a.png")
    monkeypatch.setattr(engine, "STATUS", Path("/nowhere"))
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"needs psutil .*'tokred\[bench\]'"):
        quick(model, "tome r=2", data)


# ------------------------------------------------------------------------- intervals and the result


def test_intervals():
    """Of rights and wrongs, of values, and of perplexities, whose differences are ratios."""
    even = [1.0, 0.0] * 10
    assert intervals.estimate(even, [1.0] * 20)[1:] == pytest.approx(results.wilson(0.5, 20))
    same = intervals.paired(even, even, [1.0] * 20)
    half = results.NORMAL / 22
    assert same == pytest.approx((0, -half, half)), "no disagreement among twenty proves little"
    values = intervals.estimate([1.0, 2.0, 3.0, 6.0], [1.0] * 4)
    error = torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item() / 2
    assert values == pytest.approx((3.0, 3 - 3.182 * error, 3 + 3.182 * error)), "Student's t of three degrees"
    assert [intervals.student(n) for n in (1, 31, 10**6)] == pytest.approx([12.706, 2.0395, 1.96], rel=2e-3)
    share = Tally([1.0, 0.5], [1.0, 1.0], [1.0, 1.0]).record(Scorer("agreement", "higher"))
    assert (share["agreement_low"], share["agreement_high"], share["difference_low"]) == (0, 1, -1)
    assert intervals.estimate([0.3], [4.0]) == (0.3, None, None)
    assert intervals.estimate([1.0, 4.0], [3.0, 1.0]).value == 1.75
    tally = Tally([math.log(11), math.log(22)], [math.log(10), math.log(20)], [5.0, 5.0])
    record = tally.record(Scorer("perplexity", "lower"))
    assert record["perplexity"] == pytest.approx(math.sqrt(11 * 22))
    assert [record["difference"], record["difference_low"]] == pytest.approx([0.1, 0.1])


def table(*rows: tuple, better: str = "higher", metric: str = "top1") -> Benchmark:
    """A result of made-up rows: name, baseline, work, difference, half of its interval, speed-up."""
    made = []
    for name, baseline, work, difference, half, speed in rows:
        row = dict.fromkeys(COLUMNS) | {"method": name, "setting": "", "baseline": baseline, "work": work}
        row |= {"quality": 0.8 + difference, "difference": difference, "speedup": speed, "samples": 500}
        row |= {"tokens_in": 197, "tokens_out": 50}
        row |= {"difference_low": difference - half, "difference_high": difference + half, "reason": ""}
        made.append(row)
    return Benchmark(made, "model", "block", metric, better)


BASE_ROW = ("unpatched", False, None, 0.0, 0.0, 1.0)


def test_the_summary_says_whether_anything_beats_random():
    won = table(BASE_ROW, ("tome", False, 0.6, -0.01, 0.01, 1.5), ("random", True, 0.6, -0.1, 0.01, 1.5))
    assert won.summary == (
        "tome beats random at equal work, by 9.0 points (top1, 1 compared on 500 samples; values of single samples "
        "were not kept, so that the two count as measured on different samples)."
    )
    level = table(BASE_ROW, ("tome", False, 0.6, -0.01, 0.01, 1.5), ("random", True, 0.6, -0.02, 0.01, 1.5))
    assert level.summary.startswith("No method beats a random choice at equal work beyond chance (top1, 1 compared")
    lost = table(BASE_ROW, ("tome", False, 0.6, -0.2, 0.01, 1.5), ("random", True, 0.6, -0.02, 0.01, 1.5))
    assert "beyond chance; tome is worse than random" in lost.summary
    other = table(BASE_ROW, ("tome", False, 0.6, -0.2, 0.01, 1.5), ("random", True, 0.9, -0.02, 0.01, 1.5))
    assert "nothing says that choosing helps" in other.summary, "another amount of work is no rival"
    low = table(BASE_ROW, ("tome", False, 0.6, 0.01, 0.01, 1.5), ("random", True, 0.6, 0.1, 0.01, 1.5), better="lower")
    assert low.summary.startswith("tome beats random")
    # Of several random choices, the best one is the rival.
    two = (("random", True, 0.6, -0.1, 0.01, 1.5), ("random_prune", True, 0.63, -0.01, 0.01, 1.5))
    assert table(BASE_ROW, ("tome", False, 0.6, -0.01, 0.01, 1.5), *two).summary.startswith("No method beats")
    # Two standard errors are chance where ten are compared.
    many = [(f"m{i}", False, 0.6, 0.0, 0.01, 1.5) for i in range(10)]
    rival = ("random", True, 0.6, -0.0153, 0.01, 1.5)
    assert table(BASE_ROW, many[0], rival).summary.startswith("m0 beats")
    assert table(BASE_ROW, *many, rival).summary.startswith("No method")


def test_best_goes_by_the_interval():
    found = table(
        BASE_ROW,
        ("sure", False, 0.6, -0.005, 0.002, 1.4),
        ("unsure", False, 0.5, -0.005, 0.02, 1.8),
        ("slow", False, 0.5, 0.0, 0.001, 0.7),
    )
    assert found.best()["method"] == "sure"
    assert found.best(loss=0.03)["method"] == "unsure"
    assert found.best(loss=0)["method"] == "unpatched"
    for loss in (-1, "1", float("nan"), True):
        with pytest.raises(ValueError, match="loss is"):
            found.best(loss)


def test_the_result_in_all_forms(tmp_path):
    model = build("vit")
    methods = ["tome r=4", "pitome ratio=0.85 margin=0.8 " + "blocks=(0,1,2)", "snapkv"]
    with pytest.raises(TypeError, match="no parameter"):
        quick(model, methods, labelled(1))
    methods[1] = tokred.PiToMe(ratio=0.85)
    found = quick(model, methods, labelled())
    text = str(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "unpatched" in text
    assert "snapkv: not measured." in text
    assert "pitome ratio=0.85" in text
    page, folded, parts = found._repr_html_().partition("<details>")
    assert folded
    assert page.count("<tr>") == len(found.rows) + 1
    assert all(f"<th>{head}</th>" in page for head in HEADS)
    assert f'<td colspan="{len(HEADS)}" style="white-space: normal">not measured.' in page
    assert parts.count("<tr>") == len(found.measured) + 1
    assert "<th>selection s</th><th>rest s</th>" in parts
    frame = found.to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == len(found.rows)
    path = found.plot(tmp_path / "new" / "plot.png")
    assert path.stat().st_size > 5000


def test_tiny_differences_fit_a_line():
    text = str(table(BASE_ROW, ("a_method_of_a_rather_long_name", False, 0.6, -9.1e-10, 5.13e-10, 1.5), metric="own"))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "-9.1e-10 ± 5e-10" in text


def test_progress_is_a_line_a_row_where_it_is_piped(capsys):
    model, data = build("vit"), labelled(1)
    quick(model, ["tome r=2", "snapkv"], data, baselines=False, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["1/3 unpatched", "2/3 tome r=2", "3/3 snapkv"]
    assert "not measured" in lines[2]
    quick(model, "tome r=2", data, baselines=False)
    assert not capsys.readouterr().err
