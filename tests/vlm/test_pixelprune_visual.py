"""PixelPrune before the language model: what leaves the prompt is what was left out of the tower; positions stay."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm import hosts, oracle
from tokred.vlm import VisualSite

OTHERS = ("qwen2_vl", "qwen3_vl")
QWEN = ("qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.hosts) for name in OTHERS))


def pages(name):
    """A batch of two prompts; the first image has a blank upper half."""
    batch = hosts.prompts(name, [[3, "image", 5], [2, "image", 4]])
    batch["pixel_values"][:32] = 0.5
    return batch


@pytest.mark.parametrize("name", QWEN)
def test_dropping_equals_masking(name):
    model = hosts.build(name)
    oracle.agree(model, hosts.layers(name, model), tokred.PixelPruneVisual(), pages(name), max_new_tokens=3)


@pytest.mark.parametrize("name", QWEN)
def test_tower_and_prompt_together(name):
    model, batch = hosts.build(name), hosts.prompts(name, [[3, "image", 5]])
    noise = dict(batch, pixel_values=batch["pixel_values"].clone())
    batch["pixel_values"][:32] = 0.5
    with torch.no_grad():
        plain, same = model(**batch).logits, model(**noise).logits
        tokred.apply(model, [tokred.PixelPrune(), tokred.PixelPruneVisual()])
        found = model(**batch).logits
        # Eight of sixteen cells are blank, of which one stays.
        assert plain.shape[1] - found.shape[1] == 7
        assert "64 -> 36" in str(tokred.report(model))
        assert torch.equal(model(**noise).logits, same), "no two cells alike: bit for bit"
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        tokred.remove(model)
        assert torch.equal(model(**batch).logits, plain)


def test_text_goes_on_where_it_would():
    """A white image of 4 x 4 tokens at base b: the text behind it stands at b + 4."""
    model, batch = hosts.build("qwen2_5_vl"), hosts.prompts("qwen2_5_vl", [[3, "image", 5]])
    batch["pixel_values"][:] = 1.0
    seen = []
    language = model.model.language_model
    tokred.apply(model, "pixelprune_visual")
    handle = language.rotary_emb.register_forward_pre_hook(
        lambda m, args, kw: seen.append([*args, *kw.values()][1]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    # Three words and a mark, one cell of sixteen, a mark and five words.
    axes = seen[0][-3:, 0]
    assert axes.shape[1] == 4 + 1 + 6
    assert axes[0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13]


def test_a_site_by_hand():
    drawing = torch.tensor([[float(c) for c in row] for row in ("00077", "00077", "05577", "05555")])
    site = VisualSite(x=torch.zeros(1, 20, 4), grid=(4, 5), pixels=drawing.view(1, 20, 1))
    assert tokred.PixelPruneVisual().reduce(site).representative.tolist() == [[0, 3, 11, 13, 18]]
    clip = torch.zeros(1, 3, 2, 3)
    clip[:, :, 0, 2], clip[:, 1:, 1, 1], clip[:, 2, 0, 0] = 4, 9, 3
    site = VisualSite(x=torch.zeros(1, 18, 4), grid=(2, 3), frames=3, pixels=clip.view(1, 18, 1))
    assert tokred.PixelPruneVisual(std=1.0).reduce(site).representative.tolist() == [[0, 2, 5, 10, 12]]


def test_where_there_are_no_patches():
    with pytest.raises(tokred.MissingInputError, match="pixels"):
        tokred.apply(hosts.build("llava"), "pixelprune_visual")
    with pytest.raises(ValueError, match="tau must lie"):
        tokred.PixelPruneVisual(tau=1)
