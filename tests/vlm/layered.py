"""Sites inside a language model, made by hand, for methods at the stage ``layer``."""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.core.attention import Attention
from tokred.vlm import LayerSite
from tokred.vlm.in_llm import Prompt

# Columns of the samples: padding, text, visual, text; right-aligned, visual counts 12, 12 and 7.
LAYOUT = ["ttvvvvvvvvvvvvttt", "-tvvvvvvvvvvvvttt", "----tttvvvvvvvttt"]


def layout(rows: list[str]) -> tuple[Tensor, Tensor]:
    """``(B, L)`` bool: visual, and real."""
    visual = torch.tensor([[c == "v" for c in row] for row in rows])
    return visual, torch.tensor([[c != "-" for c in row] for row in rows])


def layer_site(
    rows: list[str] | None = None, *, layer: int = 3, depth: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LayerSite:
    """A site that supplies everything; a sample's values depend on its own row alone, and not on its padding."""
    rows = LAYOUT if rows is None else rows
    visual, real = layout(rows)
    length = len(rows[0])
    values = []
    for row in rows:
        g = torch.Generator().manual_seed(seed + sum(map(ord, row.strip("-"))))
        own = torch.randn(len(row.strip("-")), 64, generator=g)
        values.append(torch.cat([torch.zeros(length - len(own), 64), own]))
    stack = torch.stack(values).to(dtype)
    x, normed, embeds = stack[..., :8], stack[..., 8:16], stack[..., 16:22]
    q = stack[..., 24:40].reshape(len(rows), length, 4, 4).transpose(1, 2)
    k = stack[..., 40:48].reshape(len(rows), length, 2, 4).transpose(1, 2)
    mask = None if bool(real.all()) else real
    columns = torch.arange(length).expand(len(rows), -1)
    return LayerSite(
        x=x,
        visual=visual,
        mask=mask,
        before=Attention(q, k, mask=mask, causal=True),
        own=Attention(q.flip(1), k.flip(1), mask=mask, causal=True),
        prompt=Prompt(embeds, visual, real & ~visual, columns),
        stream=(x.flip(-1), normed),
        layer=layer,
        depth=depth,
    )


def columns_kept(reduction: tokred.Reduction, sample: int) -> list[int]:
    """Columns that are left, counted from the right end, so that padding does not matter."""
    rows = reduction.representative[sample]
    rows = rows if reduction.mask is None else rows[reduction.mask[sample]]
    return [int(r) - reduction.length for r in rows]


def check_laws(method: tokred.Method, nothing: tokred.Method, layer: int) -> tokred.Reduction:
    """Text stays, visual tokens leave, samples do not see each other, and half precision works."""
    site = layer_site(layer=layer)
    assert nothing.reduce(layer_site(layer=layer)).trivial
    assert method.reduce(layer_site(layer=layer - 1 if layer > 1 else 31)).trivial
    found = method.reduce(site)
    assert torch.equal(found.representative, method.reduce(layer_site(layer=layer)).representative)
    assert found.slots < 17
    merged = found.merge(site.x)
    for i, row in enumerate(LAYOUT):
        kept = columns_kept(found, i)
        assert kept == sorted(kept)
        text = [j - 17 for j, c in enumerate(row) if c == "t"]
        assert set(text) <= set(kept)
        assert len([j for j in kept if row[j] == "v"]) < row.count("v") or method.name == "saint_layer"
        alone = method.reduce(layer_site([row.strip("-")], layer=layer))
        real = [j for j in kept if row[j] != "-"]
        assert columns_kept(alone, 0) == real
        own = merged[i] if found.mask is None else merged[i, found.mask[i]]
        values = alone.merge(layer_site([row.strip("-")], layer=layer).x)[0]
        torch.testing.assert_close(own[len(kept) - len(real) :], values)
        for slot, j in enumerate(kept):
            if row[j] == "t":
                assert torch.equal(own[slot], site.x[i, j])
    for dtype in (torch.float16, torch.bfloat16):
        half = layer_site(layer=layer, dtype=dtype)
        assert method.reduce(half).merge(half.x).isfinite().all()
    return found
