"""Turns of a batch whose samples differ: padding between a sample's tokens changes nothing for it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, prompt
from tokred import kv
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import When

SCORES = {
    "window": kv.Window(4, 3),
    "window_wide": kv.Window(8, 3),
    "window_max": kv.Window(8, 5, "max"),
    "window_group": kv.Window(8, 3, group="max"),
    "dispersion": kv.Dispersion(8, 200.0, 3),
    "critical": kv.Critical(kv.Window(8, 3)),
    "column_sum": kv.ColumnSum(),
    "decay": kv.ColumnSum(0.8),
    "observed": kv.Observed(),
    "gumbel": kv.Gumbel(steps=20),
    "last_query": kv.LastQuery(),
    "key_norm": kv.KeyNorm(),
    "key_difference": kv.KeyDifference(),
    "lag_relative": kv.LagRelative(3, 1),
    "expected": kv.Expected(16, 2),
    "random": kv.Random(),
    "recency": kv.Recency(),
    "reconstruction": kv.Reconstruction(chunk=9, sinks=2),
}
BUDGETS = {
    "tokens": lambda: 13,
    "adaptive": lambda: kv.Adaptive(13, safe=0.0),
    "preference": lambda: kv.Preference(13, window=8),
}
WHENS = {"turns": When(turns=True), "steps": When(turns=True, every=2)}
# Tokens of each sample in each turn; the last ones are single tokens that all samples get.
TURNS = ((20, 14), (9, 5), (3, 7), (1, 1), (1, 1), (1, 1))


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float64, num_hidden_layers=2)


# One sample has fewer tokens than a window in its first turns.
FEW = ((20, 3), (9, 2), (2, 4), (1, 1), (6, 9))


def turns(side: str = "left", schedule=TURNS):
    """For each turn ids ``[2, N]`` and its mask, padded on one side."""
    for t, counts in enumerate(schedule):
        width = max(counts)
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for i, n in enumerate(counts):
            place = slice(width - n, width) if side == "left" else slice(0, n)
            ids[i, place], mask[i, place] = prompt(n, seed=10 * t + i)[0], 1
        yield ids, mask


def talk(model, side, sample=None, schedule=TURNS):
    """Tokens that each layer and head holds after each turn, for each sample; alone, or both together."""
    cache, seen, found = tokred.kv_cache(model, layout="auto"), None, []
    for ids, mask in turns(side, schedule):
        if sample is not None:
            ids = ids[sample : sample + 1, mask[sample].bool()]
            mask = torch.ones_like(ids)
        seen = mask if seen is None else torch.cat([seen, mask], 1)
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {} if sample is not None else {"attention_mask": seen}
        model(ids, position_ids=position, past_key_values=cache, **given)
        found.append([tokens(layer, seen) for layer in cache.layers])
    return found


def tokens(layer, seen):
    """For each sample and head, the numbers of the tokens that it holds."""
    number = seen.cumsum(1) - 1
    b, heads = len(seen), 2
    positions = layer.positions
    if positions is None:
        positions = torch.arange(seen.shape[1]).expand(b, heads, -1)
    return [
        [
            [int(number[i, p]) for p in head.tolist() if p != SENTINEL and seen[i, p]]
            for head in positions[i]
        ]
        for i in range(b)
    ]  # fmt: skip


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SCORES)
def test_padding_between_turns_changes_nothing(model, name, budget, when):
    sinks = 2 if name == "expected" else 0
    policy = tokred.make("kv", score=SCORES[name], budget=BUDGETS[budget](), when=WHENS[when], sinks=sinks)
    tokred.apply(model, policy)
    for side in ("left", "right") if budget == "tokens" else ("left",):
        both = talk(model, side)
        for i in range(2):
            alone = talk(model, side, i)
            for t, (ours, theirs) in enumerate(zip(both, alone, strict=True)):
                assert [layer[i] for layer in ours] == [layer[0] for layer in theirs], (side, i, t)


@pytest.mark.parametrize("name", ["zeromerge", "h2o", "snapkv", "keydiff"])
def test_methods_too(model, name):
    parts = {"snapkv": {"window": 8, "pool": 3, "turns": True}, "zeromerge": {"dense": 2, "tail": 3}}
    tokred.apply(model, name, budget=13, **parts.get(name, {}))
    both = talk(model, "left")
    for i in range(2):
        alone = talk(model, "left", i)
        assert [[layer[i] for layer in turn] for turn in both] == [[layer[0] for layer in turn] for turn in alone]


@pytest.mark.parametrize("name", ["window_wide", "window_max", "dispersion", "critical", "expected", "last_query"])
def test_a_sample_with_fewer_tokens_than_a_window(model, name):
    policy = tokred.make("kv", score=SCORES[name], budget=0.6, when=When(turns=True), sinks=1)
    tokred.apply(model, policy)
    for side in ("left", "right"):
        both = talk(model, side, schedule=FEW)
        for i in range(2):
            alone = talk(model, side, i, FEW)
            assert [[layer[i] for layer in turn] for turn in both] == [[layer[0] for layer in turn] for turn in alone]
