"""What differs between the models with vision, as data: where tower and projector are, and how tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from tokred.adapters.vlm.features import Picture, Record, Tap
from tokred.adapters.vlm.fused import received
from tokred.adapters.vlm.pictures import by_grid, by_sample, by_size, closed_video, plain, tiled, video

Maker = Callable[[Any, dict[str, Any], Any, Tap], list[Picture]]


class Facts(NamedTuple):
    """One family.

    Attributes:
        projector: dotted name of the projector, whose input is the tower's features; "" where it is part of the tower.
        tower: dotted name of the vision tower.
        language: dotted name of the language model.
        getters: feature getters, with the modality that each is for.
        pictures: by modality what makes the pictures of a getter's call, ``make(core, arguments, output, tap)``;
            None: images as they are.
        tokenwise: whether the projector acts on tokens one by one.
        heads: whether a token is a patch of the tower, so that the tower's attention says something about it.
        outer_masks: masks for pairs of tokens are made outside the language model.
        causal_type: the token type of tokens that see only what came before them.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    getters: tuple[tuple[str, str], ...] = (("get_image_features", "image"),)
    pictures: Mapping[str, Maker] | None = None
    tokenwise: bool = True
    heads: bool = True
    outer_masks: bool = False
    causal_type: int = 0


_PLAIN: dict[str, Maker] = {"image": plain}
_BOTH = (("get_image_features", "image"), ("get_video_features", "video"))
_QWEN = Facts(projector="", tower="visual", getters=_BOTH, pictures={"image": by_grid, "video": by_grid}, heads=False)
_IDEFICS = Facts("connector", "vision_model", "text_model", pictures={"image": by_sample}, tokenwise=False, heads=False)
_TILES: dict[str, Any] = {"image": tiled, "video": video}

FACTS: dict[str, Facts] = {
    "LlavaModel": Facts(),
    "LlavaNextModel": Facts(pictures=_TILES),
    "LlavaNextVideoModel": Facts(getters=_BOTH, pictures=_TILES),
    "LlavaOnevisionModel": Facts(getters=_BOTH, pictures={"image": tiled, "video": closed_video}),
    "Qwen2VLModel": _QWEN,
    "Qwen2_5_VLModel": _QWEN,
    "Qwen3VLModel": _QWEN,
    "InternVLModel": Facts(heads=False),
    "Idefics3Model": _IDEFICS,
    "SmolVLMModel": _IDEFICS,
    "Mistral3Model": Facts(pictures={"image": by_size}, tokenwise=False, heads=False),
    "PaliGemmaModel": Facts(outer_masks=True, causal_type=1),
    "Gemma3Model": Facts(tokenwise=False, outer_masks=True, heads=False),
}


def describe(core: Any, given: dict[str, Any], output: Any, tap: Tap, modality: str) -> Record | None:
    """The record of a getter's call."""
    facts = FACTS[core_name(core)]
    make = (facts.pictures or _PLAIN)[modality]
    if not facts.heads:
        record = Record(make(core, given, output, tap), tap.inputs)
        fused, grids = tap.fused, given.get(f"{modality}_grid_thw")
        if fused is not None and fused.projected is not None and grids is not None:
            record.received = lambda i: received(fused, core.visual, grids, i)
        return record
    layers = tower_layers(core, facts)
    depth = len(layers)
    layer = feature_layer(core, depth, given.get("vision_feature_layer"))
    attention = tower_attention(layers[layer]) if 0 <= layer < depth else None
    scale = getattr(attention, "scale", getattr(attention, "scaling", None))
    return Record(make(core, given, output, tap), tap.inputs, tap.heads, layer, depth, class_tokens(core, facts), scale)


def feature_layer(core: Any, depth: int, given: Any = None) -> int:
    """The tower's layer whose output is used, 0-based; the last of them where several are."""
    which = getattr(core.config, "vision_feature_layer", -1) if given is None else given
    which = which[-1] if isinstance(which, list | tuple) else which
    which = -1 if which is None else which
    return int(depth + which if which < 0 else which - 1)


def core_name(core: nn.Module) -> str:
    """Class name of a core model, patched or not."""
    return type(core).__name__


def class_tokens(core: Any, facts: Facts) -> int:
    """Class tokens before the tower's patches."""
    tower = part(core, facts.tower)
    return 1 if any("class_embedding" in n or "cls_token" in n for n, _ in tower.named_parameters()) else 0


def part(core: Any, name: str) -> Any:
    """A module inside by its dotted name."""
    return core.get_submodule(name)


def tower_layers(core: Any, facts: Facts) -> list[nn.Module]:
    """Layers of the vision tower, in order."""
    lists = [m for m in part(core, facts.tower).modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [m for m in lists if tower_attention(m[0]) is not None]
    return list(found[0]) if found else []


# Names of the projections to queries and keys; transformers 5.17 has the second ones in towers that are older.
_PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"))


def tower_attention(layer: Any) -> Any:
    """The attention of a tower layer with separate projections, which may stand inside a module with the projection
    behind it; None where it has none."""
    for name in ("self_attn", "attention", "attn"):
        found = getattr(layer, name, None)
        for one in (found, getattr(found, "attention", None)):
            if projections(one):
                return one
    return None


def projections(attention: Any) -> dict[str, nn.Module]:
    """The projections of a tower's attention to queries, "q", and keys, "k"; empty where it has none apart."""
    for names in _PROJECTIONS:
        found = {which: getattr(attention, n, None) for which, n in zip("qk", names, strict=True)}
        modules = {which: one for which, one in found.items() if isinstance(one, nn.Module)}
        if len(modules) == len(found):
            return modules
    return {}
