"""The best rows, without sorting: the same as sorting, ties to the older row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.core.selection import ranked
from tokred.kv.select import kept_mask


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["equal", "samples", "heads"]), padded=st.booleans())
def test_the_best_rows_are_those_of_a_stable_sort(seed, kind, padded):
    g = torch.Generator().manual_seed(seed)
    b, h, n = 1 + seed % 3, 1 + seed % 2, 1 + seed % 11
    score = torch.randint(0, 4, (b, h, n), generator=g).float()
    real = torch.rand(b, 1 if seed % 2 else h, n, generator=g) > 0.3 if padded else None
    guard = torch.rand(1, 1, n, generator=g) > 0.7 if seed % 3 else None
    counts = torch.randint(0, n + 2, (b, h), generator=g)
    if kind != "heads":
        counts = tuple(counts[:, 0].tolist()) if kind == "samples" else (int(counts[0, 0]),) * b
    column = counts[:, :, None] if kind == "heads" else torch.tensor(counts)[:, None, None]

    told = score if guard is None else score.masked_fill(guard, torch.inf)
    told = told if real is None else told.masked_fill(~real, -torch.inf)
    order = ranked(told)
    first = (torch.arange(n) < column).expand_as(order)
    expected = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, first)
    expected = expected if real is None else expected & real
    assert torch.equal(kept_mask(score, real, guard, counts), expected)


def test_ties_go_to_the_older_row():
    score = torch.tensor([[[1.0, 2, 1, 2, 1, 0]]])
    assert kept_mask(score, None, None, (3,)).tolist() == [[[True, True, False, True, False, False]]]
    assert kept_mask(score, None, torch.arange(6)[None, None] > 4, (3,)).tolist() == [
        [[False, True, False, True, False, True]]
    ]
