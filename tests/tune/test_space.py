"""Shapes, and the model of time: what is drawn adds up, and what is predicted is what was measured."""

from __future__ import annotations

import random

import pytest
import torch

import tokred
from tokred.kv import Adaptive, Global, Layered
from tokred.tuning.layers import groups, restored, shared
from tokred.tuning.samplers import Chance
from tokred.tuning.space import SHARES, Plan, amounts, base_of, constant_amounts, setting_of, spaced
from tokred.tuning.speed import nonnegative

DEPTH, FREE = 12, 196


def test_amounts_add_up_and_no_block_removes_more_than_half():
    rng = random.Random(0)
    for _ in range(200):
        weights = [rng.random() * (rng.random() < 0.6) for _ in range(DEPTH)]
        weights[rng.randrange(DEPTH)] += 0.1
        plan = tuple(w / sum(weights) for w in weights)
        total = rng.randrange(FREE)
        found, left = amounts(plan, total, FREE), FREE
        for r, w in zip(found, plan, strict=True):
            assert 0 <= r <= left // 2
            assert w > 0 or r == 0
            left -= r
        assert sum(found) <= total
    assert amounts((0.25,) * 4, 40, FREE) == [10] * 4
    assert amounts((0.5, 0.0, 0.5, 0.0), 190, FREE) == [95, 0, 50, 0]  # half of what was left
    assert constant_amounts(45, 5, FREE) == [45, 45, 45, 30, 15]


def test_every_drawn_shape_is_a_method():
    for text in ("tome", "tofu", "evit", "pitome", "downsample", "random_prune", "snapkv window=4", "knorm"):
        base, dice = base_of(text, DEPTH, FREE), Chance(0)
        plans = [base.constant, *base.known(), *(base.draw(dice) for _ in range(20))]
        assert base.constant.constant
        for plan in plans:
            for step in (1, plan.steps // 2, plan.steps):
                method = plan.at(step)
                method.check(DEPTH)
                assert tokred.from_dict(method.to_dict()) == method
            for near in list(plan.moves(plan.steps // 2))[:10]:
                near.at(3)  # refuses what is no setting


def test_more_steps_remove_more():
    from tokred.core.place import Place

    for text in ("tome", "evit", "pitome", "downsample", "ppt"):
        base = base_of(text, DEPTH, FREE)
        for plan in (base.constant, *base.known()):
            counts = []
            for step in range(1, plan.steps + 1, max(1, plan.steps // 8)):
                n, method = FREE + 1, plan.at(step)
                for layer in range(DEPTH):
                    n = method.tokens(n, Place(layer, DEPTH, 1))
                counts.append(n)
            assert counts == sorted(counts, reverse=True), text


def test_budgets_of_caches():
    base = base_of("snapkv window=4", 4, 0)
    plan = Plan(base, (0.4, 0.3, 0.2, 0.1))
    assert plan.at(SHARES // 2).budget == Layered(0.5, (0.4, 0.3, 0.2, 0.1))
    adaptive = Plan(base, plan.weights, (("heads", "adaptive"),)).at(SHARES * 3 // 4).budget
    assert isinstance(adaptive, Adaptive)
    assert adaptive.layers == Layered(0.25, plan.weights)
    assert base.heads("global").at(SHARES // 2).budget == Global(0.5)


def test_shapes_that_are_too_slow_are_bent_forward():
    plan = spaced(base_of("tome", DEPTH, FREE), 3, 9, 3, 0.5)
    firsts = [amounts(p.weights, 150, FREE)[0] for p in plan.earlier()]
    assert firsts[1::2] == sorted(firsts[1::2])
    assert max(firsts) > 0
    assert not list(base_of("evit", DEPTH, FREE).constant.earlier())


def test_a_setting_is_typed_as_a_user_types_it():
    assert setting_of(tokred.make("tome", r=[8, 4, 0], metric="x")) == "r=[8,4,0] metric=x"
    assert setting_of(tokred.make("tome", r=13)) == "r=13"


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_without_negative_parts(seed):
    g = torch.Generator().manual_seed(seed)
    true = [0.2, 0.0, 0.5, 0.1]
    rows = torch.rand(12, 4, generator=g, dtype=torch.float64)
    wanted = (rows @ torch.tensor(true, dtype=torch.float64)).tolist()
    found = nonnegative(rows.tolist(), wanted, [0.25] * 4, 1e-9)
    assert found == pytest.approx(true, abs=1e-3)
    wanted = [-1.0] * 12
    assert min(nonnegative(rows.tolist(), wanted, [0.25] * 4, 1e-9)) >= 0


def test_layers_are_asked_singly_or_with_their_neighbours():
    assert groups(4, 9) == [range(i, i + 1) for i in range(4)]
    assert groups(5, 2) == [range(2), range(2, 5)]


def test_a_restored_layer_keeps_everything_and_the_others_what_they_had():
    plan, step = restored(Plan(base_of("knorm", 4, 0)), SHARES * 3 // 4, [2])
    share, total = 1 - step / SHARES, sum(plan.weights)
    rows = [share * 4 * w / total for w in plan.weights]
    assert rows == pytest.approx([0.25, 0.25, 1.0, 0.25], abs=0.02)


def test_rows_go_where_they_gain():
    plans = list(shared(Plan(base_of("knorm", 4, 0)), [0.0, 3.0, -1.0, 1.0]))
    assert len(plans) == 4
    for plan in plans:
        a, b, c, d = plan.weights
        assert b > d > a == c > 0
        assert sum(plan.weights) == pytest.approx(1)
    assert not list(shared(Plan(base_of("knorm", 4, 0)), [-1.0, 0.0, -0.5, 0.0]))
