"""Flux: its grid is read from the ids of places, and one image is told from several."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.diffusion.tiny import MODELS, inputs, run


def places(high: int, wide: int, *, image: int = 0, top: int = 0, left: int = 0) -> torch.Tensor:
    """Ids of one image, row by row."""
    ids = torch.zeros(high, wide, 3)
    ids[..., 0], ids[..., 1], ids[..., 2] = image, top + torch.arange(high).unsqueeze(1), left + torch.arange(wide)
    return ids.view(-1, 3)


@pytest.mark.parametrize("apart", [0, 1])
def test_flux_with_reference_images(apart: int):
    """Two images whose tokens are as many as one larger image's; and one image, wherever it begins."""
    model, given = MODELS["flux"](), inputs("flux", (32, 32))
    both = torch.cat([places(16, 8), places(8, 16, image=apart)])
    before = run(model, {**given, "img_ids": both})
    tokred.apply(model, "tomesd", max_downsample=2, ratio=0.5)
    with pytest.raises(tokred.UnsupportedModelError, match="256 tokens stand on a grid of 16 x 16 places"):
        run(model, {**given, "img_ids": both})
    beside = torch.cat([places(16, 8), places(16, 8, left=8)])  # all places of a grid, in another order
    with pytest.raises(tokred.UnsupportedModelError, match="not row by row"):
        run(model, {**given, "img_ids": beside})
    out = run(model, {**given, "img_ids": places(8, 32, image=apart, top=5, left=900)})
    assert {(row.tokens, row.left) for row in tokred.report(model).sublayers if row.role == "self"} == {(256, 128)}
    assert out.shape == before.shape


def test_ids_of_flux_are_read_again_where_they_changed():
    model, given = MODELS["flux"](), inputs("flux", (32, 32))
    tokred.apply(model, "todo", factors=(1, 2))
    run(model, given)
    given["img_ids"].copy_(torch.cat([places(16, 8), places(8, 16)]))
    with pytest.raises(tokred.UnsupportedModelError, match="several images in one sequence"):
        run(model, given)
    with torch.inference_mode():
        ids = places(8, 32)
        model(**{**given, "img_ids": ids})
    assert {row.left for row in tokred.report(model).sublayers if row.role == "self"} == {64}
