"""The embedded default's architecture: a timm ``VisionTransformer`` with ViT-B/16's token geometry, but narrow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Of all three channels.
MEAN, STD = 0.40, 0.27
SIZE, PATCH = 112, 8
MODEL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "in_chans": 3,
    "embed_dim": 96,
    "depth": 8,
    "num_heads": 3,
    "num_classes": 10,
}


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def build() -> nn.Module:
    """The model with random weights; needs timm.

    The patch embedding is three convolutions of stride 2 and a projection. A token sees 15 pixels across, about twice
    its own patch and a quarter of a garment: no single token knows the answer.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    class ConvPatchEmbed(PatchEmbed):  # type: ignore[misc]
        def __init__(self, embed_dim: int = 96, **kwargs: Any) -> None:
            super().__init__(embed_dim=embed_dim, **kwargs)
            self.stem = nn.Sequential(conv(3, 24, 2), conv(24, 48, 2), conv(48, 96, 2))
            self.proj = nn.Conv2d(96, embed_dim, 1)

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.norm(self.proj(self.stem(x)).flatten(2).transpose(1, 2))
            return normed

    model: nn.Module = VisionTransformer(embed_layer=ConvPatchEmbed, **MODEL)
    return model
