"""The result of a benchmark: comparisons, who is best in words, the front, forms, and keeping it."""

from __future__ import annotations

import random

import pytest

from tokred.bench import shown
from tokred.bench.scoring import Scorer, Tally
from tokred.bench.table import COLUMNS, COSTS, Benchmark

# Name, setting, baseline, work, share of answers lost, speed-up.
ARMS = [
    ("tome", "r=6", False, 0.77, 0.0, 1.25),
    ("tome", "r=13", False, 0.55, 0.03, 1.7),
    ("pitome", "ratio=0.9", False, 0.54, 0.03, 1.72),
    ("random", "r=13", True, 0.55, 0.2, 1.75),
    ("downsample", "keep=0.5", True, 0.5, 0.3, 1.95),
]


def made(
    arms=ARMS, metric: str = "top1", n: int = 200, *, kept: bool = True, stage: str = "block", **extra
) -> Benchmark:
    """A result of simulated samples: an arm loses what it loses among the same samples as the others, and by luck."""
    rng = random.Random(0)
    score = Scorer(metric, "lower" if metric in ("perplexity", "wer") else "higher")
    luck = [rng.random() for _ in range(n)]
    base = [3.0 + x if score.log else float(x < 0.85) for x in luck]
    rows, samples = [], {}
    for name, setting, baseline, work, loss, speed in [("unpatched", "", False, 1.0, 0.0, 1.0), *arms]:
        values = [v + loss if score.log else v * (rng.random() >= loss) for v in base]
        tally = Tally([*values], [*base], [1.0] * n, log=score.log)
        found = tally.record(score)
        row = dict.fromkeys(COLUMNS) | {"method": name, "setting": setting, "stage": stage, "baseline": baseline}
        row |= {"metric": metric, "samples": n, "quality": found[score.field], "work": work, "reason": ""}
        row |= {end: found[f"{score.field}_{end}"] for end in ("low", "high")}
        row |= {key: found[key] for key in ("difference", "difference_low", "difference_high")}
        row |= {"speedup": speed, "speedup_low": 0.98 * speed, "speedup_high": 1.02 * speed, "seconds": 0.1 / speed}
        row |= {"tokens_in": 197, "tokens_out": round(197 * work), "peak_mib": 400.0 * work}
        if stage == "cache":
            row |= {"tokens_in": None, "tokens_out": None, "bytes": 2**24 * work, "dense_bytes": 2**24}
        rows.append(row | extra)
        samples[f"{name} {setting}".strip()] = tally
    return Benchmark(rows, "model", stage, metric, score.better, samples=samples if kept else {}, against="labels")


# -------------------------------------------------------------------------------------- comparisons


def test_two_rows_on_the_same_samples():
    found = made()
    one = found.compare("tome r=13", "random")
    mine, other = found.samples["tome r=13"], found.samples["random r=13"]
    assert one.difference.value == pytest.approx((sum(mine.values) - sum(other.values)) / 200)
    assert (one.paired, one.samples, one.better, one.note) == (True, 200, "tome r=13", "")
    assert "tome r=13 is better than random r=13: top1 +" in str(one)
    assert str(one).endswith("points on 200 samples")
    turned = found.compare(found.rows[4], found.rows[2])
    assert turned.difference == pytest.approx([-one.difference.value, -one.difference.high, -one.difference.low])
    assert "random r=13 is worse than tome r=13" in str(turned)
    level = found.compare("tome r=13", "pitome")
    assert level.better is None
    assert "tome r=13 is not distinguishable from pitome ratio=0.9" in str(level)
    same = found.compare("pitome", "pitome ratio=0.9")
    assert same.difference.value == 0
    assert "is the same as" in str(same)


def test_pairs_tell_more_than_two_intervals():
    """Two methods that fail on nearly the same samples differ for sure, though their own intervals overlap."""
    n = 400
    base = [1.0] * n
    a = [float(i >= 60) for i in range(n)]
    b = [float(i >= 72) for i in range(n)]
    whole = made([("a", "", False, 0.5, 0.0, 2.0), ("b", "", False, 0.5, 0.0, 2.0)], n=n)
    for name, values in (("a", a), ("b", b)):
        tally = whole.samples[name]
        tally.values[:], tally.base[:] = values, base
        row = next(row for row in whole.rows if row["method"] == name)
        row |= {k: v for k, v in tally.record(Scorer("top1", "higher")).items() if k in row}
    assert whole.compare("a", "b").better == "a"
    apart = Benchmark(whole.rows, "model", "block", "top1", "higher").compare("a", "b")
    assert (apart.better, apart.paired) == (None, False)
    assert "not distinguishable" in str(apart)
    assert "values of single samples were not kept" in str(apart)
    assert apart.difference.value == pytest.approx(whole.compare("a", "b").difference.value)


def test_perplexities_are_compared_by_their_ratio():
    arms = [("snapkv", "", False, 0.5, 0.02, 1.2), ("random_evict", "", True, 0.5, 0.1, 1.2)]
    for kept in (True, False):
        found = made(arms, "perplexity", kept=kept, stage="cache").compare("snapkv", "random_evict")
        # Values of the two differ by the same at every sample, up to their logs.
        assert found.difference.value == pytest.approx(2.718281828 ** (0.02 - 0.1) - 1, rel=1e-6)
        assert found.better == "snapkv", "lower is better"
        assert "perplexity -7.7 [" in str(found)


def test_rows_that_cannot_be_compared():
    found = made()
    found.rows.append(dict.fromkeys(COLUMNS) | {"method": "snapkv", "setting": "", "reason": "it does not fit"})
    for given, says in (
        ("tome", "a is 'tome', and 2 rows are; the rows are 'unpatched', 'tome r=6'"),
        ("tomee", "0 rows are"),
        ("snapkv", "which was not measured: it does not fit"),
    ):
        with pytest.raises(ValueError, match=says):
            found.compare(given, "random")


def test_other_samples_are_no_pairs():
    found = made()
    found.samples["random r=13"].groups[:] = ["a"] * 200
    one = found.compare("tome r=13", "random")
    assert (one.paired, one.note) == (False, "the two were not measured on the same samples")


# ------------------------------------------------------------------------------------------ in words


def test_the_summary_goes_by_pairs():
    found = made()
    assert found.summary.startswith(("tome r=13 beats random r=13", "pitome ratio=0.9 beats random r=13"))
    assert found.summary.endswith("as do 1 more (top1, 2 compared on 200 samples).")
    assert "values of single samples were not kept" in made(kept=False).summary
    found.samples.pop("pitome ratio=0.9")
    assert "; of 1 values of single samples were not kept" in found.summary
    lost = made([("tome", "r=13", False, 0.55, 0.4, 1.7), ("random", "r=13", True, 0.55, 0.1, 1.7)])
    assert "beyond chance; tome r=13 is worse than random" in lost.summary
    cache = made([("snapkv", "", False, 0.5, 0.1, 1.2), ("random_evict", "", True, 0.5, 0.1, 1.2)],
                 "perplexity", stage="cache")  # fmt: skip
    assert cache.summary.startswith("No method beats a random choice at equal bytes beyond chance")


def test_a_random_choice_of_another_place_is_no_rival():
    found = made()
    found.rows[4]["stage"] = "cache"
    assert "nothing says that choosing helps" in found.summary


def test_best_says_whether_chance_may_order_it():
    best = made().best(0.1)
    assert (best["method"], best["setting"]) == ("pitome", "ratio=0.9")
    assert best["why"].startswith(
        "pitome ratio=0.9 (1.72x) is the fastest of 4 that lose at most 10.0 points of top1; the next is tome r=13 "
        "(1.70x), and their quartiles overlap: the clock does not tell them apart. pitome ratio=0.9 is not "
        "distinguishable from tome r=13: top1 "
    )
    none = made(ARMS[3:]).best(0.01)
    assert none["method"] == "unpatched"
    assert none["why"] == "No method is sure to lose at most 1.0 points of top1: the unpatched model stays."
    alone = made(ARMS[1:2]).best(0.1)["why"]
    assert alone.endswith("the next is unpatched (1.00x).")
    slow = made([("tome", "r=6", False, 0.77, 0.0, 0.8)]).best(0.1)
    assert slow["why"].startswith("unpatched (1.00x) is the fastest of 2")


def test_the_front():
    found = made()
    for cost in COSTS:
        for row in (front := found.pareto(cost) if cost != "bytes" else []):
            sign = -1 if COSTS[cost] else 1
            worse = [r for r in found.measured if sign * r[cost] >= sign * row[cost] and r["quality"] >= row["quality"]]
            assert worse == [row], "none is as good and as cheap"
        for row in found.measured if front else ():
            assert any(r["quality"] >= row["quality"] and sign * r[cost] >= sign * row[cost] for r in front)
    assert found.pareto("bytes") == []
    assert found.pareto("seconds") == found.pareto()
    with pytest.raises(ValueError, match="cost is 'time'; allowed are 'speedup', 'seconds'"):
        found.pareto("time")


# -------------------------------------------------------------------------------------------- forms


def test_lines_are_as_wide_as_they_may_be():
    arms = [*ARMS, ("a_method_of_a_rather_long_name", "ratio=0.123456", False, 0.5, 0.1, 1.5)]
    parts = {"tower_seconds": 0.0123456, "prompt_seconds": 0.2, "decode_seconds": 12.5, "generated": 33.25}
    for stage in ("block", "cache"):
        found = made(arms, stage=stage, **parts)
        assert str(found) == found.text(80)
        for width in (60, 79, 80, 120):
            lines = found.text(width).splitlines()
            assert max(map(len, lines)) <= width
            assert any(line.startswith("seconds of the parts") for line in lines)
        assert "0.0123" in str(found)
        assert "33.2" in str(found)
        assert "MiB" in str(found)
    assert "against labels" in str(found)
    assert "all bytes" in str(found)
    assert "cache MiB" in str(found)
    assert "seconds of the parts" not in str(made())
    for width in (59, True, "80"):
        with pytest.raises(ValueError, match="width is a number of characters, at least 60"):
            found.text(width)


def test_markdown_for_pages():
    found = made(generated=7.0)
    found.rows.append(dict.fromkeys(COLUMNS) | {"method": "snapkv", "setting": "", "reason": "one | two"})
    lines = found.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1, "all rows have as many cells"
    assert table[0].startswith("| method | quality | difference [95 %] | speed |")
    assert table[0].endswith("| tokens |")
    assert table[2].startswith("| unpatched | ")
    assert "| `tome r=13` |" in "\n".join(table)
    assert "not measured: one \\| two" in table[-1]
    assert lines[-1] == found.summary


def test_metrics_in_their_units():
    assert "top1 in %, differences in points" in made().title
    assert "exact in %" in made(metric="exact").title
    assert "perplexity, differences in %" in made(ARMS[:1], "perplexity").title
    plain = made(metric="ssim")
    assert plain.title == "model, stage block: ssim, against labels"
    assert shown.cells(plain.rows[0], plain.units)[0] == f"{plain.rows[0]['quality']:.4g}"


def test_kept_and_read_again(tmp_path):
    found = made()
    path = found.save(tmp_path / "deep" / "er")
    assert path.name == "benchmark.json"
    assert path.with_suffix(".md").read_text().startswith("model, stage block: top1")
    for source in (path, path.parent):
        again = Benchmark.load(source)
        assert again == found
    assert again.compare("tome r=13", "random") == found.compare("tome r=13", "random")
    with pytest.raises(FileNotFoundError):
        Benchmark.load(tmp_path)
    (tmp_path / "benchmark.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"not written by Benchmark\.save of this version"):
        Benchmark.load(tmp_path)


@pytest.mark.parametrize(("metric", "stage"), [("top1", "block"), ("perplexity", "cache")])
def test_the_picture_of_every_stage(metric, stage, tmp_path):
    """Two panels where work is known, up is better, baselines are grey, and each method is joined with its rival."""
    pytest.importorskip("matplotlib")
    from tokred.bench import plots, standing

    found = made(metric=metric, stage=stage)
    joined = [(row, r) for row in found.measured if (r := standing.rival(row, found.measured, found.units))]
    assert len(joined) == 2
    figure = plots.benchmark(
        found.to_pandas(), found.units, "title", joined, word="bytes" if stage == "cache" else "work"
    )
    left, right = figure.axes
    assert left.yaxis_inverted() == (metric == "perplexity")
    assert "saved" in right.get_xlabel()
    assert ("bytes" in right.get_xlabel()) == (stage == "cache")
    lines = {line.get_label(): line for line in left.lines}
    grey = [lines[name].get_color() for name in ("random merging", "down-sampling")]
    assert all(len({c[1:3], c[3:5], c[5:7]}) == 1 for c in grey)
    assert lines["ToMe"].get_color() == plots.COLOURS[0]
    drawn = [lines[name] for name in ("ToMe", "PiToMe", "random merging", "down-sampling")]
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in drawn}) == 4
    assert sum(line.get_color() == "#bbbbbb" for line in left.lines) == 2
    for row in found.rows:
        row["work"] = None
    alone = plots.benchmark(found.to_pandas(), found.units, "title")
    assert len(alone.axes) == 1
    assert found.plot(tmp_path / "new" / "a.png").stat().st_size > 5000


def test_bars_are_those_of_the_difference():
    pytest.importorskip("matplotlib")
    from tokred.bench import plots

    found = made(ARMS[:2])
    frame = plots._drawable(found.to_pandas(), found.units, "unpatched")
    base, row = found.rows[0], found.rows[2]
    assert frame["drawn_low"].iloc[2] == pytest.approx(base["quality"] + row["difference_low"])
    assert frame["drawn"].iloc[2] == row["quality"]
    assert frame["drawn_low"].isna().iloc[0], "the unpatched model has no difference to itself"
    ratios = made(ARMS[:1], "perplexity")
    frame = plots._drawable(ratios.to_pandas(), ratios.units, "unpatched")
    expected = ratios.rows[0]["quality"] * (1 + ratios.rows[1]["difference_high"])
    assert frame["drawn_high"].iloc[1] == pytest.approx(expected)
