"""The table of hosts in docs/hosts.md: every row is a model that was built, patched and run here, or that refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokred
from tests.diffusion import host_rows
from tests.encoder import tiny_open_clip, tiny_transformers, tiny_windows
from tokred import adapters

WINDOWS = ("SAM", "SAM vision", "SAM-HQ", "ViTDet", "ViTDet backbone")
LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "diffusers": "diffusers",
}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}

TIMM = {
    "ViT (AugReg, MAE, DINO)": "vit_tiny_patch16_224",
    "ViT with mean pooling": "vit_medium_patch16_gap_256",
    "ViT with registers": "vit_medium_patch16_reg4_gap_256",
    "Differential attention": "vit_dlittle_patch16_reg1_gap_256",
    "Parallel attention and MLP": "vit_dpwee_patch16_reg1_gap_256",
    "Norms after (XP)": "vit_base_patch16_xp_224",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-3 (layer scale)": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "CLIP": "vit_base_patch16_clip_224",
    "SigLIP (attention pooling)": "vit_base_patch16_siglip_224",
    "Hybrid ViT": "vit_tiny_r_s16_p8_224",
    "EVA": "eva_giant_patch14_224",
    "EVA-02": "eva02_tiny_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384",
    "RoPE ViT, axial": "vit_small_patch16_rope_224",
    "RoPE ViT, mixed": "vit_small_patch16_rope_mixed_224",
    "BEiT": "beit_base_patch16_224",
    "BEiT v2": "beitv2_base_patch16_224",
    "Relative-position ViT": "vit_relpos_small_patch16_224",
    "ViTamin": "vitamin_small_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin v2": "swinv2_tiny_window8_256",
    "Hiera": "hiera_tiny_224",
    "SAM": "samvit_base_patch16",
    "SAM 2": "sam2_hiera_tiny",
    "NaFlexViT": "naflexvit_base_patch16_gap",
    "CaiT": "cait_xxs24_224",
    "XCiT": "xcit_tiny_12_p16_224",
    "MViT v2": "mvitv2_tiny",
    "CoaT": "coat_tiny",
    "ConViT": "convit_tiny",
    "CrossViT": "crossvit_tiny_240",
    "DaViT": "davit_tiny",
    "GC ViT": "gcvit_xxtiny",
    "LeViT": "levit_128s",
    "MaxViT": "maxvit_nano_rw_256",
    "MetaFormer": "caformer_s18",
    "MobileViT": "mobilevit_xxs",
    "NesT": "nest_tiny",
    "PiT": "pit_ti_224",
    "PVT v2": "pvt_v2_b0",
    "TinyViT": "tiny_vit_5m_224",
    "TNT": "tnt_s_patch16_224",
    "Twins": "twins_svt_small",
    "Visformer": "visformer_tiny",
    "VOLO": "volo_d1_224",
    "DeepSeek ViT": "deepseek_vit_412m",
    "Gemma 4 ViT": "gemma4_vit_167m",
    "Qwen 3 ViT": "qwen3_vit_88m",
    "Convolutional networks": "resnet18",
}

# Options beside SMALL, and the side of the images where the model's own would be slow.
OPTIONS: dict[str, dict[str, Any]] = {
    "SAM": {"img_size": 64, "global_attn_indexes": (1,)},
    "DeepSeek ViT": {"img_size": 84},
    "Gemma 4 ViT": {"head_dim": 16, "intermediate_size": 64, "position_embedding_size": 16},
    "Qwen 3 ViT": {"pos_embed_grid_size": 6},
}
SIDES = {"SAM": 64, "DeepSeek ViT": 84, "Gemma 4 ViT": 96, "Qwen 3 ViT": 96}

ONE = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**ONE, "vocab_size": 60}
IMAGE = {**ONE, "image_size": 32, "patch_size": 8}
TOWERS = {"vision_config": IMAGE, "text_config": TEXT}

# Label -> class of the model, class of the configuration, options.
TRANSFORMERS_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Swin": ("SwinForImageClassification", "SwinConfig", {"depths": [1, 1]}),
    "Swin v2": ("Swinv2Model", "Swinv2Config", {"depths": [1, 1]}),
    "Hiera": ("HieraModel", "HieraConfig", {}),
    "SAM 2": ("Sam2VisionModel", "Sam2VisionConfig", {}),
    "Segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {}),
    "PVT": ("PvtModel", "PvtConfig", {}),
    "CvT": ("CvtModel", "CvtConfig", {}),
    "LeViT": ("LevitModel", "LevitConfig", {}),
    "MobileViT": ("MobileViTModel", "MobileViTConfig", {}),
    "V-JEPA 2": ("VJEPA2Model", "VJEPA2Config", {**ONE, "pred_num_hidden_layers": 1}),
    "BLIP": ("BlipForImageTextRetrieval", "BlipConfig", TOWERS),
    "Llama 3.2 Vision": ("MllamaForConditionalGeneration", "MllamaConfig", {}),
    "wav2vec 2.0": ("Wav2Vec2Model", "Wav2Vec2Config", ONE),
    "ALBERT": ("AlbertModel", "AlbertConfig", TEXT),
    "DeBERTa v2": ("DebertaV2Model", "DebertaV2Config", TEXT),
    "ConvNeXt": ("ConvNextModel", "ConvNextConfig", {}),
}


class Row(NamedTuple):
    """One model: how it was patched, or why it refused."""

    library: str
    label: str
    model: str
    encoder: str = ""
    protected: str = ""
    where: str = ""
    full: str = ""
    methods: str = ""
    refused: str = ""


def works(library: str, label: str, name: str, model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> Row:
    """Patch and run an accepted model.

    Raises:
        AssertionError: it breaks a law: nothing to remove is bit-equal, something removed is seen, removal restores.
    """
    host = adapters.find(model)
    with torch.no_grad():
        y = run(model)
        tokred.apply(model, "tome", r=0)
        assert _equal(run(model), y), f"{library} {label}: nothing to remove, but another output"
        tokred.apply(model, "tome", r=3)
        z = run(model)
        assert not _equal(z, y), f"{library} {label}: nothing happened"
        assert all(torch.isfinite(t).all() for t in z), label
        tokred.remove(model)
        assert _equal(run(model), y), f"{library} {label}: not as before"
    supported = tokred.supports(model)
    missing = [row.method for row in supported if not row.works and tokred.make(row.method).stage == "block"]
    protected = f"{host.prefix} + {host.suffix}" if host.suffix else str(host.prefix)
    full = "last" if host.full == "none" and host.pooled else host.full
    return Row(
        library,
        label,
        name,
        host.family.partition(" ")[2],
        protected,
        host.where,
        {"none": "no", "last": "last block", "all": "every block"}[full] + ("" if host.full == "none" else " (always)"),
        "all" if not missing else "all but " + ", ".join(f"`{m}`" for m in missing),
    )


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refusal(model: nn.Module) -> str | None:
    """Why a model is refused, or None when it is not. It stays as it was either way."""
    before = [type(m) for m in model.modules()]
    try:
        adapters.find(model)
    except tokred.UnsupportedModelError as error:
        reason = str(error)
        return reason.partition(" here: ")[2] or reason
    finally:
        assert [type(m) for m in model.modules()] == before
    return None


def timm_rows() -> Iterator[Row]:
    """One row for each architecture of ``TIMM``, the refused ones built on the meta device."""
    import timm

    for label, name in TIMM.items():
        if not timm.is_model(name):
            continue  # younger than the installed timm; the page is compared under the versions that made it
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except RuntimeError:  # timm before 1.0.24 computes values while it builds
            model = timm.create_model(name)
        reason = refusal(model)
        if reason is not None:
            yield Row("timm", label, name, refused=reason)
            continue
        torch.manual_seed(0)
        small = {} if "vitamin" in name else {**SMALL, **OPTIONS.get(label, {})}
        model = _randomised(timm.create_model(name, **small, num_classes=5).eval())
        channels, *size = model.default_cfg["input_size"]
        x = torch.rand(1, channels, *([SIDES[label]] * 2 if label in SIDES else size))
        yield works("timm", label, name, model, lambda m, x=x: [m(x)])


def _randomised(model: nn.Module) -> nn.Module:
    """Small random values in everything, so that no branch starts at zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def transformers_rows() -> Iterator[Row]:
    """One row for each family that works, in the order of the tiny models, then the refused ones."""
    import transformers

    for label, row in tiny_transformers.FAMILIES.items():
        model = tiny_transformers.build(label)
        x = row.inputs(1)
        name = type(model).__name__
        yield works(
            "transformers", label, name, model, lambda m, x=x, label=label: tiny_transformers.read(label, m(**x))
        )
    for label in WINDOWS:
        model = tiny_windows.build(label)
        name, x = type(model).__name__, tiny_windows.images(1)
        yield works("transformers", label, name, model, lambda m, x=x: tiny_windows.read(m, x))
    for label, (name, config, options) in TRANSFORMERS_OTHERS.items():
        made = getattr(transformers, config)(**options)
        with torch.device("meta"):
            model = getattr(transformers, name)(made)
        reason = refusal(model)
        assert reason is not None, f"{name} is accepted: give it a row among the tiny models"
        yield Row("transformers", label, name, refused=reason)


def open_clip_rows() -> Iterator[Row]:
    """One row for each tiny model, and the refused towers."""
    from open_clip.model import CLIP

    for label in tiny_open_clip.FAMILIES:
        model = tiny_open_clip.build(label)
        x = tiny_open_clip.inputs(label, 1)
        yield works("open_clip", label, type(model).__name__, model, lambda m, x=x: tiny_open_clip.outputs(m, *x))
    text, vision = tiny_open_clip.TEXT, tiny_open_clip.VISION
    cosine = {**vision, **tiny_open_clip.CUSTOM, "qk_norm": False, "scaled_cosine_attn": True}
    for label, options in (
        ("scaled cosine attention", cosine),
        ("ResNet", {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}),
    ):
        reason = refusal(CLIP(16, options, text))
        assert reason is not None, label
        yield Row("open_clip", label, "CLIP", refused=reason)


ROWS: dict[str, Callable[[], Iterator[Any]]] = {
    "timm": timm_rows,
    "transformers": transformers_rows,
    "open_clip": open_clip_rows,
    "diffusers": host_rows.diffusers_rows,
}


def versions() -> str:
    """The line that says what the table was made with."""
    made = ", ".join(f"{name} {metadata.version(package)}" for name, package in LIBRARIES.items())
    return f"Made with {made}."


INTRODUCTION = """\
# Hosts

<!-- Generated by tests/encoder/test_host_table.py. To write it anew: TOKRED_WRITE_TABLES=1 pytest that file. -->

Every row below is a model that the tests build, patch and run: with nothing to remove, its output is bit for bit that
of the unpatched model, and again after `tokred.remove`. A model that cannot be reduced rightly is refused, with the
reason, when a method is applied; it is never patched in part, and never left as it is without a word. For a model of
yours, `tokred.supports(model)` gives the same answer.

{versions}

- **protected**: leading tokens that are never reduced (class, distillation, registers), and trailing ones (detection).
- **reduced**: *mid* is the middle of a block, between attention and MLP; *end* is its end. *Inside*: blocks that work
  on a map use fewer tokens for their attention and MLP, and give all of them back. By default the blocks of global
  attention do this; `windows="windowed"` reduces each window of the others instead, by the same number, and
  `windows="all"` does both.
- **full length**: the blocks that give all tokens back, each with the value of the token that it went into. Where a
  head pools over all tokens, the last block does so, unless `expose="none"` is given or the method drops tokens (the
  head then pools over those that are left). Where positions matter, it happens *always*. Everywhere else outputs are
  short: `last_hidden_state` and, with `output_hidden_states=True`, the `hidden_states` of transformers have fewer
  tokens from block to block; `expose="all"` gives every block the full length.
- **methods**: those that the model can supply with everything they read. Others lack a class token's attention, the
  grid of one image (clips, spectrograms, maps of unknown sides), columns of attention (under a bias of pairs), or a
  block that can be split.

"""

NOTES = {
    "timm": "A classifier around such a model works as well: `tokred.apply` finds the model inside it.",
    "transformers": """\
Attention must be `sdpa`, the default: `tokred.apply` refuses `eager` and others, and a model that is switched later
raises at its next forward (as do Whisper's word timestamps, which switch it). Decoders, and text towers beside an
encoder of images, are never touched; Whisper's decoder reads the shorter memory. Batches with padding are for text
encoders alone: padding goes before any token, and each sample is reduced as if it were alone. Elsewhere a batch with
padded tokens (SigLIP 2 with images of unequal sizes) raises at the forward. If a model around a known encoder is in
neither list, it is refused, since it may count or place the tokens. Models around a `Backbone` are the exception,
because a backbone returns maps of full length. Gradient checkpointing, `generate`, `save_pretrained` (which writes the
plain model) and pickling work as before.""",
    "open_clip": "Only the vision tower is patched. For towers from timm, see the table of timm.",
    "diffusers": host_rows.NOTE,
}
HEAD = ["family", "tried", "encoder", "protected", "reduced", "full length", "methods"]


def cells(row: Any) -> list[str]:
    """The line of a model that works."""
    if row.library == "diffusers":
        return host_rows.cells(row)
    return [row.label, f"`{row.model}`", row.encoder, row.protected, row.where, row.full, row.methods]


def render(rows: list[Any]) -> str:
    """The page."""
    parts = [INTRODUCTION.replace("{versions}", versions())]
    for library in LIBRARIES:
        mine = [row for row in rows if row.library == library]
        parts.append(f"## {library}\n\n{NOTES[library]}\n\n")
        good = [cells(row) for row in mine if not row.refused]
        parts.append(_table(host_rows.HEAD if library == "diffusers" else HEAD, good))
        parts.append("\nRefused:\n\n")
        parts.append(
            _table(["family", "tried", "why"], [[r.label, f"`{r.model}`", r.refused] for r in mine if r.refused])
        )
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
