"""transformers: encoders on a map with attention in windows, and TimeSformer's divided attention.

Their blocks give every token back, or keep a rectangle of tokens; how they are run stands in windows and divided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tokred.adapters.encoder.divided import divided_host
from tokred.adapters.encoder.host import EncoderHost, module_macs
from tokred.adapters.encoder.window_host import window_host
from tokred.adapters.encoder.windows import Parts
from tokred.adapters.linear import macs
from tokred.adapters.swap import host_class

SHARED = {
    "window_size", "window_partition", "window_unpartition", "shape", "mlp", "reshape", "permute", "unbind", "qkv",
    "rel_pos_h", "rel_pos_w", "scale", "transpose", "softmax", "proj", "view",
}  # fmt: skip
SAM_NAMES = {
    "layer_norm1", "attn", "layer_norm2", "num_attention_heads", "use_rel_pos", "get_decomposed_rel_pos",
    "torch", "nn", "functional", "scaled_dot_product_attention", "reshape_as", "float32", "to", "dtype", "dropout",
    "training", "logger", "warning_once", "__class__", "__name__",
}  # fmt: skip
VITDET_NAMES = {
    "norm1", "attention", "norm2", "num_heads", "drop_path", "use_residual_block", "residual",
    "use_relative_position_embeddings", "add_decomposed_relative_positions",
}  # fmt: skip


class MapEncoder(NamedTuple):
    """One encoder class: where its layers, its patch embedding and its neck are, and what its parts are called."""

    layers: str
    embed: str
    neck: str | None
    parts: Parts
    known: frozenset[str]


_SAM = MapEncoder(
    "layers",
    "patch_embed",
    "neck",
    Parts("layer_norm1", "attn", "layer_norm2", "num_attention_heads"),
    frozenset(SHARED | SAM_NAMES),
)
_VITDET = MapEncoder(
    "encoder.layer",
    "embeddings",
    None,
    Parts("norm1", "attention", "norm2", "num_heads", channels_first=True, tupled=True),
    frozenset(SHARED | VITDET_NAMES),
)
MAPS = {
    "SamVisionEncoder": _SAM,
    "SamHQVisionEncoder": _SAM,
    "VitDetModel": _VITDET,
    "VitDetBackbone": _VITDET,
}
DIVIDED = {"TimesformerModel": "", "TimesformerForVideoClassification": "timesformer"}


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of such an encoder, or of a model around one; None where there is none.

    Maps keep their size, so whatever is built around an encoder of maps notices nothing.

    Raises:
        UnsupportedModelError: the encoder is composed otherwise than is known here.
    """
    name = host_class(model).__name__
    if name in DIVIDED:
        encoder = model.get_submodule(DIVIDED[name])
        return divided_host(encoder, lambda shape: _clip(model, encoder, shape))
    found = [(n, m) for m in model.modules() for n in [host_class(m).__name__] if n in MAPS]
    return _map_host(*found[0]) if len(found) == 1 else None


def _map_host(name: str, encoder: Any) -> EncoderHost:
    row = MAPS[name]
    layers = encoder.get_submodule(row.layers)
    conv = encoder.get_submodule(row.embed).projection

    def map_of(shape: tuple[int, ...]) -> tuple[int, int]:
        return int(shape[-2]) // int(conv.stride[0]), int(shape[-1]) // int(conv.stride[1])

    def around(shape: tuple[int, ...]) -> int:
        height, width = map_of(shape)
        macs = height * width * int(conv.weight.numel())
        if row.neck is not None:
            macs += module_macs(encoder.get_submodule(row.neck), 1, height, width, int(conv.out_channels))
        return macs

    blocks = [(f"{row.layers}.{i}", layer) for i, layer in enumerate(layers)]
    family = f"transformers {name}"
    return window_host(encoder, blocks, row.parts, row.known, family=family, map_of=map_of, around=around)


def _clip(model: Any, encoder: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Positions of a frame, and the multiply-adds of patches and classifier, for a clip ``(..., T, 3, H, W)``."""
    conv = encoder.embeddings.patch_embeddings.projection
    positions = (int(shape[-2]) // int(conv.stride[0])) * (int(shape[-1]) // int(conv.stride[1]))
    head = getattr(model, "classifier", None)
    outside = positions * int(shape[-4]) * int(conv.weight.numel())
    return positions, outside + (macs(head) if isinstance(head, nn.Module) else 0)
