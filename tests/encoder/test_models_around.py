"""Towers in models around them that are neither a chat model nor an encoder alone: retrieval, captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tokred.adapters.tiny import vlm
from tokred.adapters.tiny.weights import livelier

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 8}


def reader() -> tuple[Any, dict[str, Any]]:
    """A captioner whose decoder reads what is left of 17 tokens."""
    encoder = transformers.ViTConfig(**SMALL, **PICTURE)
    decoder = transformers.TrOCRConfig(
        vocab_size=60, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        cross_attention_hidden_size=32, max_position_embeddings=32,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    given = {"pixel_values": pixels(2), "decoder_input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    return transformers.VisionEncoderDecoderModel(config), given


def aimv2() -> tuple[Any, dict[str, Any]]:
    config = transformers.Aimv2VisionConfig(**SMALL, **PICTURE, use_head=True)
    return transformers.Aimv2VisionModel(config), {"pixel_values": pixels(2)}


def retrieval(name: str, family: str) -> tuple[Any, dict[str, Any]]:
    """Embeddings of a page, one for each token."""
    inside = vlm.build(family).config
    config = getattr(transformers, f"{name}Config")(vlm_config=inside.to_dict(), embedding_dim=16)
    given = vlm.prompts(family, [[3, "image", 5]])
    if name == "ColQwen2":  # whose processor pads each page
        given["pixel_values"] = given["pixel_values"].unsqueeze(0)
    return getattr(transformers, f"{name}ForRetrieval")(config), given


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


KINDS = {
    "TrOCR": reader,
    "AIMv2": aimv2,
    "ColPali": lambda: retrieval("ColPali", "paligemma"),
    "ColQwen2": lambda: retrieval("ColQwen2", "qwen2_vl"),
}


def first(output: Any) -> torch.Tensor:
    """Logits, embeddings, or what a head made of all tokens."""
    found = next(getattr(output, n) for n in ("logits", "embeddings", "pooler_output") if hasattr(output, n))
    assert isinstance(found, torch.Tensor)
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["TrOCR", *(pytest.param(k, marks=pytest.mark.hosts) for k in [*KINDS][1:])])
def test_nothing_removed_is_the_model_and_tokens_leave(kind: str) -> None:
    torch.manual_seed(0)
    model, given = KINDS[kind]()
    model = livelier(model).eval()
    expected = first(model(**given))
    tokred.apply(model, "tome", r=0)
    assert torch.equal(first(model(**given)), expected)
    tokred.apply(model, "tome", r=2)
    reduced = first(model(**given))
    assert reduced.shape == expected.shape
    assert reduced.isfinite().all()
    assert not torch.equal(reduced, expected)
    layers = tokred.report(model).layers
    assert layers[-1].tokens_out < layers[0].tokens_in
    tokred.remove(model)
    assert torch.equal(first(model(**given)), expected)


def test_vmap_is_refused_and_gradients_of_single_samples_come_from_a_loop():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model = build("vit")
    x, weights = images(), {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one.unsqueeze(0),)).square().sum()

    with tokred.applied(model, "tome", r=2):
        with pytest.raises(tokred.UnsupportedModelError, match="loop"):
            torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
        found = torch.func.grad(loss)(weights, x[0])
    assert all(grad.isfinite().all() for grad in found.values())
    torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)  # and the patch is off
