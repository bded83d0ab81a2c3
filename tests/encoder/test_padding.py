"""Batches that are padded from the start: every sample is reduced as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tokred
from tokred.core.soft import SoftReduction
from tokred.encoder.method import BlockMethod
from tokred.encoder.padding import reduce_each

LENGTHS = (7, 4, 2)


def site(**more) -> tokred.Site:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 6, generator=g)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    q, k, v = (torch.randn(3, 2, 7, 3, generator=g) for _ in range(3))
    return tokred.Site(x=x, q=q, k=k, v=v, mask=mask, prefix=1, totals=torch.tensor(LENGTHS), **more)


def alone(whole: tokred.Site, i: int) -> tokred.Site:
    return whole.sample(i, torch.arange(LENGTHS[i]))


@pytest.mark.parametrize(
    "method", [tokred.ToMe(r=2), tokred.EViT(kappa=0.5, blocks=(0,)), tokred.RandomPrune(r=1), tokred.VoMix(r=0.5)]
)
def test_each_sample_is_as_if_alone(method):
    whole = site()
    step = reduce_each(method, whole)
    assert step.mask is not None
    y = step.merge(whole.x)
    for i, n in enumerate(LENGTHS):
        single = alone(whole, i)
        expected = method.reduce(single) if method.acts(n, tokred.Place(0, 1, 1)) else None
        real = y[i][step.mask[i]]
        torch.testing.assert_close(real, single.x[0] if expected is None else expected.merge(single.x)[0])
        rows = step.index[i]
        assert (rows[n:] == -1).all(), "padding goes nowhere"
    restored = step.unmerge(y, fill=whole.x)
    assert restored.shape == whole.x.shape


def test_nothing_to_remove_is_trivial():
    assert reduce_each(tokred.ToMe(r=0), site()).trivial


def test_what_soft_reductions_hand_out_stays_within_a_sample():
    step = reduce_each(tokred.VoMix(r=0.5), site())
    assert isinstance(step, SoftReduction)
    for i, share in enumerate(step.share):
        assert (share[~step.mask[i]] == 0).all()
        sums = share.sum(0)
        assert all(s == pytest.approx(0) or s == pytest.approx(1) for s in sums.tolist())


@dataclass(frozen=True)
class Counts(BlockMethod):
    """Notes what it saw, and drops the last token."""

    drops: ClassVar[bool] = True

    def tokens(self, n, place):
        return n - 1

    def reduce(self, site):
        n = site.shape[1]
        site.rows["seen"] = torch.arange(float(n))[None] + 10 * site.length
        site.notes["tokens"] = torch.tensor([n])
        site.alive = torch.tensor([[True, n > 3]])
        return tokred.Reduction.keep(torch.arange(n - 1)[None], n)


def test_state_of_each_sample_is_that_of_the_batch():
    whole = site()
    step = reduce_each(Counts(), whole)
    assert step.mask.sum(1).tolist() == [6, 3, 1]
    assert whole.notes["tokens"].tolist() == list(LENGTHS)
    assert whole.alive.tolist() == [[True, True], [True, True], [True, False]]
    assert whole.rows["seen"][1].tolist() == [40, 41, 42, 43, 0, 0, 0]


def test_a_sample_hands_on_all_that_a_site_has():
    whole = site(
        class_attention=torch.rand(3, 2, 7), bias=torch.rand(3, 7), sizes=torch.rand(3, 7),
        answers=torch.rand(3, 2, 7, 3),
        transform=(torch.rand(3, 7, 6), torch.rand(3, 7, 6)), rows={"a": torch.rand(3, 7)}, notes={"b": torch.rand(3)},
        alive=torch.ones(3, 2, dtype=torch.bool), positions=torch.arange(7).expand(3, -1), length=9, layer=1, depth=4,
    )  # fmt: skip
    part = whole.sample(1, torch.tensor([0, 2, 3]))
    assert part.shape == (1, 3)
    assert torch.equal(part.q, whole.q[1:2, :, [0, 2, 3]])
    assert torch.equal(part.answers, whole.answers[1:2, :, [0, 2, 3]])
    assert torch.equal(part.class_attention, whole.class_attention[1:2][:, [0, 2, 3]])
    assert torch.equal(part.transform[1], whole.transform[1][1:2, [0, 2, 3]])
    assert torch.equal(part.sizes, whole.sizes[1:2, [0, 2, 3]])
    assert part.positions.tolist() == [[0, 2, 3]]
    assert part.moved
    assert part.length == LENGTHS[1]
    assert part.mask is None
    assert (part.prefix, part.layer, part.depth) == (1, 1, 4)
