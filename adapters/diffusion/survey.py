"""Multiply-adds of a denoiser at some size, counted on the meta device: no weights are read, nothing is computed."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokred.adapters.changes import Changes, sweep
from tokred.adapters.diffusion.clips import CLIPS, clip
from tokred.adapters.diffusion.host import DENOISERS, DenoiserHost, known_as, match
from tokred.adapters.diffusion.session import SpotRecord
from tokred.adapters.swap import host_class
from tokred.diffusion.method import AttentionMethod

TEXT = 77  # tokens of a prompt, as CLIP's
TEXTS = 512  # and as T5's


class Survey(NamedTuple):
    """One forward of a denoiser at batch 1.

    Attributes:
        macs: multiply-adds of all of it, convolutions included.
        reduced: the same under the method, whose own work is not counted.
        spots: sub-layers, and the tokens that each runs on under the method.
        spot_macs: multiply-adds of each without the method.
    """

    macs: int
    reduced: int
    spots: tuple[SpotRecord, ...]
    spot_macs: tuple[int, ...]


def survey(host: DenoiserHost, method: AttentionMethod, size: tuple[int, ...]) -> Survey:
    """Count one forward on a sample of some size, without and with the method.

    Args:
        host: of a model, patched or not, which is not changed.
        method: its choice of tokens is not made, only their number.
        size: rows and columns of the sample (the latent); of a clip: frames, rows and columns.

    Raises:
        ValueError: the method's parameters do not fit the grids there, or the size has frames where it should not.
    """
    model = meta_copy(host.model)
    sweep(model)
    own = match(model)
    assert own is not None  # a copy of a host
    given = example(model, size)
    macs, before = _counted(model, own, given)
    session = own.patch(method, None, "auto", Changes())
    session.free, session.fixed = True, (size[-2] // own.patch_size, size[-1] // own.patch_size)
    reduced, _ = _counted(model, own, given)
    spots = tuple(session.records[key] for key in sorted(session.records))
    return Survey(macs, reduced, spots, tuple(before[spot.name] for spot in spots))


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no values."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for m in model.modules():
        if _packed(m):
            memo[id(m)] = nn.Linear(m.in_features, m.out_features, device="meta", dtype=float_type(model))  # type: ignore[arg-type]
    return copy.deepcopy(model, memo).eval()


def float_type(model: nn.Module) -> torch.dtype:
    """The type in which a model computes: that of its first weights that are numbers with a point."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _packed(module: nn.Module) -> bool:
    """True for a linear layer whose weights are no plain matrix (packed, quantised), so that only it can multiply."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    if any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module):
        return False  # a wrapper, such as LoRA's
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_quantized
    return not plain or tuple(weight.shape) != (module.out_features, module.in_features)  # type: ignore[union-attr]


def _counted(model: nn.Module, host: DenoiserHost, given: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Multiply-adds of a forward, and of each sub-layer in it."""
    found: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        handles = []
        for part in host.parts:
            for name, module, _ in part.sublayers:

                def start(*_: Any, name: str = name) -> None:
                    found[name] = found.get(name, 0) - counter.get_total_flops()

                def stop(*_: Any, name: str = name) -> None:
                    found[name] += counter.get_total_flops()

                handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            model(**given)
        finally:
            for handle in handles:
                handle.remove()
    # Of a block whose MLP runs beside its attention, the MLP is what is not attention.
    for part in host.parts:
        if part.sublayers[-1][2] == "parallel":
            found[f"{part.name}.mlp"] = found.pop(part.name) - sum(found[name] for name, *_ in part.sublayers[:-1])
    return int(counter.get_total_flops()) // 2, {name: flops // 2 for name, flops in found.items()}


def example(model: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of a forward at batch 1, on the meta device.

    Args:
        model: a denoiser.
        size: rows and columns of the sample; of a clip: frames, rows and columns.

    Raises:
        ValueError: the model takes conditions that are not known here, or the size has frames where it should not.
    """
    kind = known_as(host_class(model), DENOISERS) or ""
    if (len(size) == 3) != (kind in CLIPS):
        wanted = "rows and columns" if len(size) == 3 else "frames, rows and columns"
        raise ValueError(f"the sample of {host_class(model).__name__} has {wanted}, got a size of {size}")
    config, dtype = model.config, float_type(model)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(1, *shape, device="meta", dtype=kind)

    sample = empty(int(config.in_channels), *size)
    time = empty(kind=torch.int64)
    if kind in CLIPS:
        return {"timestep": time, **clip(kind, config, size, empty)}
    if kind == "UNet2DModel":
        return {"sample": sample, "timestep": time, **_classes(model, config, empty)}
    if kind == "UNet2DConditionModel":
        text = empty(TEXT, int(config.encoder_hid_dim or config.cross_attention_dim))
        given = {"sample": sample, "timestep": time, "encoder_hidden_states": text, **_classes(model, config, empty)}
        if config.addition_embed_type == "text_time":
            # SDXL embeds six sizes beside the pooled text, and its configuration gives the width of both together.
            pooled = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
            given["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
        elif config.addition_embed_type is not None:
            raise ValueError(f"a UNet with addition_embed_type {config.addition_embed_type!r} is not known here")
        return given
    if kind == "DiTTransformer2DModel":
        return {"hidden_states": sample, "timestep": time, "class_labels": empty(kind=torch.int64)}
    if kind == "PixArtTransformer2DModel":
        sizes = (empty(2), empty(1)) if model.use_additional_conditions else (None, None)
        more = {"added_cond_kwargs": dict(zip(("resolution", "aspect_ratio"), sizes, strict=True))}
        text = empty(120, int(config.caption_channels))
        return {"hidden_states": sample, "timestep": time, "encoder_hidden_states": text, **more}
    if kind == "FluxTransformer2DModel":
        # Flux's pipeline packs 2 x 2 of the sample into a token before the denoiser sees it.
        n, width = (size[0] // 2) * (size[1] // 2), len(config.axes_dims_rope)
        ids = (torch.empty(rows, width, device="meta") for rows in (n, TEXTS))
        given = {"hidden_states": empty(n, int(config.in_channels)), "timestep": empty()}
        given |= dict(zip(("img_ids", "txt_ids"), ids, strict=True))
        given |= {"encoder_hidden_states": empty(TEXTS, int(config.joint_attention_dim))}
        given |= {"pooled_projections": empty(int(config.pooled_projection_dim))}
        return given | ({"guidance": empty()} if config.guidance_embeds else {})
    text = empty(2 * TEXT, int(config.joint_attention_dim))
    pooled_text = empty(int(config.pooled_projection_dim))
    rest = {"encoder_hidden_states": text, "pooled_projections": pooled_text}
    return {"hidden_states": sample, "timestep": time, **rest}


def _classes(model: Any, config: Any, empty: Any) -> dict[str, Any]:
    if getattr(model, "class_embedding", None) is None:
        return {}
    kind = config.class_embed_type
    if kind == "identity":
        return {"class_labels": empty(int(model.time_embedding.linear_2.out_features))}
    if kind in ("projection", "simple_projection"):
        return {"class_labels": empty(int(config.projection_class_embeddings_input_dim))}
    return {"class_labels": empty(kind=torch.int64)}
