"""ZeroMerge, row by row against its slots: which row goes where scores tie, and what takes its place."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.kv import CacheSite, Padding
from tokred.kv.fates import RESIDUAL, SLOT


def by_slots(scores, budget, tail, dense, gamma=1.0):
    """The card's algorithm on numbers alone: ``scores[t]`` what tokens receive at step ``t``; the tokens that stand.

    A slot is [newest member, score].
    """
    n = len(scores[0])
    first = list(scores[0])
    top = sorted(sorted(range(n - tail), key=lambda j: (-first[j], j))[: budget - tail - dense])
    rest = [j for j in range(n - tail) if j not in top]
    each, more = divmod(len(rest), dense)
    slots, start = [], 0
    for g in range(dense):
        stop = start + each + (g < more)
        slots.append([rest[stop - 1], max(first[j] for j in rest[start:stop])])
        start = stop
    slots += [[j, first[j]] for j in (*top, n - tail)]
    ring = [[j, first[j]] for j in range(n - tail + 1, n)]
    yield sorted(j for j, _ in slots + ring)
    for t, row in enumerate(scores[1:]):
        for slot in slots + ring:
            slot[1] = gamma * slot[1] + row[slot[0]]
        victim = min(range(dense, len(slots)), key=lambda i: (slots[i][1], i))
        # All keys are equal here, so the nearest dense slot is the lowest.
        slots[0] = [max(slots[0][0], slots[victim][0]), max(slots[0][1], slots[victim][1])]
        slots[victim] = ring.pop(0)
        ring.append([n + t, row[n + t]])
        yield sorted(j for j, _ in slots + ring)


@pytest.mark.parametrize("kind", ["constant", "ties", "spread"])
@pytest.mark.parametrize(("budget", "tail", "dense"), [(8, 3, 1), (9, 2, 2), (7, 3, 1)])
def test_the_tied_victim_is_in_the_lowest_slot(kind, budget, tail, dense):
    n, steps = 14, 12
    g = torch.Generator().manual_seed(budget)
    high = {"constant": 1, "ties": 3, "spread": 10**6}[kind]
    scores = [torch.randint(0, high, (n + t,), generator=g).float().tolist() for t in range(steps)]
    policy = tokred.make("zeromerge", budget=budget, tail=tail, dense=dense, gamma=1.0)
    keys, rows = torch.ones(1, 1, n, 2), {"mass": torch.tensor([[scores[0]]])}
    positions = torch.arange(n, dtype=torch.int32)[None, None]
    expected = by_slots(scores, budget, tail, dense)
    weights = None
    for t in range(steps):
        if t:
            keys = torch.ones(1, 1, keys.shape[2] + 1, 2)
            positions = torch.cat([positions, torch.full((1, 1, 1), n + t - 1, dtype=torch.int32)], 2)
            rows = {k: torch.nn.functional.pad(v, (0, 1)) for k, v in rows.items()}
            rows["mass"] = rows["mass"] + torch.tensor(scores[t])[positions.long()]
            weights = torch.nn.functional.pad(weights, (0, 1), value=1.0)
        site = CacheSite(k=keys, v=keys, positions=positions, seen=n + t, rows=rows, weights=weights)
        if not t:
            site.slots = None
        step = policy.shrink(site, rows["mass"], (budget,))
        into = torch.where(step.target < 0, step.slots, step.target)
        kept = torch.nn.functional.pad(positions.gather(2, step.representative), (0, 1))
        positions = kept.scatter_reduce(2, into, positions.gather(2, step.source), "amax")[..., :-1]
        rows = {k: step.merge(v.unsqueeze(-1), mode="max").squeeze(-1) for k, v in site.rows.items()}
        weights = step.sizes(weights)
        assert positions[0, 0].sort().values.tolist() == next(expected), t
        keys = keys[:, :, : step.slots]
        assert float(weights.sum()) == n + t
    assert {RESIDUAL, SLOT} <= rows.keys()


def test_without_slots_the_older_of_equal_rows_goes():
    k = torch.ones(1, 1, 7, 2)
    rows = {RESIDUAL: torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0]]])}
    positions = torch.tensor([[[1, 2, 5, 6, 7, 8, 9]]], dtype=torch.int32)
    site = CacheSite(k=k, v=k, positions=positions, seen=10, rows=rows, weights=torch.ones(1, 1, 7))
    policy = tokred.make("zeromerge", budget=6, tail=2, dense=1)
    step = policy.shrink(site, torch.tensor([[[9.0, 2, 1, 1, 3, 0, 0]]]), (6,))
    assert step.groups() == [[[0, 2], [1], [3], [4], [5], [6]]]


def test_samples_that_overflow_later_tie_alike():
    """A padded sample merges as it does alone, ties and all."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :2] = False
    k = torch.ones(2, 1, 9, 2)
    policy = tokred.make("zeromerge", budget=5, tail=2, dense=1)
    both = CacheSite(k=k, v=k, padding=Padding(mask))
    policy.shrink(both, torch.ones(2, 1, 9), (5, 5))
    alone = CacheSite(k=k[1:, :, 2:], v=k[1:, :, 2:])
    policy.shrink(alone, torch.ones(1, 1, 7), (5,))
    assert torch.equal(both.rows[SLOT][1, 0, 2:], alone.rows[SLOT][0, 0])
    assert torch.equal(both.rows[RESIDUAL][1, 0, 2:], alone.rows[RESIDUAL][0, 0])


def test_a_best_row_has_room():
    with pytest.raises(ValueError, match="must be at least 5"):
        tokred.make("zeromerge", budget=4, tail=3, dense=1)
    assert tokred.make("zeromerge", budget=5, tail=3, dense=1).tokens(40, layer=0, depth=2) == 5


@pytest.mark.parametrize("rows", [100, 1000, 70])
def test_shares_of_rows_have_no_surprises(rows):
    """int(0.29 * 100) is 28."""
    for share in (0.29, 0.57, 0.58):
        assert tokred.make("h2o", recent=share).guards(10**4, rows)[1] == round(share * rows * 100) // 100
