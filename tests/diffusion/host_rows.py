"""The rows of denoisers in docs/hosts.md: each is one that was built, patched and run here, or that refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import tokred
from tests.diffusion.tiny import MODELS, inputs, run
from tokred import adapters
from tokred.adapters.contract import words

LABELS = {
    "unet": "Unconditional",
    "sd15": "SD 1.x",
    "sd21": "SD 2.x",
    "sdxl": "SDXL",
    "dit": "DiT",
    "pixart": "PixArt",
    "sd3": "SD 3, SD 3.5",
    "flux": "Flux",
    "cogvideox": "CogVideoX-2b",
    "cogvideox_rotary": "CogVideoX-5b",
    "wan": "Wan",
    "hunyuan": "HunyuanVideo",
    "hunyuan_first_frame": "HunyuanVideo from an image",
}
OTHERS = {
    "LTX-Video": "LTXVideoTransformer3DModel",
    "Mochi": "MochiTransformer3DModel",
    "Allegro": "AllegroTransformer3DModel",
    "Wan VACE": "WanVACETransformer3DModel",
    "SVD": "UNetSpatioTemporalConditionModel",
    "AnimateDiff": "UNetMotionModel",
    "Flux.2": "Flux2Transformer2DModel",
    "Qwen-Image": "QwenImageTransformer2DModel",
    "Lumina 2": "Lumina2Transformer2DModel",
    "Sana": "SanaTransformer2DModel",
    "AuraFlow": "AuraFlowTransformer2DModel",
    "Stable Cascade": "StableCascadeUNet",
}
ROLES = {"self": "self-attention", "cross": "cross-attention", "mlp": "MLP"}


class DenoiserRow(NamedTuple):
    """One denoiser: what can be reduced in it, or why it refused."""

    library: str
    label: str
    model: str
    around: str = ""
    text: str = ""
    positions: str = ""
    methods: str = ""
    refused: str = ""


def diffusers_rows() -> Iterator[DenoiserRow]:
    """One row for each tiny model, then the refused ones, built on the meta device."""
    import diffusers

    assert set(LABELS) == set(MODELS)
    for kind, label in LABELS.items():
        yield _works(kind, label)
    for label, name in OTHERS.items():
        cls = getattr(diffusers, name, None)
        if cls is None:
            continue  # the page is compared under the versions that made it
        with torch.device("meta"):
            model = cls()
        try:
            adapters.find(model, "attention")
        except tokred.UnsupportedModelError as error:
            yield DenoiserRow("diffusers", label, name, refused=str(error).partition(" (")[0])
        else:
            raise AssertionError(f"{name} is accepted: give it a row among the tiny models")


def _works(kind: str, label: str) -> DenoiserRow:
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    merging = {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}
    with tokred.applied(model, "tomesd", ratio=0.0, **merging):
        assert torch.equal(run(model, given), before), f"{label}: nothing to remove, but another output"
    with tokred.applied(model, "tomesd", **merging):
        after = run(model, given)
        assert after.isfinite().all(), label
        assert not torch.equal(after, before), f"{label}: nothing happened"
        roles = [row.role for row in tokred.report(model).sublayers if row.left < row.tokens]
    assert torch.equal(run(model, given), before), f"{label}: not as before"
    host = adapters.find(model, "attention")
    kinds = [what for part in host.parts for *_, what in part.sublayers]
    around = ", ".join(ROLES[role] for role in ROLES if role in roles)
    around += "; single blocks as a whole" if "parallel" in kinds else ""
    supported = tokred.supports(model)
    missing = [row.method for row in supported if not row.works and tokred.make(row.method).stage == "attention"]
    return DenoiserRow(
        "diffusers",
        label,
        type(model).__name__,
        around,
        _text(host, roles),
        "rotary" if _rotates(model, host, given) else "at the input",
        "all" if not missing else "all but " + ", ".join(f"`{m}`" for m in missing),
    )


def _text(host: Any, roles: list[str]) -> str:
    if "cross" in roles:
        return "by cross-attention"
    together = [part.first for part in host.parts if any(what == "joint" for *_, what in part.sublayers)]
    if not together:
        return "none"
    return "before the image's tokens" if together[0] else "after the image's tokens"


def _rotates(model: nn.Module, host: Any, given: dict[str, Any]) -> bool:
    """Whether an attention is handed a table of rotations."""
    found: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        all_given = {**dict(zip(names, args, strict=False)), **kwargs}
        found.append(any(all_given.get(name) is not None for name in words.TURNS.names))

    modules = [module for part in host.parts for _, module, what in part.sublayers if what not in ("mlp", "parallel")]
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    run(model, given)
    for handle in handles:
        handle.remove()
    return any(found)


NOTE = """\
Methods for denoisers act at the stage `attention`: tokens of the image are reduced around a sub-layer and restored
after it, so that outputs keep their size; text is never reduced. Clips are reduced frame by frame, except by methods
that read the frames. Where a model has a rotary embedding, keys and values, or queries, are reduced after it; tokens
that are merged there take part with the place of their destination. `tokred.apply` takes a pipeline as well."""
HEAD = ["family", "tried", "reduced around", "text", "positions", "methods of the stage"]


def cells(row: DenoiserRow) -> list[str]:
    """The line of a denoiser that works."""
    return [row.label, f"`{row.model}`", row.around, row.text, row.positions, row.methods]
