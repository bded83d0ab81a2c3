"""Samples of the sizes that people ask for, also those that no stride divides, and those at which nothing is done."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import FRAMES, MODELS, inputs, run

METHODS: dict[str, dict[str, Any]] = {
    "tomesd": {"ratio": 0.5, "max_downsample": 8, "merge_mlp": True},
    "todo": {"factors": (4, 2)},
}


@pytest.mark.parametrize("size", [(65, 65), (72, 40), (90, 90)])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_unet(name: str, size: tuple[int, int]):
    model = tokred.apply(MODELS["sd15"](), name, **METHODS[name])
    out = run(model, inputs("sd15", size, batch=1))
    assert out.shape[-2:] == size
    assert out.isfinite().all()
    rows = [row for row in tokred.report(model).sublayers if row.role == "self"]
    high, wide = -(-size[0] // 2), -(-size[1] // 2)
    assert {row.tokens for row in rows} == {size[0] * size[1], high * wide}
    if name == "todo":
        assert {row.left for row in rows} == {(size[0] // 4) * (size[1] // 4), (high // 2) * (wide // 2)}
    else:
        assert all(row.left == row.tokens - row.tokens // 2 for row in rows)


@pytest.mark.parametrize("kind", ["pixart", "flux", "wan", "hunyuan"])
@pytest.mark.parametrize("size", [(72, 40), (90, 90)])
def test_patches_of_two(kind: str, size: tuple[int, int]):
    """90 x 90 are 45 x 45 tokens, which no cell of 2 x 2 divides."""
    model, given = MODELS[kind](), inputs(kind, size, batch=1)
    n = size[0] * size[1] // 4 * (FRAMES if kind in ("wan", "hunyuan") else 1)
    for name, parameters in (("tomesd", {"max_downsample": 2}), ("todo", {"factors": (1, 2)})):
        tokred.apply(model, name, **parameters)
        assert run(model, given).isfinite().all()
        rows = [row for row in tokred.report(model).sublayers if row.role == "self"]
        assert {row.tokens for row in rows} == {n}
        assert all(row.left < n for row in rows)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_nothing_to_do_warns_once_and_the_report_shows_it(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    tokred.apply(model, "todo", factors=(2, 1))  # tokens are two rows of the sample high
    with pytest.warns(UserWarning, match=r"'todo' reduced nothing on .* at a sample of 16 x 16.*\(1, 2\)"):
        assert torch.equal(run(model, given), before)
    assert tokred.report(model).reduced == 0
    assert "reduced: 0 of" in str(tokred.report(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, given)


@pytest.mark.parametrize("kind", ["pixart", "flux", "wan"])
def test_cells_larger_than_the_grid(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    for name, parameters in (("tomesd", {"max_downsample": 2, "sy": 9}), ("todo", {"factors": (1, 9)})):
        tokred.apply(model, name, **parameters)
        with pytest.warns(UserWarning, match=f"'{name}' reduced nothing"):
            assert torch.equal(run(model, given), before)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_refused_before_anything_is_patched(kind: str):
    model = MODELS[kind]()
    classes = [type(m) for m in model.modules()]
    for ratio in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\)"):
            tokred.apply(model, "tomesd", ratio=ratio)
    with pytest.raises(TypeError, match="'tomesd' has no parameter 'factors'"):
        tokred.apply(model, "tomesd", factors=2)
    block = next(m for m in model.modules() if "TransformerBlock" in type(m).__name__)
    attention = next(m for name, m in block.named_modules() if name.startswith("attn"))
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(tokred.UnsupportedModelError, match="was replaced on the module itself"):
        tokred.apply(model, "tomesd")
    assert [type(m) for m in model.modules()] == classes
