"""Families of models with vision, as data: where tower and projector are, and how visual tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from tokred.adapters.swap import host_class
from tokred.adapters.vlm.layout import (
    Picture,
    by_grid,
    by_map,
    by_sample,
    by_shape,
    by_size,
    closed_video,
    plain,
    tiled,
    video,
)
from tokred.adapters.vlm.taps import Record, Tap, pixels_of, received

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

# ``make(core, arguments, output, tap)``: the model with vision, the arguments of its getter, its output, and the taps'.
Maker = Callable[["PreTrainedModel", dict[str, Any], "Output", Tap], list[Picture]]


class Facts(NamedTuple):
    """One family of models with vision.

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
        clips: whether a video comes as images, a frame each, so that :func:`tokred.vlm.clips` tells which they are.
        sound: dotted name of the encoder of sound; "": it hears nothing.
        causal_type: the token type of tokens that see only what came before them.
        one_place: whether frames of videos stand at the places of images, as in GLM-4V.
        reader: dotted name of the decoder that attends to what the language model, an encoder then, makes of the
            prompt; "": the language model is a decoder itself.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    getters: tuple[tuple[str, str], ...] = (("get_image_features", "image"),)
    pictures: Mapping[str, Maker] | None = None
    tokenwise: bool = True
    heads: bool = True
    outer_masks: bool = False
    clips: bool = False
    causal_type: int = 0
    sound: str = ""
    one_place: bool = False
    reader: str = ""


_PLAIN: dict[str, Maker] = {"image": plain}
_BOTH = (("get_image_features", "image"), ("get_video_features", "video"))
_QWEN = Facts(projector="", tower="visual", getters=_BOTH, pictures={"image": by_grid, "video": by_grid}, heads=False)
_IDEFICS = Facts(
    "connector", "vision_model", "text_model", pictures={"image": by_sample}, tokenwise=False, heads=False, clips=True
)
_TILES: dict[str, Maker] = {"image": tiled, "video": video}

FACTS: dict[str, Facts] = {
    "LlavaModel": Facts(clips=True),
    "LlavaNextModel": Facts(pictures=_TILES),
    "LlavaNextVideoModel": Facts(getters=_BOTH, pictures=_TILES),
    "LlavaOnevisionModel": Facts(getters=_BOTH, pictures={"image": tiled, "video": closed_video}),
    "Qwen2VLModel": _QWEN,
    "Qwen2_5_VLModel": _QWEN,
    "Qwen3VLModel": _QWEN,
    "Qwen3VLMoeModel": _QWEN,
    "Qwen3_5Model": _QWEN,
    "Qwen3_5MoeModel": _QWEN,
    "Glm4vModel": _QWEN._replace(one_place=True),
    "Glm4vMoeModel": _QWEN._replace(one_place=True),
    "Qwen2_5OmniThinkerModel": _QWEN._replace(sound="audio_tower"),
    "InternVLModel": Facts(heads=False, clips=True),
    "Idefics3Model": _IDEFICS,
    "SmolVLMModel": _IDEFICS,
    "Lfm2VlModel": Facts(pictures={"image": by_shape}, tokenwise=False, heads=False),
    "Mistral3Model": Facts(pictures={"image": by_size}, tokenwise=False, heads=False, clips=True),
    "PaliGemmaModel": Facts(outer_masks=True, clips=True, causal_type=1),
    "Gemma3Model": Facts(tokenwise=False, outer_masks=True, heads=False, clips=True),
    "Florence2Model": Facts(
        language="language_model.encoder",
        reader="language_model.decoder",
        pictures={"image": by_map},
        tokenwise=False,
        heads=False,
    ),
}


class TowerLayer(NamedTuple):
    """Names of the parts of one kind of tower layer: norm, attention, norm, MLP, each added to the stream.

    Attributes:
        first, attention, second, mlp: modules of the layer.
        query, key, value, output: projections of the attention.
    """

    first: str = "layer_norm1"
    attention: str = "self_attn"
    second: str = "layer_norm2"
    mlp: str = "mlp"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "out_proj"


TOWER_LAYERS = {"SiglipEncoderLayer": TowerLayer(), "CLIPEncoderLayer": TowerLayer()}


def describe(core: PreTrainedModel, given: dict[str, Any], output: Output, tap: Tap, modality: str) -> Record | None:
    """The record of a getter's call."""
    facts = FACTS[core_name(core)]
    make = (facts.pictures or _PLAIN)[modality]
    if not facts.heads:
        record = Record(make(core, given, output, tap), tap.inputs)
        fused, grids = tap.fused, given.get(f"{modality}_grid_thw")
        if fused is not None and fused.projected is not None and grids is not None:
            record.received = lambda i: received(fused, core.visual, grids, i)
        patches = tap.pixels
        if patches is not None and grids is not None:
            record.pixels = lambda i: pixels_of(patches, core.visual, grids, i)
        return record
    # The attention of the layer whose output is used: LLaVA takes the last but one of CLIP's, so that the last has no
    # say in the features.
    layers = tower_layers(core, facts)
    depth = len(layers)
    layer = feature_layer(core, depth, given.get("vision_feature_layer"))
    attention = tower_attention(layers[layer]) if 0 <= layer < depth else None
    scale = getattr(attention, "scale", getattr(attention, "scaling", None))
    return Record(make(core, given, output, tap), tap.inputs, tap.heads, layer, depth, class_tokens(core, facts), scale)


def feature_layer(core: PreTrainedModel, depth: int, given: int | list[int] | None = None) -> int:
    """The tower's layer whose output is used, 0-based; the last of them where several are."""
    # Counted as hidden states are: 0 is the embeddings, 1 the output of the first layer, -1 that of the last.
    which = getattr(core.config, "vision_feature_layer", -1) if given is None else given
    which = which[-1] if isinstance(which, list | tuple) else which
    which = -1 if which is None else which
    return int(depth + which if which < 0 else which - 1)


def core_of(model: Any) -> nn.Module | None:
    """The model with vision in a model, which may be that itself; None where there is none."""
    for module in model.modules():
        if host_class(module).__name__ in FACTS:
            return module  # type: ignore[no-any-return]
    return None


def core_name(core: nn.Module) -> str:
    """Class name of a core model, patched or not."""
    return type(core).__name__


def class_tokens(core: PreTrainedModel, facts: Facts) -> int:
    """Class tokens before the tower's patches."""
    tower = part(core, facts.tower)
    return 1 if any("class_embedding" in n or "cls_token" in n for n, _ in tower.named_parameters()) else 0


def part(core: PreTrainedModel, name: str) -> Any:
    """A module inside by its dotted name."""
    return core.get_submodule(name)


def decoder_layers(model: nn.Module, attentions: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Names and modules of decoder layers: those with one of ``attentions``, and those beside them that have none."""
    inside = {id(child): (name, m) for name, m in model.named_modules() for child in m.children()}
    found = [inside[id(a)] for _, a in attentions if id(a) in inside]
    path = found[0][0].rpartition(".")[0] if found else ""
    beside = model.get_submodule(path)
    if not isinstance(beside, nn.ModuleList) or not {id(m) for _, m in found} <= {id(m) for m in beside}:
        return found
    return [(f"{path}.{i}" if path else str(i), layer) for i, layer in enumerate(beside)]


def tower_layers(core: PreTrainedModel, facts: Facts) -> list[nn.Module]:
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
