"""Drafts over few rows: the worked example of the draft cache, and the law that greedy texts stay what they are."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, prompt
from tokred.adapters.kv.reuse.drafts import DraftLayer
from tokred.errors import NothingRecordedError, UnsupportedModelError
from tokred.kv.drafting import DraftRows

N, NEW = 40, 24
ALL = ("snapkv", {"budget": 1.0})

pytestmark = pytest.mark.usefixtures("no_grad")


def greedy(model, ids, count=NEW):
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)


# ------------------------------------------------------------------ which rows

SCORES = [0.1, 0.2, 0.3, 0.9, 0.4, 0.8, 0.1, 0.7, 0.2, 0.6, 0.5, 0.3]
HELD = {
    12: [0, 1, 2, 3, 5, 7, 9, 10],
    13: [0, 1, 2, 3, 5, 7, 9, 12],
    14: [0, 1, 2, 3, 5, 7, 12, 13],
    15: [0, 1, 2, 3, 5, 12, 13, 14],
    16: [0, 1, 2, 3, 12, 13, 14, 15],
    17: [0, 1, 2, 12, 13, 14, 15, 16],
    18: [0, 1, 2, 13, 14, 15, 16, 17],
}


@pytest.mark.parametrize("steps", [(1,) * 6, (2, 2, 2), (3, 3), (5, 1)])
def test_worked_example(steps):
    """Keys say what they are: channel 0 is the score, channel 1 the token."""
    keys = torch.zeros(1, 1, 18, 2)
    keys[..., :12, 0], keys[..., 1] = torch.tensor(SCORES), torch.arange(18.0)
    layer = DraftLayer(DraftRows(8, 3), room=4)
    layer.choose(torch.tensor([[[1.0, 0.0]]]), keys[:, :, :12], keys[:, :, :12], 12)

    def held():
        return sorted(layer.update(keys[:, :, :0], keys[:, :, :0])[1][0, 0, :, 1].tolist())

    at = 12
    assert layer.chosen.tolist() == [[[0, 1, 2, 3, 5, 7, 9, 10]]]
    for step in steps:
        assert held() == HELD[at]
        assert not layer.rule.due(layer.since)
        layer.update(keys[:, :, :3], keys[:, :, :3])  # a draft, of which nothing stays
        assert layer.get_seq_length() == at + 3
        assert layer.get_mask_sizes(1) == (12, at - 8)
        at += step
        layer.follow(keys[:, :, at - step : at], keys[:, :, at - step : at])
        assert layer.get_seq_length() == at
    assert held() == HELD[18]
    assert layer.rule.due(layer.since)


def test_heads_of_a_group_are_summed_and_ties_go_to_the_older():
    keys = torch.tensor([[1.0, 0], [0, 1], [0, 1], [3, 0], [0, 2]])[None, None]
    q = torch.tensor([[[-1.0, 1.0], [0.0, 1.0]]])  # together [-1, 2]: scores -1, 2, 2, -3, 4
    assert DraftRows(3, 0).select(q, keys).tolist() == [[[4, 1, 2]]]
    assert DraftRows(3, 1).select(q.half(), keys.half()).tolist() == [[[0, 4, 1]]]


# ------------------------------------------------------------------ greedy texts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.hosts), "gemma3"])
def test_the_text_is_that_of_greedy_generation(family, attention):
    model, ids = build(family), prompt(N)
    model.set_attn_implementation(attention)
    wanted = greedy(model, ids)
    tokred.apply(model, *ALL[:1], **ALL[1])
    for budget, start, gamma in ((N, 4, 3), (12, 2, 4), (6, 0, 1)):
        made = tokred.draft(model, ids, max_new_tokens=NEW, budget=budget, start=start, gamma=gamma)
        assert torch.equal(made.sequences, wanted), (budget, start, gamma)
        assert made.accepted <= made.drafts
        assert made.forwards - 1 + made.accepted >= NEW - 1
        assert made.choices >= (2 if budget == 6 else 1)


def test_a_draft_over_all_rows_is_right():
    model = tokred.apply(build("llama"), *ALL[:1], **ALL[1])
    made = tokred.draft(model, prompt(N), max_new_tokens=6, budget=N, start=0, gamma=4)
    assert made.accepted == made.drafts == 4
    assert made.forwards == 2


@pytest.mark.parametrize("given", [{"budget": 0.5, "window": 4}, {"budget": 0.5, "window": 4, "store": "rectangle"}])
def test_a_policy_has_its_say_about_the_prompt(given):
    model = tokred.apply(build("llama"), "snapkv", **given)
    wanted = greedy(model, prompt(N))
    made = tokred.draft(model, prompt(N), max_new_tokens=NEW, budget=10, start=2)
    assert torch.equal(made.sequences, wanted)


def test_it_ends_where_the_text_ends():
    model, ids = build("llama"), prompt(N)
    wanted = greedy(model, ids)[0, N:].tolist()
    end = wanted[9]
    model.generation_config.eos_token_id = [end, 0]
    tokred.apply(model, *ALL[:1], **ALL[1])
    made = tokred.draft(model, ids[0], max_new_tokens=NEW, budget=20, start=4)
    assert made.sequences[0, N:].tolist() == wanted[: wanted.index(end) + 1]


# ------------------------------------------------------------------ what does not go


def test_bad_input():
    model, ids = build("llama"), prompt(N)
    run = lambda **given: tokred.draft(model, ids, **{"max_new_tokens": 4, "budget": 20, "start": 4, **given})  # noqa: E731
    with pytest.raises(NothingRecordedError, match="the model is not patched with a policy"):
        run()
    tokred.apply(model, *ALL[:1], **ALL[1])
    with pytest.raises(ValueError, match="budget is 41, but the prompt has 40 tokens"):
        run(budget=41)
    with pytest.raises(ValueError, match="budget must be more than start=4 and gamma=4 together, got 8"):
        run(budget=8)
    with pytest.raises(ValueError, match="gamma"):
        run(gamma=0)
    with pytest.raises(ValueError, match="of one sample"):
        tokred.draft(model, prompt(N, b=2), max_new_tokens=4)
    tokred.apply(tokred.remove(model), "snapkv", budget=0.5, window=4)
    with pytest.raises(ValueError, match="budget is 30, but there are 20 rows"):
        run(budget=30)


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("h2o", {"budget": 0.5}, "goes on evicting when the prompt is over, and a draft chooses among rows that stay"),
        ("tokenselect", {}, "chooses rows anew"),
        ("snapkv", {"budget": 0.5, "window": 4, "store": "kivi"}, "'kivi' holds them in another form"),
        ("adakv", {"budget": 0.5, "score": tokred.kv.Window(4)}, "differ in number between heads"),
    ],
)
def test_policies_that_cannot(policy, given, message):
    model = tokred.apply(build("llama"), policy, **given)
    with pytest.raises(ValueError, match=message):
        tokred.draft(model, prompt(N), max_new_tokens=4, budget=10, start=2)


def test_models_that_cannot():
    model = tokred.apply(build("deepseek_v3"), *ALL[:1], **ALL[1])
    with pytest.raises(UnsupportedModelError, match="latents"):
        tokred.draft(model, prompt(N), max_new_tokens=4, budget=10, start=2)
