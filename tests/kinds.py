"""Laws over many hosts: one host of each kind in every run, the others under the marker ``hosts``.

A kind is a way through an adapter's code. Every table of hosts has one here, which says what each host of every run
stands for; all others differ from one of them in its class alone, or in options that no adapter looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

TIMM = {
    "vit": "a class token",
    "vit-registers (DINOv2)": "registers, layer scale",
    "vit-attention-pool (SigLIP)": "no class token, pooled by attention",
    "vit-mean-with-class (MAE)": "a mean beside a class token",
    "vit-parallel-scaling": "a block that is run whole",
    "deit-distilled": "two tokens with heads",
    "dinov3 (rope, registers)": "rotated queries and keys, split projections",
    "rope-mixed": "a table of rotations for each layer",
    "eva-post-norm (rope)": "norms behind the branches, rotated",
    "beit (own bias)": "a bias for each pair of tokens",
    "relpos-mlp-mean": "a bias made by a network, no class token, a mean",
}
TIMM_MODELS = {
    "vit_tiny_patch16_224": "a class token",
    "vit_medium_patch16_reg4_gap_256": "registers, a mean",
    "vit_base_patch16_siglip_224": "pooled by attention",
    "deit_tiny_distilled_patch16_224": "two tokens with heads",
    "vit_small_patch16_dinov3": "rotated",
    "beit_base_patch16_224": "a bias for each pair of tokens",
    "samvit_base_patch16": "windows",
}
OPEN_CLIP = {
    "CLIP": "packed projections",
    "no norm before, sine positions": "other positions",
    "custom blocks": "blocks with norms of their own",
    "CoCa": "pooled by attention, two outputs",
    "timm trunk": "blocks of timm",
}
TRANSFORMERS = {
    "ViT classifier": "a class token",
    "DeiT": "two tokens with heads",
    "BEiT (own bias)": "a bias for each pair of tokens",
    "BEiT (shared bias)": "one bias for all layers",
    "BEiT segmentation": "feature maps of several layers, with a bias",
    "AST": "a grid of sound",
    "ViT-MAE": "tokens that are hidden before the blocks",
    "I-JEPA": "no class token",
    "ViViT": "clips as one line of tokens",
    "TimeSformer": "attention divided into time and space",
    "DINOv2 with registers": "registers",
    "DINOv3 backbone": "rotated, registers, feature maps",
    "CLIP": "two towers",
    "OWL-ViT": "a detector that reads every patch",
    "SigLIP 2 classifier": "several sizes in one batch, masked",
    "YOLOS (mid positions)": "tokens behind the patches, positions in every layer",
    "Conditional DETR": "positions beside the tokens, a decoder that reads them",
    "DPT": "a dense head on several layers",
    "VideoMAE": "clips, a mean",
    "Whisper": "an encoder of sound with a decoder",
    "BERT classifier": "padded text",
    "DistilBERT classifier": "padded text, names of its own",
    "ModernBERT classifier": "padded text, rotated, windows",
}
WINDOWED = {
    "timm SAM": "timm, positions in attention",
    "timm SAM, rope": "timm, rotated",
    "SAM vision": "transformers, positions in attention",
    "ViTDet": "windows in a line of maps",
}
DENOISERS = {
    "sd15": "a UNet with text",
    "dit": "a transformer without text",
    "sd3": "text and image in one attention, twice",
    "flux": "text first, rotated, single blocks",
    "cogvideox": "clips, text projected with them",
    "wan": "clips, rotated, text by cross-attention",
    "hunyuan_first_frame": "clips, text last and masked, gates of the first frame",
}
# Of those that libraries put hooks around.
WRAPPED = {
    "sd15": "a UNet, without caches",
    "flux": "a transformer of double and single blocks, with caches",
}
VISION_LANGUAGE = {
    "llava": "one run of tokens an image",
    "llava_next": "tiles with ends of lines",
    "onevision_video": "pooled frames with an end",
    "qwen2_5_vl": "three positions a token, windows in the tower",
    "qwen3_vl": "features of the tower in several layers",
    "internvl": "shuffled pixels",
    "idefics3": "tiles in text, padded with empty images",
    "paligemma": "a prompt without causal order",
    "gemma3": "layers with windows, images without causal order",
}
CACHES = {
    "llama": "full layers, grouped keys",
    "qwen3": "norms of queries and keys",
    "gemma3": "sliding layers among full ones",
    "gemma2": "capped logits, eager",
    "gpt_oss": "sinks in the softmax, eager",
    "qwen3_5": "layers with a state among full ones",
}

MIXTURES = {
    "mixtral": "weights that sum to one",
    "qwen2_moe": "weights as they are, a shared expert",
}


def each(cases: Iterable[Any], kinds: Mapping[str, str]) -> list[Any]:
    """All cases as parameters, those of other hosts than ``kinds`` under the marker ``hosts``.

    Args:
        cases: names of hosts, or tuples that have one at the first place.
        kinds: the hosts of every run, and what each stands for.

    Returns:
        As many parameters as cases, in their order, with the ids that they have without marks.

    Raises:
        ValueError: no case is left for every run, so that nobody would notice a law that is broken.
    """
    found, left = [], 0
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        common = values[0] in kinds
        left += common
        found.append(pytest.param(*values, marks=() if common else pytest.mark.hosts))
    if not left:
        raise ValueError(f"none of {[p.values[0] for p in found]} is a host of every run: {sorted(kinds)}")
    return found
