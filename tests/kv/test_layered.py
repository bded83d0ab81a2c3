"""``Layered``: rows in given proportions, layer by layer."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred import kv

tiny = pytest.importorskip("tokred.adapters.tiny.kv")


def test_rows_are_in_proportion_and_add_up():
    budget = kv.Layered(0.5, (3, 1, 2, 2))
    assert [budget.share(40, None, layer, 4) for layer in range(4)] == [30, 10, 20, 20]
    assert kv.Layered(10, (1, 1, 1, 5)).share(40, None, 3, 4) == 25
    assert sum(kv.Layered(0.3, (1.0, 0.7, 0.1, 0.0)).share(37, None, layer, 4) for layer in range(4)) == int(
        37 * 4 * 0.3
    )


def test_what_does_not_fit_goes_to_the_others():
    """No layer holds more than there is, and none nothing."""
    assert [kv.Layered(0.5, (9, 1, 1, 1)).share(12, None, layer, 4) for layer in range(4)] == [12, 4, 4, 4]
    assert [kv.Layered(0.5, (1, 0, 0, 0)).share(12, None, layer, 4) for layer in range(4)] == [12, 4, 4, 4]
    assert min(kv.Layered(3, (1, 0, 1, 1)).share(12, None, layer, 4) for layer in range(4)) == 1


def test_without_weights_it_is_uniform():
    for n in (7, 40):
        assert [kv.Layered(0.5).share(n, None, i, 3) for i in range(3)] == [kv.Uniform(0.5).mean(n, None, 3)] * 3


def test_it_is_written_down_and_read_back():
    budget = kv.Layered(0.25, (2, 1))
    made = tokred.from_dict(tokred.make("snapkv", budget=budget, window=4).to_dict())
    assert made.budget == budget
    assert tokred.make("kv", budget=budget.to_dict()).budget == budget


@pytest.mark.parametrize(
    ("weights", "kind", "text"),
    [
        (3, TypeError, "one number for each layer"),
        ("ab", TypeError, "one number for each layer"),
        ((1, "a"), TypeError, r"weights\[1\] must be a number"),
        ((1, -1), ValueError, r"weights\[1\] must be at least 0"),
        ((1, float("nan")), ValueError, "finite"),
        ((0, 0), ValueError, "must not all be 0"),
    ],
)
def test_bad_weights(weights, kind, text):
    with pytest.raises(kind, match=text):
        kv.Layered(0.5, weights)


def test_a_cache_holds_what_it_says():
    model = tiny.build("llama")
    ids = torch.randint(3, 95, (2, 32), generator=torch.Generator().manual_seed(0))
    depth = len(model.model.layers)
    weights = tuple(range(1, depth + 1))
    with tokred.applied(model, "knorm", budget=kv.Layered(0.5, weights)), torch.inference_mode():
        model(ids, use_cache=True)
        rows = [layer.rows for layer in tokred.report(model).layers]
    assert rows == [kv.Layered(0.5, weights).share(32, None, layer, depth) for layer in range(depth)]
    with pytest.raises(ValueError, match=f"weights has 1 numbers, but {depth} layers"):
        tokred.apply(model, "knorm", budget=kv.Layered(0.5, (1,)))
