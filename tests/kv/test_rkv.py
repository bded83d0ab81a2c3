"""R-KV: the card's worked example, and what the score promises."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.kv import CacheSite, Judges, Padding, Redundancy

K = [[1, 0], [0, 1], [1, 0.1], [0.9, 0.2], [-1, 0.5], [0.1, 1], [1, 1], [0, -1]]
Q = [[1, 0], [0, 1]]
SETTINGS = {"budget": 5, "window": 2, "pool": 3, "every": 1}


def site(k=K, q=Q, **more) -> CacheSite:
    keys = torch.tensor([[k]], dtype=torch.float32)
    return CacheSite(q=torch.tensor([[q]], dtype=torch.float32), k=keys, v=keys, **more)


def close(found, expected):
    assert found.flatten().tolist() == pytest.approx(expected, abs=2e-6)


def kept(**more) -> list[int]:
    return tokred.RKV(**{**SETTINGS, **more}).reduce(site()).representative.flatten().tolist()


def test_worked_example():
    score = tokred.RKV(**SETTINGS).parts.score
    close(score.important(site())[..., :6], [0.176564, 0.180773, 0.180773, 0.180773, 0.179527, 0.179527])
    close(score.redundant(site())[..., :6], [0.148859, 0.141287, 0.153221, 0.157792, 0.086318, 0.132739])
    close(score(site())[..., :6], [-0.116316, -0.109081, -0.119821, -0.123936, -0.059734, -0.101512])
    assert kept() == [1, 4, 5, 6, 7]


def test_as_the_authors_code_has_it():
    score = Redundancy(2, 3, as_released=True)
    close(score.redundant(site())[..., :6], [0.163587, 0.138843, 0.150569, 0.155062, 0.084824, 0.130442])


def test_importance_alone_breaks_ties_to_the_older_row():
    assert kept(importance=1.0) == [1, 2, 3, 6, 7]


def test_importance_alone_is_the_attention_of_the_newest_queries():
    """With one query head to a key it is the attention shared out among the rows before the window."""
    torch.manual_seed(0)
    k = torch.randn(2, 3, 20, 8)
    where = CacheSite(q=torch.randn(2, 3, 20, 8), k=k, v=k, prompt=(0, 0))
    ours, theirs = Redundancy(4, 5, importance=1.0)(where), Judges(4, 5, "max", "group")(where)
    assert torch.allclose(ours[..., :16], theirs[..., :16] / 4, atol=1e-6)


def test_of_equal_keys_all_but_the_newest_are_blamed():
    k = [[1, 0], [0, 1], [1, 0], [0, -1], [1, 0], [-1, 1]]
    found = Redundancy(1, 1, importance=0.0)(site(k))[0, 0]
    # The newest spares the one before it, which is spared once, and is spared by all others itself.
    assert found[0] < found[2] < found[4]


def test_scaled_keys_are_as_redundant():
    longer = site((torch.tensor(K) * 7).tolist())
    assert torch.allclose(Redundancy(2).redundant(longer), Redundancy(2).redundant(site()), atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"as_released": True}, {"protect": 2}, {"protect": 0}])
def test_blocks_padding_and_rows_by_hand(monkeypatch, more):
    """Against the whole matrix, in blocks of one row, behind padding."""
    torch.manual_seed(1)
    score, pad = Redundancy(3, 3, **more), 4
    k, q = torch.randn(1, 2, 14, 6), torch.randn(1, 4, 14, 6)
    alone = score(CacheSite(q=q, k=k, v=k))
    unit = torch.nn.functional.normalize(k, dim=-1)
    like = unit @ unit.mT * (1 - torch.eye(14))
    for head in range(2):
        for row in like[0, head]:
            found = [j for j in range(14) if row[j] > 0.5][-score.protect :] if score.protect else []
            row[found or ([0] if score.as_released else [])] = 0
    assert torch.allclose(score.redundant(CacheSite(q=q, k=k, v=k)), like.mean(-2).softmax(-1), atol=1e-6)
    monkeypatch.setattr("tokred.methods.kv.rkv._BLOCK", 1)
    wide = [torch.cat([torch.full((1, t.shape[1], pad, 6), 5.0), t], 2) for t in (q, k)]
    mask = torch.arange(14 + pad)[None] >= pad
    padded = score(CacheSite(q=wide[0], k=wide[1], v=wide[1], padding=Padding(mask)))
    assert torch.allclose(padded[..., pad:-3], alone[..., :-3], atol=1e-6)


def test_a_kept_prompt():
    with pytest.raises(ValueError, match="with keep_prompt, budget must be a number of generated rows"):
        tokred.RKV(budget=0.5, keep_prompt=True)
    policy = tokred.RKV(budget=3, keep_prompt=True, window=2, pool=1, every=1)
    assert tokred.from_dict(policy.to_dict()) == policy
    where = site(prompt=(4,))
    assert policy.reduce(where).representative.flatten().tolist() == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"every": 0}, "every must be"),
        ({"importance": 1.5}, "importance must lie in"),
        ({"similar": 1.0}, r"similar must lie in \(-1, 1\), got 1.0"),
        ({"pool": 4}, "pool must be odd"),
        ({"budget": 7}, "a budget of 7 tokens cannot hold"),
    ],
)
def test_bad_input(given, text):
    with pytest.raises(ValueError, match=text):
        tokred.RKV(**given)


def test_rows_on_a_model():
    """Exactly the budget after each period; a prompt is cut at its first."""
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    model = tokred.apply(build("llama"), "rkv", budget=10, every=4, window=3)
    cache, held = tokred.kv_cache(model), []
    with torch.no_grad():
        model(prompt(20), past_key_values=cache)
        for g in range(9):
            model(prompt(1, seed=50 + g), past_key_values=cache)
            held.append({layer.held for layer in cache.layers})
            newest = cache.layers[0].positions
            assert newest is None or newest[0, 0, -3:].tolist() == [18 + g, 19 + g, 20 + g]
    assert held == [{21}, {22}, {23}, {10}, {11}, {12}, {13}, {10}, {11}]
