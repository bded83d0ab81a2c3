"""``benchmarks/kv/lessons.py``, ``train_learned.py`` and ``learned.py``, on a tiny model."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

import tokred
from benchmarks.kv import feed, learned, lessons, train_learned
from benchmarks.kv.learned_arms import Learned, arms
from benchmarks.kv.tasks import Value
from benchmarks.kv.texts import Sample
from benchmarks.pages import learned as page
from benchmarks.pages.markdown import Results
from tests.kv.tiny import build
from tokred.bench import results
from tokred.bench.arms import BASE

METHODS = {
    "kvzap": {"hidden": 8},
    "tokenbutler": {"hidden": 8, "channels": 4, "share": "kv_group"},
    "adore": {"channels": 8, "hidden": 8, "positives": 9, "budget": 20, "rebuild": 2},
    "fastcache": {"factor": 4, "residual": True, "dropout": 0.0, "queries": lessons.REFERENCES},
}
WHERE = results.here("cpu", torch.float32) | {"model": "tiny"}


def ids(n: int, seed: int = 0) -> torch.Tensor:
    draws = random.Random(seed)
    return torch.tensor([3 + draws.randrange(90) for _ in range(n)])


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def lesson(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lessons") / "0000.safetensors"
    found = lessons.heard(model, ids(train_learned.QUERIES))
    save_file({name: t.contiguous() for name, t in found.items()}, str(path))
    return path


def reader(model, name: str) -> train_learned.Reader:
    method = tokred.make(name, **METHODS[name])
    tokred.apply(model, method)
    made = train_learned.Reader(
        method, tokred.modules(model)[name], model.get_input_embeddings().weight.detach(), len(model.model.layers)
    )
    for module in tokred.modules(model)[name].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


@pytest.mark.parametrize("name", ["kvzap", "tokenbutler", "adore"])
def test_a_noted_lesson_is_the_lesson(name: str, model, lesson: Path) -> None:
    """The loss of what was kept is that of a forward in training."""
    made = reader(model, name)
    try:
        made.learned[0].train()
        made(lesson)
        with torch.no_grad():
            model.model(ids(train_learned.QUERIES)[None])
        (wanted,) = tokred.losses(model).values()
    finally:
        tokred.remove(model)
    torch.testing.assert_close(made.left["distance"], wanted, rtol=1e-4, atol=1e-5)


def test_every_part_learns_from_files_and_is_found_again(
    model, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(train_learned.HELD + 1):
        (tmp_path / f"{i:04}.safetensors").symlink_to(lesson)
    for name, given in METHODS.items():
        part = "fastcache-4" if name == "fastcache" else name
        monkeypatch.setitem(train_learned.PARTS, part, (name, given, 2))
        train_learned.train(model, tmp_path, part, 3)
        assert tokred.load(tmp_path / part).name == name
    monkeypatch.setattr(lessons, "PROMPT", 96)
    monkeypatch.setattr(learned, "SCORED", 6)
    every = arms([0.25], tmp_path)
    taught = {a.name for a in every if a.weights is not None}
    assert taught == set(METHODS)
    group = [Sample("prose", ids(96, i), ids(8, 9 + i), ((0, 8),)) for i in range(2)]
    values = list(learned.measure(model, group, 0, every))
    assert {(v.method, v.setting) for v in values} == {(a.name, a.setting) for a in every}
    rows = {(r["method"], r["setting"]): r for r in learned.records(values, WHERE)}
    assert rows[("random_evict", "budget=0.25")]["attention_read"] <= 1
    assert rows[("kvzap", "budget=0.25 even")]["over_kvzip"] > 0
    assert rows[("kvzap", "budget=0.25 even")]["bytes"] < rows[(BASE, "")]["bytes"] / 2
    assert "attention_read" not in rows[("fastcache", "budget=0.25")]
    results.write(tmp_path / "kv.csv", list(rows.values()), "learned")
    text = page.kv_learned(Results(tmp_path))
    assert "| `tokenbutler` |" in text
    assert "At a quarter" in text
    assert "random choice" in page.kv_learned_claims(Results(tmp_path))


@pytest.mark.parametrize("name", ["kvzap", "tokenbutler", "fastcache"])
def test_a_prompt_that_is_handed_over_is_one_that_was_read(name: str, model) -> None:
    given = {**METHODS[name], **({"tau": 0.0, "recent": 8} if name == "kvzap" else {})}
    given |= {"keep": 20} if name == "tokenbutler" else {}
    text, rest = ids(60)[None], ids(1, 1)[None]
    prompt, _ = feed.read(model, text)
    said = []
    for handed in (True, False):
        with tokred.applied(model, tokred.make(name, **given)), torch.inference_mode():
            cache = tokred.kv_cache(model)
            if handed:
                prompt.fill(cache, module=tokred.modules(model)[name])
            else:
                model.model(text, past_key_values=cache)
            said.append(model(rest, past_key_values=cache).logits)
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)


def test_what_keeps_everything_reads_all_that_is_attended_to(model) -> None:
    prompt, _ = feed.read(model, ids(40)[None])
    arm = Learned("kvzip", "", tokred.make("kvzip", budget=1.0))
    with tokred.applied(model, arm.method):
        cache = prompt.fill(tokred.kv_cache(model), 30)
        found = dict(learned.Truth(prompt, 31).of(arm, cache, None))
    assert [round(float(x), 5) for x in found.values()] == [1.0, 1.0]


def test_scores_of_a_prompt_are_those_of_the_weights_at_hand(model) -> None:
    """A prompt that was handed over under some weights is read anew under others."""
    prompt, fresh = (feed.read(model, ids(60)[None])[0] for _ in range(2))
    with tokred.applied(model, tokred.make("kvzap", hidden=8, tau=-1e9, recent=8)), torch.inference_mode():
        first = tokred.modules(model)["kvzap"]
        other = copy.deepcopy(first)
        for weight in other.parameters():
            weight.add_(1.0)
        prompt.fill(tokred.kv_cache(model), module=first)
        again, wanted = (one.fill(tokred.kv_cache(model), module=other).layers[1] for one in (prompt, fresh))
    assert again.rows.keys() == wanted.rows.keys() != set()
    assert all(torch.equal(state, wanted.rows[name]) for name, state in again.rows.items())


def test_an_arm_of_another_name_is_refused(tmp_path: Path) -> None:
    assert {a.name for a in arms([0.25], tmp_path, ["kvzip"])} == {BASE, "kvzip"}
    with pytest.raises(ValueError, match=r"names must be among unpatched, random_evict, .*; got kvzap"):
        arms([0.25], tmp_path, ["kvzip", "kvzap"])


def test_an_arm_without_all_samples_is_no_row() -> None:
    one = Value("code", 0, BASE, "", "", 1.0, 6, 100)
    two = one._replace(index=1)
    other = one._replace(method="kvzip", setting="budget=0.25")
    assert [r["method"] for r in learned.records([one, two, other], WHERE)] == [BASE]
