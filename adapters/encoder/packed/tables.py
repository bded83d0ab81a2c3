"""transformers: the table of packed towers, and of the models around them."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.adapters.encoder.transformers_tables import TOWERS

# What the forwards of blocks use that are norm, attention, norm and MLP with a sum behind each, and no more.
PARTS = {"attn", "norm1", "norm2", "mlp"}


@dataclass(frozen=True)
class Packed:
    """One tower.

    Attributes:
        layers: where its blocks are.
        attention: of a block.
        keys: sub-module of the attention that makes the keys, alone or with queries and values.
        images: whether it is given images, which a mask tells apart, and not patches.
        joint: whether all frames of a clip see each other; its rows stand in reading order.
    """

    layers: str = "blocks"
    attention: str = "attn"
    keys: str = "qkv"
    images: bool = False
    joint: bool = False

    @property
    def together(self) -> bool:
        """True if one module makes queries, keys and values."""
        return self.keys == "qkv"


_QWEN = Packed()
_PIXTRAL = Packed("transformer.layers", "attention", "k_proj", images=True)
PACKED: dict[str, Packed] = {
    "Qwen2VisionTransformerPretrainedModel": _QWEN,
    "Qwen2_5_VisionTransformerPretrainedModel": _QWEN,
    "Qwen3VLVisionModel": _QWEN,
    "Qwen3VLMoeVisionModel": _QWEN,
    "Qwen3_5VisionModel": _QWEN,
    "Qwen3_5MoeVisionModel": _QWEN,
    "Glm4vVisionModel": _QWEN,
    "Glm4vMoeVisionModel": _QWEN,
    "Kimi_K25VisionModel": Packed("layers", keys="k_proj", joint=True),
    "PixtralVisionModel": _PIXTRAL,
}
# Class of a model around a tower: where the tower is, and whether it reads the states of any layer.
_VISUAL = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "Glm4v", "Glm4vMoe")
AROUND: dict[str, tuple[str, bool]] = {
    **{f"{name}Model": ("visual", False) for name in _VISUAL},
    **{f"{name}ForConditionalGeneration": ("model.visual", False) for name in _VISUAL},
    **{f"{name}Model": ("vision_tower", True) for name in (*TOWERS, "Mistral3")},
    **{f"{name}ForConditionalGeneration": ("model.vision_tower", True) for name in (*TOWERS, "Mistral3")},
    "Kimi_K25Model": ("vision_tower", False),
    "Kimi_K25ForConditionalGeneration": ("model.vision_tower", False),
    "ColQwen2ForRetrieval": ("vlm.visual", False),
}
