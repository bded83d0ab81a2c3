"""Sites of visual tokens with the attention of a small tower, for methods at the stage ``projector``."""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.vlm import VisualSite


def visual(
    b: int = 2, grid: tuple[int, int] = (6, 6), *, c: int = 12, tower: int = 8, classes: int = 1, seed: int = 0
) -> VisualSite:
    """A site that supplies everything, with random values."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    heads = torch.randn(4, 2, b, 2, classes + n, 4, generator=g).unbind(0)
    q, k = heads[2]
    return VisualSite(
        x=torch.randn(b, n, c, generator=g),
        tower=torch.randn(b, n, tower, generator=g),
        q=q,
        k=k,
        prefix=classes,
        layer_heads=lambda layer: (heads[layer][0], heads[layer][1]),
        grid=grid,
        text=torch.randn(b, 5, c, generator=g),
        text_mask=torch.ones(b, 5, dtype=torch.bool),
    )


def single(site: VisualSite, i: int, dtype: torch.dtype = torch.float32) -> VisualSite:
    """One sample of a site made by :func:`visual`, alone."""

    def cut(t: Tensor) -> Tensor:
        return t[i : i + 1].to(dtype)

    return VisualSite(
        x=cut(site.x),
        tower=cut(site.tower),
        q=cut(site.q),
        k=cut(site.k),
        prefix=site.prefix,
        layer_heads=lambda layer: tuple(cut(t) for t in site.layer_heads(layer)),
        grid=site.grid,
        text=cut(site.text),
        text_mask=site.text_mask[i : i + 1],
    )


def kept(reduction: tokred.Reduction, sample: int = 0) -> list[int]:
    """What stands for the real slots of one sample."""
    rows = reduction.representative[sample]
    return (rows if reduction.mask is None else rows[reduction.mask[sample]]).tolist()


def check_laws(method: tokred.Method, nothing: tokred.Method, *, seed: int = 0) -> None:
    """Deterministic, no look at batch-mates, finite in half precision; nothing to remove is the identity."""
    site = visual(3, seed=seed)
    assert nothing.reduce(site).trivial
    found = method.reduce(site)
    again = method.reduce(visual(3, seed=seed))
    assert torch.equal(found.representative, again.representative)
    assert torch.equal(found.index, again.index)
    assert found.slots < site.shape[1]
    x = found.merge(site.x)
    for i in range(3):
        alone = method.reduce(single(site, i))
        assert kept(alone) == kept(found, i)
        real = torch.ones(found.slots).bool() if found.mask is None else found.mask[i]
        mine = torch.ones(alone.slots).bool() if alone.mask is None else alone.mask[0]
        torch.testing.assert_close(alone.merge(site.x[i : i + 1])[0, mine], x[i, real])
    for dtype in (torch.float16, torch.bfloat16):
        half = single(site, 0, dtype)
        merged = method.reduce(half).merge(half.x)
        assert merged.dtype == dtype
        assert merged.isfinite().all()
