"""transformers: the table of packed towers, and of the models around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.contract.spelling import parameters
from tokred.adapters.encoder.host import EncoderHost, argument_names
from tokred.adapters.encoder.packed.host import PackedHost
from tokred.adapters.encoder.packed.layout import Folding
from tokred.adapters.encoder.packed.run import PackedRecipe
from tokred.adapters.encoder.transformers_tables import TOWERS
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError

# What the forwards of blocks use that are norm, attention, norm and MLP with a sum behind each, and no more.
_SPLIT = {"attn", "norm1", "norm2", "mlp"}


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


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of a packed tower, alone or in a known model; None where there is none.

    Raises:
        UnsupportedModelError: its blocks are composed otherwise than is known here.
    """
    path, layered = AROUND.get(host_class(model).__name__, ("", False))
    tower: Any = model
    for part in path.split(".") if path else ():
        tower = getattr(tower, part, None)
    name = "" if tower is None else host_class(tower).__name__
    return _host(name, tower, layered) if name in PACKED else None


def _host(name: str, tower: Any, layered: bool) -> EncoderHost:
    row, config = PACKED[name], words.CONFIG.need(tower)
    blocks = [(f"{row.layers}.{i}", block) for i, block in enumerate(tower.get_submodule(row.layers))]
    if not blocks:
        raise UnsupportedModelError(f"transformers' {name} has no blocks")
    windowed = words.WHOLE_BLOCKS.on(tower)
    cell = 1 if row.images or row.joint else int(words.JOINED.need(tower))
    side = int(words.SIDE.need(tower)) // cell // int(words.PATCH.need(tower)) if windowed else 0
    attention: Any = blocks[0][1].get_submodule(row.attention)
    heads = int(words.TOWER_HEADS.part(attention) or words.HEADS.need(config))
    recipe = PackedRecipe(
        _splits(blocks[0][1]),
        argument_names(blocks[0][1]),
        frozenset(words.DEEP_LAYERS.part(tower) or ()),
        frozenset(words.WHOLE_BLOCKS.need(tower)) if windowed else None,
        row.images,
        _Keys(heads, 3 if row.keys == "qkv" else 1),
    )
    # Rows and columns alone do not place the patches of a clip that is one sequence.
    supplies = {"x", "q", "k", "v"} | (set() if row.joint else {"grid"})
    return PackedHost(
        family=f"transformers {name}",
        model=tower,
        blocks=blocks,
        recipe=recipe,
        prefix=0,
        # Columns of windows say nothing about a frame, and masks of images are no bias of keys.
        supplies=frozenset(supplies if windowed or row.images else {*supplies, "attention"}),
        pooled=False,
        # What is behind joins rows by their places.
        full="all" if layered else ("none" if row.images else "last"),
        tokens=lambda shape: _rows(shape, int(words.PATCH.need(config)) if row.images else None),
        outside_macs=lambda shape: 0,
        key_norms=[block.get_submodule(f"{row.attention}.{row.keys}") for _, block in blocks],
        folding=Folding(cell, side, row.joint),
        entry=parameters(host_class(tower).forward)[1:],
        patch_side=int(words.PATCH.need(config)) if row.images else None,
    )


class _Keys:
    """Keys ``(M, H, D)`` of what a projection makes ``(M, parts * H * D)``; queries, keys and values, or keys alone.

    Args:
        heads: ``H``.
        parts: how many there are, of which keys are the second where they are not alone.
    """

    def __init__(self, heads: int, parts: int) -> None:
        self.heads, self.parts = heads, parts

    def __call__(self, made: Tensor) -> Tensor:
        rows = made.reshape(made.shape[-2], self.parts, self.heads, -1)
        return rows[:, self.parts // 2]


def _splits(block: Any) -> bool:
    """True for a block that is nothing but its four parts."""
    forward: Callable[..., Any] = inspect.unwrap(host_class(block).forward)
    return {*forward.__code__.co_names} == _SPLIT


def _rows(shape: tuple[int, ...], patch: int | None) -> int:
    """Rows that an input makes: of patches ``(S, F)`` one each; of images ``(B, C, H, W)`` those of one."""
    return int(shape[0]) if patch is None else (int(shape[-2]) // patch) * (int(shape[-1]) // patch)
