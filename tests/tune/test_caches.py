"""``tokred.tune`` on caches: rows go to the layers that need them."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.tune.planted import counted
from tokred.tuning.engine import Engine

tiny = pytest.importorskip("tokred.adapters.tiny.kv")


def texts(count: int = 24, length: int = 32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 95, (1, length), generator=g) for _ in range(count)]


def held(engine: Engine, method) -> float:
    rows = [method.tokens(32, layer=i, depth=3) for i in range(3)]
    return 0.8 + 0.2 * sum(rows) / (32 * 3)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "times", counted(held))


def search(model=None, **options):
    given = {"methods": ["knorm"], "trials": 25, "samples": 12, "rounds": 3, "progress": False}
    return tokred.tune(model or tiny.build("llama"), texts(), **{**given, **options})


def rows_of(model) -> list[float]:
    """Share of its rows that each layer holds, after the model has read a prompt."""
    found = tokred.patched(model)
    model(torch.zeros(1, 8, dtype=torch.long), use_cache=True)  # a report tells of a forward
    if not found:
        return [1.0] * len(model.model.layers)
    depth = len(model.model.layers)
    return [found[0].tokens(400, layer=i, depth=depth) / 400 for i in range(depth)]


def test_the_layer_that_matters_gets_more():
    """Here only the last layer counts."""

    def run(model, batch):
        return torch.tensor([rows_of(model)[-1] + 1e-4 * float(batch.sum() % 7)])

    found = search(run=run, metric=lambda output, batch: output, memory=0.5)
    rows = [found.method.tokens(400, layer=i, depth=len(tiny.build("llama").model.layers)) for i in range(2)]
    assert found.met
    assert found.row("chosen")["quality"] > found.row("constant")["quality"] + 0.1
    assert found.row("chosen")["memory"] <= 0.5 * 1.02
    assert rows[0] < 400 * 0.5
    assert "of the bytes" in found.why[-1]
    assert found.front == []


def test_perplexity_of_texts(tmp_path):
    model = tiny.build("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = search(model, memory=0.4, trials=8)
    assert found.metric == "perplexity"
    assert found.stage == "cache"
    assert {row["role"] for row in found.rows} >= {"unpatched", "chosen", "constant"}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not tokred.patched(model)
    found.apply(model)
    assert tokred.patched(model)[0] == found.method
    tokred.remove(model)
    found.save(tmp_path)
    assert tokred.load(tmp_path) == found.method
    assert max(map(len, str(found).splitlines())) <= 80


def test_what_is_really_held_is_brought_below_the_goal():
    """A share of the prompt and the token after it are more than that share: 11 rows of 21 are not 50 %."""

    def run(model, batch):
        cache = tokred.kv_cache(model) if tokred.patched(model) else None
        out = model(batch[:, :20], use_cache=True, **tokred.cache_kwargs(cache))
        cache = getattr(out, next(iter(tokred.cache_kwargs(None))))
        return model(batch[:, 20:21], **tokred.cache_kwargs(cache)).logits

    run.probe = run
    found = search(memory=0.5, trials=6, run=run, metric="cosine")
    assert found.met
    for role in ("chosen", "constant"):
        assert 0.4 < found.row(role)["memory"] <= 0.5 * 1.015


def test_a_speed_that_no_cache_reaches():
    with pytest.raises(ValueError, match="out of reach"):
        search(speedup=3.0)


def test_what_is_held_is_read_off_where_the_run_says():
    """A run adds rows of its own after the prompt, and its ``probe`` does not. Without one nothing is small enough, and
    what loses least is chosen all the same."""

    def run(model, batch):
        found = torch.tensor([rows_of(model)[-1] + 1e-4 * float(batch.sum() % 7)])
        cache = tokred.kv_cache(model) if tokred.patched(model) else None
        out = model(torch.ones(1, 20, dtype=torch.long), use_cache=True, **tokred.cache_kwargs(cache))
        cache = getattr(out, next(iter(tokred.cache_kwargs(None))))
        model(torch.ones(1, 20, dtype=torch.long), **tokred.cache_kwargs(cache))
        return found

    def probe(model, batch):
        model(torch.ones(1, 20, dtype=torch.long), **tokred.cache_kwargs(tokred.kv_cache(model)))

    given = {"metric": lambda output, batch: output, "memory": 0.5, "trials": 8}
    plain = search(run=run, **given)
    assert not plain.met
    assert plain.row("chosen")["memory"] > 0.6
    assert plain.row("chosen")["quality"] > plain.row("constant")["quality"]
    run.probe = probe
    assert search(run=run, **given).row("chosen")["memory"] < 0.55  # of 20 rows, and where they stood
