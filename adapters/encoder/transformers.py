"""transformers: encoders of images, sound and text, alone or in the models around them that are known to take fewer
tokens.

Every encoder is one row of ``ENCODERS``, every model around an encoder one row of ``HEADS`` (transformers_tables); a
few that are composed in another way stand in transformers_maps, those of text in transformers_text. A model in none of
them is refused, also when an encoder of the table is inside it: language models with vision, for instance, count and
place their encoder's tokens, and would go wrong without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokred.adapters.contract import attention_of, members, terms, words
from tokred.adapters.encoder import transformers_maps, transformers_text
from tokred.adapters.encoder.block import Recipe, refuse_padding
from tokred.adapters.encoder.host import EncoderHost, argument_names, rewritten
from tokred.adapters.encoder.packed import transformers as packed
from tokred.adapters.encoder.sides import convolution, films, of_convolution
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.encoder.text_tables import ENCODERS as TEXTS
from tokred.adapters.encoder.transformers_tables import DEMANDS, ENCODERS, HEADS, Encoder
from tokred.adapters.linear import macs
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError

GRID = "it works on maps of a fixed grid between its stages"
WINDOWED = "its attention runs in windows on a grid, which dropping tokens would break"
# By the start of the class name.
REFUSED = {
    "Swin": WINDOWED,
    "DonutSwin": WINDOWED,
    "MaskFormerSwin": WINDOWED,
    "Sam2": "it pools tokens of a fixed grid between its stages",
    "Sam3": "its attention in windows turns positions of a fixed grid into angles",
    "Blip": "its attention is written out by hand, so sizes could not reach it",
    "Hiera": "it pools mask units of a fixed grid between its stages",
    "Segformer": GRID,
    "Pvt": GRID,
    "Cvt": GRID,
    "Levit": GRID,
    "MobileViT": GRID,
    "ConvNext": "it is a convolutional network without tokens",
    "ResNet": "it is a convolutional network without tokens",
    "Albert": "its layers are one module that runs several times, whose place in the depth a patch could not tell",
    "MllamaVision": (
        "its tiles stand in one sequence, each with a class token and padding inside, and several of its layers are "
        "read at full length: give it smaller images (fewer tiles)"
    ),
    "VJEPA2": "each layer turns token numbers into rotary angles itself, so missing tokens would shift positions",
}
# Trained on a part of the patches of each clip, always.
MASKED = "VideoMAEForPreTraining"
INSTEAD = "apply a method for visual tokens, such as 'divprune', to the whole model"
TOWER = (
    "it is the vision tower of a model with vision, and not among the encoders that are known to be right with fewer "
    f"tokens: {INSTEAD}"
)
# Towers whose configuration does not say that they are one.
TOWERS = ("PixtralVisionModel",)
NO_FAMILY = "it is not among the encoders, or the models around one, that are known to be right with fewer tokens"
LANGUAGE = (
    "it counts and places the tokens of its vision encoder in a text, which fewer tokens would break without an error; "
    "language models with vision need methods of another stage"
)
CAUSAL = (
    "each of its tokens attends to those before it, and the last ones speak for all: methods of the cache suit "
    "language models"
)


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of a transformers encoder, alone or in a known model; None when ``model`` is no such model.

    Raises:
        UnsupportedModelError: ``model`` is a transformers model that cannot be reduced rightly; the message says why.
    """
    names = _names(model)
    if not terms.PRETRAINED.among(names) or any(n.startswith("Timm") for n in names):
        return None  # a layer, or a wrapper around a timm model, which the timm adapter finds inside
    located = _locate(model)
    if located is None:
        host = packed.match(model)
        if host is not None:
            _check_fused(host.model, host.blocks)
            return host
        host = transformers_maps.match(model) or transformers_text.match(model)
        if host is not None:
            return host
        raise UnsupportedModelError(
            f"transformers' {names[0]} cannot run with fewer tokens here: {_reason(model, names)}"
        )
    return _host(model, *located)


def _names(module: nn.Module) -> list[str]:
    """Class names of a module of transformers, its own and those it derives from."""
    mro = host_class(module).__mro__
    return [c.__name__ for c in mro] if any(c.__module__.startswith("transformers.") for c in mro) else []


def _locate(model: Any) -> tuple[str, Any, str] | None:
    """Name of the encoder class, the encoder, and the strongest demand on its tokens."""
    names = _names(model)
    head = next((n for n in names if n in HEADS), None)
    path, demand = HEADS[head] if head is not None else ("", "short")
    encoder = model if not path else _get(model, path)
    name = next((n for n in _names(encoder) if n in ENCODERS), None) if encoder is not None else None
    if name is None:
        # Backbones return maps of full length, so whatever is built around one notices nothing.
        known = ENCODERS.keys() | HEADS.keys()
        inner = [m for m in model.modules() for n in _names(m)[:1] if n in known and n.endswith("Backbone")]
        return _locate(inner[0]) if len(inner) == 1 and inner[0] is not model else None
    demands = [_ask(demand, model), _ask(ENCODERS[name].demand, encoder)]
    return name, encoder, max(demands, key=DEMANDS.index)


def _get(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part, None)
    return model


def _ask(value: Any, model: Any) -> Any:
    return value(model) if callable(value) else value


def _reason(model: Any, names: list[str]) -> str:
    """Why it is refused: what it is known for, what it does with its tokens, or only that it is not known."""
    reason = next((r for n in names for start, r in REFUSED.items() if n.startswith(start)), None)
    if reason is not None:
        return reason
    config = words.CONFIG.need(model)
    if words.TEXT.on(config) and (members.GENERATE.on(model) or members.LANGUAGE.on(model)):
        return LANGUAGE
    side = words.JOINED.part(config)
    if side is not None and side > 1:
        windows = ", and some of its blocks attend in windows" if words.WHOLE_BLOCKS.part(config) else ""
        joined = (
            f"behind its blocks {side} x {side} patches that stand side by side are joined{windows}: no patch may leave"
        )
        return f"it is the vision tower of a model with vision; {joined}; {INSTEAD}" if is_tower(model) else joined
    if is_tower(model):
        return TOWER
    known = ENCODERS.keys() | transformers_maps.MAPS.keys() | TEXTS.keys()
    inside = [name for name, m in model.named_modules() for n in _names(m)[:1] if name and n in known]
    if inside:
        return f"{NO_FAMILY} (if you know that it is, apply to the encoder inside it: model.{inside[0]})"
    causal = [bool(words.CAUSAL.need(m)) for m in model.modules() if words.CAUSAL.on(m)]
    return CAUSAL if causal and all(causal) else NO_FAMILY


def is_tower(model: Any) -> bool:
    """True for a vision tower that is no encoder of its own, so that nothing can be done with it alone."""
    names = _names(model)
    inside = words.PLACE_IN_MODEL.part(words.CONFIG.part(model)) in words.VISION.names
    if not terms.PRETRAINED.among(names) or not (inside or any(n in TOWERS for n in names)):
        return False
    return _locate(model) is None and transformers_maps.match(model) is None and packed.match(model) is None


def _host(model: Any, name: str, encoder: Any, demand: str) -> EncoderHost:
    row = ENCODERS[name]
    layers = [(f"{row.layers}.{i}", layer) for i, layer in enumerate(_get(encoder, row.layers))]
    _check_fused(encoder, layers)
    skipped = words.LAYERDROP.part(encoder, 0)
    if skipped:
        raise UnsupportedModelError(
            f"transformers' {name} skips whole layers at random in training (layerdrop = {skipped}); "
            "set its layerdrop to 0 and apply again"
        )
    prefix, suffix = _ask(row.prefix, encoder), _ask(row.suffix, encoder)
    clip = None if row.clip is None else row.clip(encoder)
    masked, origin = row.masked or MASKED in _names(model), _origin(encoder)
    return EncoderHost(
        family=f"transformers {name}",
        model=encoder,
        blocks=layers,
        recipe=LayerRecipe(row.positions, argument_names(layers[0][1]), members.SHARED_BIAS.part(encoder) is not None),
        prefix=prefix,
        suffix=suffix,
        supplies=_supplies(row, masked, films(origin)),
        origin=origin,
        # Masked patches are taken out before the first layer, so those that are left form no grid.
        layout=None if masked else of_convolution,
        pooled=demand == "pooled",
        own=any(rewritten(m, "transformers") for m in {model, encoder}),
        grid=None if clip is None else clip[1:],
        frames=None if clip is None else clip[0],
        full=demand if demand in ("last", "all") else "none",
        tokens=lambda shape: _embed(row, encoder, model, shape)[0] + prefix + suffix,
        outside_macs=lambda shape: _embed(row, encoder, model, shape)[1] + _head(model),
        key_norms=[] if row.keys is None else [_get(layer, row.keys) for _, layer in layers],
        key_heads=None if row.keys is None else int(words.HEADS.need(words.CONFIG.need(encoder))),
    )


def _supplies(row: Encoder, masked: bool, filmed: bool) -> frozenset[str]:
    found = {"x", "q", "k", "v"}
    if row.class_token:
        found.add("class_attention")
    if not row.relative:
        found.add("attention")
    # Without some of its patches an image is no grid. The map of a detector need not be square, and its layers do not
    # know its sides.
    if not masked and ((row.rank == 4 and not row.outer) or row.clip is not None):
        found.add("grid")
    if not masked and row.clip is not None:
        found |= {"frames", "motion"} | ({"frame_motion"} if filmed else set())
    return frozenset(found)


def _origin(encoder: Any) -> nn.Module | None:
    """The convolution that makes patches of images or clips."""
    embeddings = members.EMBEDDINGS.part(encoder)
    made = (getattr(embeddings, name, None) for name in members.MAKERS.names)
    return next((found for found in map(convolution, made) if found is not None), None)


def _check_fused(encoder: Any, layers: list[tuple[str, nn.Module]]) -> None:
    if not layers:
        raise UnsupportedModelError(f"transformers' {type(encoder).__name__} has no layers")
    inside = (words.CONFIG.part(m) for _, layer in layers for m in layer.modules())
    configs = [config for config in inside if config is not None]
    kinds = {attention_of(c) for c in (configs or [words.CONFIG.need(encoder)])}
    if not kinds <= {*terms.FUSED_KERNEL.names}:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} runs attn_implementation={', '.join(sorted(kinds))!r}, which takes no token "
            "sizes; call model.set_attn_implementation('sdpa') (or load it so) and apply again"
        )


class LayerRecipe(Recipe):
    """Layers of transformers encoders.

    Args:
        biased: the model itself gives its layers a mask, the bias of relative positions.
    """

    def __init__(self, positions: dict[str, Callable[..., Any]], argument_names: tuple[str, ...], biased: bool) -> None:
        super().__init__(False, positions, argument_names)
        self.biased = biased

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """Positions at the rows that are left; padding is refused, since no method here keeps it apart yet."""
        mask = words.ATTENTION_MASK.of(kwargs)
        if mask is not None and mask.dtype == torch.bool:
            refuse_padding(mask)
            kwargs = {
                **kwargs,
                words.ATTENTION_MASK.key(kwargs): None,
            }  # hides nothing: transformers makes it while a graph is traced
        elif mask is not None and not self.biased:
            refuse_padding()
        return super().gather(kwargs, state, prefix)


def _embed(row: Encoder, encoder: Any, model: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Patches of an input, and the multiply-adds that make them; counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    dtype = next(encoder.parameters()).dtype
    x = torch.empty(1, *shape[1 - row.rank :], device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        n = row.embed(model if row.outer else encoder, x).shape[1]
    return int(n), int(counter.get_total_flops()) // 2


def _head(model: Any) -> int:
    """Matrices applied once a sample: classifiers and projections of the class token."""
    heads = [getattr(model, name, None) for name in members.CLASSIFIERS.names]
    return sum(macs(m) for m in heads if isinstance(m, nn.Module))
