"""Subclasses of hosts' models that read the tokens in a way of their own: they get as many as there were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def pooling() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    class Own(VisionTransformer):
        def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
            return x[:, 1:].mean(1)

    return Own(**SMALL)


def between() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    class Own(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self._pos_embed(self.patch_embed(x))
            means = []
            for block in self.blocks:
                x = block(x)
                means.append(x.mean(1))
            return torch.cat(means, 1)

    return Own(**SMALL)


def classifier() -> Any:
    import transformers

    class Own(transformers.ViTForImageClassification):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.vit(pixel_values=pixel_values).last_hidden_state[:, 1:].mean(1)

    return Own(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8,
        )
    )  # fmt: skip


def text() -> Any:
    import transformers

    class Own(transformers.BertForSequenceClassification):
        def forward(self, ids: Tensor) -> Tensor:
            return self.bert(ids).last_hidden_state.mean(1)

    return Own(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )


def tower() -> Any:
    from open_clip.transformer import VisionTransformer

    class Own(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self._embeds(x)
            return self.transformer(x)[:, 1:].mean(1)

    return Own(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)


@pytest.mark.parametrize("kind", [pooling, between, classifier, text, tower])
def test_an_average_of_ones_own_weighs_merged_tokens_by_their_size(kind: Any):
    torch.manual_seed(0)
    model = kind().eval()
    given = torch.randint(0, 50, (2, 17)) if kind is text else torch.randn(2, 3, 32, 32)
    outs = {}
    for expose in ("auto", "all", "none"):
        with torch.no_grad():
            outs[expose] = tokred.apply(model, "tome", r=4, expose=expose)(given)
    assert torch.equal(outs["auto"], outs["all"])
    assert not torch.allclose(outs["auto"], outs["none"]), "what the user asks for holds"


def test_a_subclass_that_changes_nothing_is_what_it_derives_from():
    from timm.models.vision_transformer import VisionTransformer

    class Same(VisionTransformer):
        def __init__(self) -> None:
            super().__init__(**SMALL)

    model = tokred.apply(Same().eval(), "tome", r=4)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[1] == 9
