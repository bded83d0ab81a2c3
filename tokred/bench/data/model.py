"""The embedded default's architecture: a timm ``VisionTransformer`` with ViT-B/16's token geometry, but narrow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

MEAN, STD = 0.2860, 0.3530
MODEL: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "num_classes": 10,
}


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def build() -> nn.Module:
    """The model with random weights; needs timm.

    The patch embedding is four convolutions and a projection instead of one strided projection, and hands timm the same
    14 x 14 grid.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    class ConvPatchEmbed(PatchEmbed):  # type: ignore[misc]
        def __init__(self, embed_dim: int = 96, **kwargs: Any) -> None:
            super().__init__(embed_dim=embed_dim, **kwargs)
            self.stem = nn.Sequential(conv(1, 32), conv(32, 64, 2))
            self.res = nn.Sequential(conv(64, 64), conv(64, 64))
            self.proj = nn.Conv2d(64, embed_dim, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.proj(x + self.res(x)).flatten(2).transpose(1, 2)
            normed: Tensor = self.norm(x)
            return normed

    model: nn.Module = VisionTransformer(embed_layer=ConvPatchEmbed, **MODEL)
    return model
