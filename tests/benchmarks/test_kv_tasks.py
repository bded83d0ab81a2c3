"""``benchmarks/kv/tasks.py`` and the texts that it is made of, on a tiny model and a tokenizer of words."""

from __future__ import annotations

import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.kv import reuse, tasks, texts
from benchmarks.kv.tasks import Value
from benchmarks.pages import tasks as page
from benchmarks.pages.markdown import Results
from benchmarks.saving import save
from tests.kv.tiny import build
from tokred.bench import results
from tokred.bench.arms import BASE, Arm

WHERE = results.here("cpu", torch.float32) | {"model": "tiny"}


class Words:
    """A tokenizer whose tokens are words with the blank before them, digits and marks."""

    def __call__(self, text: str, **_: Any) -> Any:
        parts = re.findall(r" ?[A-Za-z]+|\d| ?[^A-Za-z\d]", text)
        return SimpleNamespace(input_ids=[3 + sum(map(ord, part)) % 94 for part in parts])

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def prose(seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(6000))


@pytest.fixture(scope="module")
def maker() -> texts.Maker:
    return texts.Maker(Words(), prose=[prose(0), prose(1)], code=[prose(2)])


@pytest.mark.parametrize("kind", texts.MAKERS)
def test_texts(kind: str, maker: texts.Maker) -> None:
    samples = maker.samples(kind, 3)
    assert [len(s.prompt) for s in samples] == [texts.PROMPT] * 3
    assert all(0 < len(s.follows) <= texts.FOLLOWS for s in samples)
    assert len({s.question for s in samples}) == 1, "questions of a batch are of one length"
    again = maker.samples(kind, 2)
    assert all(torch.equal(a.prompt, b.prompt) and a.answers == b.answers for a, b in zip(samples, again, strict=False))
    batch = samples[0].batch()
    assert batch["input_ids"].shape == (1, texts.PROMPT + texts.FOLLOWS)
    assert int(batch["scored"].max()) == len(samples[0].answers)


@pytest.mark.parametrize("kind", ["number", "word", "several", "lines", "table", "copy"])
def test_what_is_scored_stands_in_the_prompt(kind: str, maker: texts.Maker) -> None:
    for s in maker.samples(kind, 2):
        prompt = s.prompt.tolist()
        for start, end in s.answers:
            wanted = s.follows[start:end].tolist()
            assert any(prompt[i : i + len(wanted)] == wanted for i in range(len(prompt)))


def test_the_engine_and_the_task_measure_the_same(maker: texts.Maker) -> None:
    model, policy = build("llama"), tokred.make("snapkv", budget=0.25, window=16)
    for kind, metric in (("copy", texts.losses), ("lines", texts.found)):
        samples = maker.samples(kind, 2)
        every = [Arm(BASE, ""), Arm("snapkv", "budget=0.25", policy)]
        mine = {
            (v.method, v.index): v.value
            for v in tasks.measure(model, Words(), samples, 0, every)
            if v.asked != "before"
        }
        table = tokred.benchmark(
            model, policy, [s.batch() for s in samples], metric, baselines=False, rounds=1, progress=False
        )
        for row, name in zip(table.rows, (BASE, "snapkv"), strict=True):
            assert row["quality"] == pytest.approx(sum(mine[name, i] for i in range(2)) / 2, rel=1e-4, abs=1e-6), kind


def test_rows_of_every_kind(maker: texts.Maker) -> None:
    model = build("llama")
    every = [Arm(BASE, "")]
    every += [Arm(n, "budget=0.25", tokred.make(n, budget=0.25)) for n in ("streaming_llm", "random_evict")]
    counts = {"prose": 2, "number": 2, "summary": 2}
    found = list(tasks.run(model, Words(), maker, every, counts))
    assert {(v.kind, v.asked) for v in found} == {
        ("prose", ""), ("number", "after"), ("number", "before"), ("summary", "after"),
    }  # fmt: skip
    assert not list(tasks.run(model, Words(), maker, every, counts, found)), "nothing is measured twice"
    table = [row for record in tasks.records(found, WHERE) for row in results.rows(record, "tasks")]
    by = {(r["data"], r.get("asked", ""), r["method"]): r for r in results.records(table)}
    assert by["prose", "", BASE].keys() >= {"perplexity", "perplexity_low", "bytes"}
    assert "perplexity_ratio" not in by["prose", "", BASE]
    assert by["prose", "", "streaming_llm"]["perplexity_ratio_count"] == 2
    assert by["summary", "after", BASE]["overlap"] == 1
    assert by["number", "before", "streaming_llm"]["retrieval_count"] == 2
    assert all("apart" in by["prose", "", n] for n in ("streaming_llm",))
    assert "apart" not in by["prose", "", "random_evict"]
    assert by["prose", "", "streaming_llm"]["bytes"] < by["prose", "", BASE]["bytes"]


def value(index: int, value: float, method: str = "snapkv") -> Value:
    return Value("several", index, method, "budget=0.25", "after", value, 4, 100)


def test_standard_errors_apart() -> None:
    mine, rival = [value(i, 1.0) for i in range(5)], [value(i, 0.5) for i in range(5)]
    # Five differences of 0.5 and the one that is added.
    gains = torch.tensor([0.5] * 5 + [0.0]).double()
    assert tasks.apart(mine, rival, lower=False) == pytest.approx(float(gains.mean() / (gains.std() / math.sqrt(6))))
    assert tasks.apart(mine, rival, lower=True) == -tasks.apart(mine, rival, lower=False)
    assert tasks.apart(mine, mine, lower=False) == 0


def test_an_arm_with_fewer_samples_has_no_row() -> None:
    base = [value(i, 1.0, BASE)._replace(setting="") for i in range(3)]
    rows = tasks.records([*base, *(value(i, 1.0) for i in range(2))], WHERE)
    assert [r["method"] for r in rows] == [BASE]


def test_overlap() -> None:
    assert texts.overlap("a b c d", "a x c d") == 0.75
    assert texts.overlap("", "") == 1
    assert texts.overlap("a", "") == 0


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: texts.Maker) -> None:
    monkeypatch.setattr(tasks.smollm2, "load", lambda: (build("llama"), Words()))
    monkeypatch.setattr(tasks.texts, "Maker", lambda tokenizer: maker)
    values, out = tmp_path / "values.jsonl", tmp_path / "kv.csv"
    given = ["tasks", "--values", str(values), "--out", str(out), "--overwrite", "--kinds", "copy", "--budgets", "0.25"]

    def start(*more: str) -> list[Value]:
        monkeypatch.setattr(sys, "argv", [*given, *more])
        tasks.main()
        return tasks.read(values)[0]

    first = start("--policies", "random_evict", "--samples", "2")
    values.write_text(values.read_text() + '["copy", 0, "kno')
    assert tasks.read(values)[0] == first, "a line that was broken off is left out"
    values.write_text("".join(values.read_text().splitlines(keepends=True)[:-1]))
    every = start("--policies", "random_evict,knorm", "--samples", "2")
    assert every[: len(first)] == first
    assert {v.method for v in every[len(first) :]} == {"knorm"}
    found = results.records(results.read(out), "tasks")
    assert {r["method"] for r in found} == {BASE, "random_evict", "knorm"}
    assert all("debian-handbook=" in r["versions"] and "dict-devil=" in r["versions"] for r in found)
    out.unlink()
    start("--rows")
    assert len(results.records(results.read(out), "tasks")) == 3


def folder(tmp_path: Path, apart: float) -> Results:
    base = {"model": "m", "data": "copy", "length": 960, "device": "cpu"}
    ends = {"perplexity_ratio_low": 1.0, "perplexity_ratio_high": 3.0}
    rows = [{**base, "method": BASE, "setting": "", "perplexity": 2.0}]
    for name, ratio in (("kvzip", 1.5), ("snapkv", 2.0), ("random_evict", 2.5)):
        more = {} if name == "random_evict" else {"apart": apart if name == "kvzip" else -3.5, "apart_count": 8}
        rows.append({**base, "method": name, "setting": "budget=0.25", "perplexity": 2 * ratio,
                     "perplexity_ratio": ratio, **ends, **more})  # fmt: skip
    results.write(tmp_path / "kv.csv", rows, "tasks")
    return Results(tmp_path)


def test_the_page_keeps_what_tells_policies_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    far, near = folder(tmp_path / "a", 4.2), folder(tmp_path / "b", 3.9)
    assert "Kept are copy." in page.kv_tasks_kept(far)
    assert "at any budget: copy." in page.kv_tasks_kept(near)
    assert page.kv_tasks_claims(near) == ""
    (line,) = page.kv_tasks_claims(far).splitlines()
    assert (
        "lowest figure is that of `kvzip` (1.50 times the full cache's perplexity), level with it are `snapkv`" in line
    )
    assert "A random choice is among them." in line
    assert "better than random: `kvzip`; worse: `snapkv`; not told from it: none." in line


@pytest.mark.parametrize("times", [True, False])
def test_rows_of_caches_that_are_used_again_go_into_a_table(times: bool, maker: texts.Maker, tmp_path: Path) -> None:
    options = SimpleNamespace(
        name="tiny", contexts=1, shares=[0.0, 0.25], measures=["key"], rounds=2, clock="cpu", times=times, front=1,
        device="cpu", dtype="float32", out=tmp_path / "kv.csv", overwrite=False,
    )  # fmt: skip
    save(reuse.measure(build("llama"), maker, 40, options), "reuse", options)
    found = results.records(results.read(options.out))
    assert [r["setting"] for r in found] == ["", "recompute=0", "recompute=0.25 key"]
    for r in found:
        assert {"ratio", "ms_to_first_token"} <= r.keys()
        assert ({"retrieval", "nll", "kl"} <= r.keys()) != times
        assert (r["chunks"], r["rounds"]) == (8, 2)
        assert r["front"] > 40, "a text stands in front"
