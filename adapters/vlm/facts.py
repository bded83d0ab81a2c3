"""What differs between the models with vision, as data: where tower and projector are, and how tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from tokred.adapters.vlm.features import Part, Picture, Record, Tap


class Facts(NamedTuple):
    """One family.

    Attributes:
        projector: dotted name of the projector, whose input is the tower's features; "" where it is part of the tower.
        tower: dotted name of the vision tower.
        language: dotted name of the language model.
        getters: feature getters, with the modality that each is for.
        pictures: makes the pictures of a getter's call, ``pictures(core, arguments, output, tap)``.
        tokenwise: whether the projector acts on tokens one by one.
        outer_masks: masks for pairs of tokens are made outside the language model.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    getters: tuple[tuple[str, str], ...] = (("get_image_features", "image"),)
    pictures: Callable[[Any, dict[str, Any], Any, Tap], list[Picture]] | None = None
    tokenwise: bool = True
    outer_masks: bool = False


def lengths(output: Any) -> list[int]:
    """Tokens of each picture."""
    return [len(one) for one in output.pooler_output]


def plain(core: Any, given: dict[str, Any], output: Any, tap: Tap) -> list[Picture]:
    """Pictures of one part each, on the grid of the tower's patches where the numbers agree."""
    pixels = given.get("pixel_values")
    patch = int(getattr(core.config.vision_config, "patch_size", 0) or 0)
    counts, found = lengths(output), []
    for i, n in enumerate(counts):
        grid = None
        if pixels is not None and patch and pixels.ndim >= 4:
            rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
            grid = (rows, columns) if rows * columns == n else square(n)
        fits = tap.inputs is not None and tap.inputs.shape[0] == len(counts) and tap.inputs.shape[1] == n
        found.append(Picture(n, (Part(0, n, grid, tower=i if fits else -1),)))
    return found


def square(n: int) -> tuple[int, int] | None:
    """The square grid of ``n`` tokens, if there is one."""
    side = round(n**0.5)
    return (side, side) if side * side == n else None


FACTS: dict[str, Facts] = {
    "LlavaModel": Facts(),
}


def describe(core: Any, given: dict[str, Any], output: Any, tap: Tap) -> Record | None:
    """The record of a getter's call."""
    facts = FACTS[core_name(core)]
    make = facts.pictures or plain
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


def tower_attention(layer: Any) -> Any:
    """The attention of a tower layer with separate projections; None where it has none."""
    for name in ("self_attn", "attention", "attn"):
        found = getattr(layer, name, None)
        if found is not None and all(hasattr(found, n) for n in ("q_proj", "k_proj")):
            return found
    return None
