"""``without_padding``: a plan of equal length on a batch of uneven counts."""

from __future__ import annotations

import torch

from tokred.core.matching import bipartite_soft_matching, without_padding


def test_padding_stays_padding():
    metric = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    plan = bipartite_soft_matching(metric, 3, prefix=1, mask=mask)
    assert without_padding(plan, None) is plan
    found = without_padding(plan, mask)
    assert found.mask is not None
    assert torch.equal(found.mask, mask.gather(1, plan.representative))
    assert torch.equal(found.index[0], plan.index[0])
    size = mask.float()
    assert torch.equal(found.sizes(size).sum(1), size.sum(1)), "no real token is lost, no padding is counted"
