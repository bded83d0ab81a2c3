"""``benchmarks/kv/bytes.py``: settings solved from bytes, arms on a tiny model, rows, and what a page says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.kv import bytes as script
from benchmarks.kv import holding, texts
from benchmarks.kv.bytes import Value
from benchmarks.kv.holding import Family, Held, Round
from benchmarks.pages import held
from benchmarks.pages.markdown import Results
from tests.benchmarks.test_kv_tasks import Words, prose
from tests.kv.tiny import build
from tokred import kv
from tokred.bench import results
from tokred.bench.arms import BASE

PROMPT = 256
WHERE = results.here("cpu", torch.float32) | {"model": "tiny"}


def test_solving_a_share() -> None:
    asked = list[float]()

    def bytes_of(share: float) -> int:
        asked.append(share)
        return 500 + round(share * 2000) * 4  # what is held whatever the share is, and whole rows

    for most in (8000, 4000, 1000):
        found = holding.solved(bytes_of, most, most / 8000)
        assert found is not None
        assert 0.98 * most <= bytes_of(found) <= 1.005 * most
    assert len(asked) < 20
    assert holding.solved(bytes_of, 400, 0.05) is None
    # What is held at no share at all is most of what is allowed: the guess is far off.
    for most in (4600, 5000, 7000):
        found = holding.solved(lambda x: round(4500 + 6200 * x), most, 0.9)
        assert found is not None
        assert 0.99 * most <= 4500 + 6200 * found <= 1.005 * most
    assert holding.solved(bytes_of, 10**6, 0.5) == 1.0


def test_solving_one_of_several() -> None:
    values = tuple(map(float, range(32, 1000, 32)))
    assert holding.solved(lambda x: int(x), 100, 0.5, values) == 96
    assert holding.solved(lambda x: int(x), 20, 0.5, values) is None
    assert holding.solved(lambda x: int(x), 10**6, 0.5, values) == 992
    assert holding.solved(lambda x: 7, 8, 0.5, (0.0,)) == 0.0


def test_every_arm_can_be_made() -> None:
    made = holding.families()
    keys = [(f.name, f.setting, r) for f in made for r in f.ratios]
    assert len(keys) == len(set(keys)), "two arms have one name"
    for family in made:
        method = family.make(family.values[0] if family.values else 0.25)
        if family.name != "rdkv":  # whose own store is part of it
            assert family.product == (method.parts.store.name != "flat" and method.drops)
        assert (held.called({"method": family.name, "setting": family.setting})).strip("`")
    few = holding.short()
    short = {(f.name, f.setting, r) for f in few for r in f.ratios}
    assert short <= {*keys}, "a longer run goes on from the values of a short one"
    assert len(short) == sum(len(f.ratios) for f in few) < 80
    assert {f.name for f in few} >= {*holding.FORMATS, "random_evict", "kvzip"}
    under = {
        f.setting.partition("store=")[2].partition(" ")[0].removeprefix("tight-").partition("-")[0]
        for f in few
        if f.product
    }
    assert under == {*holding.FORMATS}, "each format holds the rows of a policy"
    assert {r.kind for r in holding.SHORT} == {"prose", "several"}
    assert all(r.goals in (Round("prose", 0, 1).goals, holding.CLAIMED) for r in holding.SHORT), "every arm of a ratio"
    assert {*held.NAMED} <= {held.called({"method": f.name, "setting": f.setting}) for f in made if f.product}


FEW = (
    Family("snapkv", "store=kivi-4 budget=solved", lambda b: tokred.make(
        "snapkv", budget=b, window=8, store=kv.KIVI(bits=4, group_size=8, residual_length=8)), (4,)),
    Family("snapkv", "budget=solved", lambda b: tokred.make("snapkv", budget=b, window=8), (4,)),
    Family("kivi", "bits=2", lambda _: tokred.make("kivi", bits=2, group_size=8, residual_length=8), (16, 0),
           (0.0,)),
    Family("streaming_llm", "budget=solved", lambda b: tokred.make("streaming_llm", budget=b), (4,)),
)  # fmt: skip


@pytest.fixture(scope="module")
def maker() -> texts.Maker:
    return texts.Maker(Words(), prose=[prose(0), prose(1)], code=[prose(2)], prompt=PROMPT)


def test_arms_hold_what_was_asked_for(maker: texts.Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(script, "families", lambda: FEW)
    prompt = script.read_prompts(model, maker.samples("prose", 2))
    every = script.solve(model, prompt, [], (4, 16, 0))
    assert every[0].name == BASE
    assert [(a.name, a.goal) for a in every[1:]] == [
        ("snapkv", 4), ("snapkv", 4), ("streaming_llm", 4), ("kivi", 0),
    ], "what does not hold as little is left out"  # fmt: skip
    broken = Held("broken", "", 4, tokred.make("snapkv", budget=4, window=2, store="mustafar"))
    monkeypatch.setattr(script, "_step", lambda arm: 1 / 0 if arm is broken else 32)
    monkeypatch.setattr(script, "LONGEST", 3)
    rounds = (Round("prose", 0, 2), Round("several", 0, 1, answers=True))
    monkeypatch.setattr(script, "CLAIMED", (4,))
    with pytest.raises(ZeroDivisionError):  # a mistake of the script's own is no arm that cannot
        list(script.run(model, Words(), maker, [broken], rounds[:1], [], 9, prompt))
    found = [v for part in script.run(model, Words(), maker, every, rounds, [], 9, prompt) for v in part]
    assert not any(script.run(model, Words(), maker, every, rounds, found, 9)), "nothing is measured twice"
    monkeypatch.setattr(holding, "solved", lambda *_: None)
    assert script.solve(model, prompt, [], (4, 0), found) == every, "nothing is solved twice"
    full = next(v.held for v in found if v.method == BASE)
    for v in found:
        if v.goal:
            assert 0.97 < v.held * 4 / full <= 1.01, v
        assert v.length == (script.LONGEST if v.kind == "answer" else 0)
    rows = {(r["method"], r["data"], "store" in r["setting"]): r for r in script.records(found, WHERE, PROMPT)}
    mine = rows["snapkv", "prose", True]
    assert mine["over_single_low"] <= mine["over_single"] <= mine["over_single_high"]
    assert 0 < mine["solved"] < 1
    assert mine["bytes_share"] == pytest.approx(0.25, rel=0.03)
    assert rows["kivi", "prose", False].get("goal") is None
    assert "over_single" not in rows["snapkv", "prose", False]
    assert rows[BASE, "prose", False]["bytes_share"] == 1
    assert [row for r in rows.values() for row in results.rows(r, "bytes")]


def test_formats_are_rounded_where_nothing_is_evicted(maker: texts.Maker) -> None:
    """A prompt that is filled in by hand leaves the cache as one that was read."""
    model = build("llama")
    with tokred.applied(model, "kivi", bits=2, group_size=8, residual_length=8), torch.inference_mode():
        ids = maker.samples("prose", 1)[0].prompt[None, :100]
        cache = tokred.kv_cache(model)
        model(ids, **tokred.cache_kwargs(cache))
    prompt = script.feed.read(model, ids)[0]
    with tokred.applied(model, "kivi", bits=2, group_size=8, residual_length=8), torch.inference_mode():
        filled = prompt.fill(tokred.kv_cache(model))
    assert filled.nbytes == cache.nbytes
    for a, b in zip(filled.layers, cache.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=1e-5)


def value(method: str, index: int, nll: float, setting: str = "", goal: int = 8, data: str = "prose") -> Value:
    return Value(data, index, method, setting, goal, nll, 100, 125 if goal else 1000, 0, 0.1 if setting else None)


def test_a_product_is_paired_with_the_one_it_beats_least_surely() -> None:
    far, near = [2.0, 3.0, 4.0], [1.1, 2.1, 3.15]
    mine = [1.0, 2.0, 3.0]
    values = [value(BASE, i, x, goal=0) for i, x in enumerate(mine)]
    for name, setting, nll in (("a", "x=solved", far), ("b", "x=solved", near), ("c", "store=s x=solved", mine)):
        values += [value(name, i, x, setting) for i, x in enumerate(nll)]
    values += [value("late", 0, 1.0, "x=solved")]
    rows = {r["method"]: r for r in script.records(values, WHERE)}
    assert rows.keys() == {BASE, "a", "b", "c", "late"}, "what nearly all have is one sample here"
    assert rows["a"]["prompts"] == 1
    rows = {r["method"]: r for r in script.records(values[:-1], WHERE)}
    assert rows["c"]["prompts"] == 3
    assert rows["c"]["over_single"] == pytest.approx(math.exp(-(0.1 + 0.1 + 0.15) / 3))
    assert rows["c"]["over_single_high"] < 1
    later = {r["method"]: r for r in script.records([v._replace(index=v.index + 12) for v in values[:-1]], WHERE)}
    assert later == rows, "samples of a run of its own begin behind those of others"


def test_how_many_samples_count() -> None:
    assert script.common([10] * 9 + [2]) == 10
    assert script.common([10] * 8 + [2] * 2) == 2
    assert script.common([]) == 0


def page(tmp_path: Path, high: float) -> Results:
    base: dict[str, Any] = {"model": "m", "length": 2048, "device": "cpu", "dtype": "bfloat16"}
    rows = []
    for data, metric in held.METRICS.items():
        more = {"generated": 15.0} if data == "answer" else {}
        one = {"bytes": 8000, "bytes_share": 1.0, "prompts": 8, **more}
        level = 0.9 if data in held.KEYS else None
        rows.append({**base, "method": BASE, "setting": "", "data": data, **one} | ({metric: level} if level else {}))
        for name, setting, figure in (
            ("snapkv", "window=16 budget=solved", 1.4), ("random_evict", "budget=solved", 1.6),
            ("kivi", "bits=1 residual_length=solved", 1.5), ("kvzip", "store=kivi-4 budget=even-solved", 1.1),
        ):  # fmt: skip
            x = figure if level is None else level / figure
            ends = {f"{metric}_low": x - 0.05, f"{metric}_high": x + 0.05}
            over = "over_single" if level is None else "keys_over_single"
            paired = {over: 0.8, f"{over}_low": 0.7, f"{over}_high": high} if "store" in setting else {}
            rows.append({**base, "method": name, "setting": setting, "data": data, "goal": 8, metric: x, **ends,
                         **one, "bytes_share": 0.125, **paired})  # fmt: skip
    results.write(tmp_path / "kv.csv", rows, "bytes")
    return Results(tmp_path)


def test_new_samples_are_asked_of_the_named_product_and_its_policy_alone(tmp_path: Path) -> None:
    product, alone = holding.again()
    assert (product.name, product.ratios, alone.name, alone.ratios) == ("kvzip", (8,), "kvzip", (8,))
    assert product.product
    assert not alone.product
    seen = {i for r in (*holding.SHORT, *holding.ROUNDS) if r.kind == "several" for i in range(r.start, r.end)}
    assert not seen & {i for r in holding.AGAIN for i in range(r.start, r.end)}
    for high, word in ((0.3, "met, +20% (+10% to +30%)"), (0.3, "not shown, -5% (-10% to +30%)")):
        mean, low = (0.2, 0.1) if word.startswith("met") else (-0.05, -0.1)
        base: dict[str, Any] = {
            "model": "m",
            "data": "several",
            "goal": 8,
            "bytes": 1,
            "prompts": 48,
            "method": "kvzip",
        }
        base |= {"device": "cpu", "dtype": "bfloat16", "length": 2048}
        ends = {"keys_over_single": mean, "keys_over_single_low": low, "keys_over_single_high": high}
        rows = [
            {**base, "setting": "budget=solved", "retrieval": 0.4},
            {**base, "setting": "store=tight-turbo-4 budget=solved", "retrieval": 0.4 + mean, **ends},
        ]
        results.write(tmp_path / "kv.csv", rows, "bytes_again", overwrite=True)
        text = held.kv_bytes_claims(Results(tmp_path))
        assert (
            f"new samples of *several*, `kvzip` in `turbo-4` beside `kvzip` alone, which had come nearest: {word}"
            in text
        )


def test_the_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    met, missed = page(tmp_path / "a", 0.9), page(tmp_path / "b", 1.1)
    assert "| `kvzip` with even heads in `kivi-4` |  |  | 1.10 (1.05 to 1.15) |  |  |" in held.kv_bytes(met)
    assert "| `kvzip` with even heads in `kivi-4` | 15.0 |  |" in held.kv_bytes_keys(met)
    text = held.kv_bytes_claims(met)
    assert "on *prose* met, 0.80 (0.70 to 0.90) times its perplexity" in text
    assert "on *prose* not shown" in held.kv_bytes_claims(missed)
    assert "*prose* at 8:1: the lowest figure is that of `kvzip` with even heads in `kivi-4` (1.10 times" in text
    assert "of policies and formats alone that of `snapkv` (1.40 times" in text
    assert "`kivi` 8:1" in text
    assert "16:1:" not in text
    pytest.importorskip("matplotlib")
    assert [p.name for p in held.plot(met, tmp_path)] == ["kv_bytes.png"]


def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up values of the short selection: one line for each arm that is named, over a scale of halves."""
    pytest.importorskip("matplotlib")
    arms = [(f, r) for f in holding.short() for r in f.ratios]
    full = {"prose": 2.0, "several": 1.0}
    values = [value(BASE, i, x, goal=0, data=data) for data, x in full.items() for i in range(2)]
    for family, ratio in arms:
        sort = held.kind({"method": family.name, "setting": family.setting})
        loss = {"format": 0.2, "policy": 0.1, "product": 0.05}[sort]
        loss *= math.log2(ratio)
        for i in range(2):
            values += [value(family.name, i, 2 + loss, family.setting, ratio)._replace(held=round(1000 / ratio))]
            values += [value(family.name, i, 1 - loss / 2, family.setting, ratio, "several")]
    results.write(tmp_path / "kv.csv", script.records(values, WHERE), "bytes")
    drawn: list[Any] = []
    save = held.plots.save
    monkeypatch.setattr(held.plots, "save", lambda figure, path: drawn.extend(figure.axes) or save(figure, path))
    held.plot(Results(tmp_path), tmp_path)
    prose, several = drawn
    assert (prose.get_title(), several.get_title()) == ("prose", "several")
    for axis in drawn:
        assert axis.get_xscale() == "log"
        names = {line.get_label() for line in axis.get_lines()}
        assert names >= {"full cache", "random_evict alone", *(f"{name} alone" for name in holding.FORMATS)}
        assert {name.replace("`", "") for name in held.NAMED} <= names
    assert len({(x.get_linestyle(), x.get_marker()) for x in prose.get_lines() if x.get_color() == "#222222"}) == 6
    line = next(x for x in prose.get_lines() if x.get_label() == "snapkv alone")
    assert list(line.get_xdata()) == pytest.approx([1 / 32, 1 / 16, 1 / 8, 1 / 4], rel=0.02)
    assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)
    text = held.kv_take(Results(tmp_path))
    assert text.startswith("| bytes | prose, of all | policies and formats alone | several, of all | alone |")
    assert "| 32:1 |" in text


def test_a_page_without_rows(tmp_path: Path) -> None:
    results.write(tmp_path / "kv.csv", [], "bytes")
    nothing = Results(tmp_path)
    assert held.kv_bytes(nothing) == held.kv_bytes_claims(nothing) == held.NOTHING
    assert held.plot(nothing, tmp_path) == []
