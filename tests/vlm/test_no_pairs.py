"""In a whole forward neither a method nor anything else of the patch makes a matrix of all pairs of visual tokens."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokred
from benchmarks.vlm import cost as vlm_cost
from tests.vlm import hosts, tiny
from tokred.vlm.tools.cluster import density_peaks

N = 4096  # visual tokens


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, storage counted."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.most = max(self.most, min(size, leaf.numel()))
        return out


def llava() -> Any:
    """A tiny one with 64 x 64 visual tokens."""
    torch.manual_seed(0)
    vision = t.CLIPVisionConfig(**{**tiny.VISION, "image_size": 256})
    text = t.LlamaConfig(**{**tiny.TEXT, "max_position_embeddings": 8192})
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE)
    return tiny.livelier(t.LlavaForConditionalGeneration(config)).eval()


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[3, 4, *[tiny.IMAGE] * N, 5, 6, 7]])
    pixels = torch.randn(1, 3, 256, 256, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


def made(name: str) -> tokred.Method:
    """The method, that leaves few tokens."""
    more = {"vispruner": {"step": 256}, "topv": {"iterations": 1}}.get(name, {})
    return tokred.make(name, **{**vlm_cost.METHODS[name](1 / 16, 4, 3).parameters, **more})


def most_of(model: Any, prompt: dict[str, Any], method: tokred.Method) -> int:
    """Elements of the largest tensor that the patch makes in a forward."""
    found = 0

    @contextlib.contextmanager
    def watched(part: str) -> Iterator[None]:
        nonlocal found
        with Largest() as seen:
            yield
        found = max(found, seen.most)

    with vlm_cost.around(watched), tokred.applied(model, method), torch.no_grad():
        model.model(**prompt)
        report = tokred.report(model)
    assert report.layers[-1].visual[0] < report.before // 2 + 2, "nothing left"
    assert found >= report.before, "nothing was seen"
    return found


def test_every_method_is_here():
    stages = {
        name: tokred.make(name) for name in tokred.list_methods() if tokred.make(name).stage in ("projector", "layer")
    }
    images = {n for n, m in stages.items() if getattr(m, "visual", True) and not getattr(m, "clips", False)}
    # Second stages of methods for clips, one that hears, and one that looks at pixels before there is a feature.
    others = {"dycoke_decode", "framefusion_layer", "prunevid_layer", "omnizip", "pixelprune_visual"}
    assert images - others == {*vlm_cost.METHODS}, "those of clips have nothing to do in an image"
    assert others < images


@pytest.mark.parametrize("name", vlm_cost.METHODS)
def test_no_matrix_of_all_pairs(name, model, prompt):
    most = most_of(model, prompt, made(name))
    assert most < N * N, f"{most} elements for {N} tokens"


def test_the_check_can_fail(model, prompt, monkeypatch):
    monkeypatch.setattr(importlib.import_module("tokred.methods.vlm.cdpruner"), "DENSE", N)
    assert most_of(model, prompt, made("cdpruner")) >= N * N


def test_attention_that_a_tower_of_merged_patches_receives():
    """Qwen's: 4 patches a token, so pairs of patches are 16 times as many."""
    model = hosts.build("qwen2_5_vl")
    side = 64
    count = side * side // 4
    ids = torch.tensor([[3, 95, *[98] * count, 96, 4]])
    prompt = {
        "input_ids": ids, "mm_token_type_ids": (ids == 98).long(), "image_grid_thw": torch.tensor([[1, side, side]]),
        "pixel_values": torch.randn(side * side, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    most = most_of(model, prompt, tokred.make("fastervlm", budget=64, attention="received"))
    assert most < (4 * count) ** 2


def test_clusters_of_many_tokens_are_found_in_blocks():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 4, generator=g)
    x[:, 30:34] = x[:, :4]  # ties
    whole, blocks = density_peaks(x, 7, 5), density_peaks(x, 7, 5, block=150)
    assert torch.equal(whole.centre, blocks.centre)
    assert torch.equal(whole.group, blocks.group)
    with Largest() as seen:
        density_peaks(x, 7, 5, block=150)
    assert seen.most < 60 * 60
