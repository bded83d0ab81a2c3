"""Pipelines of every family, with random weights: the same image at every call, and none of the patch after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.diffusion.tiny import FRAMES, MODELS, inputs, run


def embeds(*shape: int, seed: int = 9) -> Tensor:
    """Of prompts, since there is no text encoder."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(steps_offset=1, clip_sample=False)


def sdxl() -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionXLPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(**parts, unet=MODELS["sdxl"](), scheduler=_ddim(), add_watermarker=False)
    given = {"prompt_embeds": embeds(2, 5, 12), "pooled_prompt_embeds": embeds(2, 10)}
    return pipe, given | {f"negative_{k}": 0 * v for k, v in given.items()}


def sd3() -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusion3Pipeline

    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    parts = dict.fromkeys(["vae", *names])
    pipe = StableDiffusion3Pipeline(**parts, transformer=MODELS["sd3"](), scheduler=_flow())
    given = {"prompt_embeds": embeds(2, 5, 12), "pooled_prompt_embeds": embeds(2, 10)}
    return pipe, given | {f"negative_{k}": 0 * v for k, v in given.items()}


def flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(**parts, transformer=MODELS["flux"](), scheduler=_flow())
    given = {"prompt_embeds": embeds(2, 5, 12), "pooled_prompt_embeds": embeds(2, 10)}
    # Guidance by a second call, as this pipeline has it.
    return pipe, given | {f"negative_{k}": 0 * v for k, v in given.items()} | {"true_cfg_scale": 2.0}


def pixart() -> tuple[Any, dict[str, Any]]:
    from diffusers import PixArtAlphaPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = PixArtAlphaPipeline(**parts, transformer=MODELS["pixart"](), scheduler=_ddim())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"prompt_embeds": embeds(2, 5, 12), "prompt_attention_mask": mask}
    given |= {f"negative_{k}": v for k, v in given.items()}
    return pipe, given | {"negative_prompt": None, "use_resolution_binning": False}


def dit() -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL, DiTPipeline

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
    return DiTPipeline(transformer=MODELS["dit"](), vae=vae, scheduler=_ddim()), {
        "class_labels": [1, 2],
        "guidance_scale": 1.0,
    }


def cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    model = MODELS["cogvideox_rotary"]()
    pipe = CogVideoXPipeline(**parts, transformer=model, scheduler=CogVideoXDDIMScheduler())
    return pipe, {"prompt_embeds": embeds(2, 5, 12), "negative_prompt_embeds": embeds(2, 5, 12) * 0, "num_frames": 9}


def wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import WanPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = WanPipeline(**parts, transformer=MODELS["wan"](), scheduler=_flow())
    return pipe, {"prompt_embeds": embeds(2, 5, 12), "negative_prompt_embeds": embeds(2, 5, 12) * 0, "num_frames": 9}


def hunyuan() -> tuple[Any, dict[str, Any]]:
    from diffusers import HunyuanVideoPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = HunyuanVideoPipeline(**parts, transformer=MODELS["hunyuan"](), scheduler=_flow())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"prompt_embeds": embeds(2, 5, 12), "pooled_prompt_embeds": embeds(2, 10), "prompt_attention_mask": mask}
    return pipe, given | {"num_frames": 9}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "cogvideox": cogvideox,
    "wan": wan,
    "hunyuan": hunyuan,
}


def image(pipe: Any, given: dict[str, Any], seed: int = 0) -> Tensor:
    """Of two prompts, as the denoiser leaves it."""
    pipe.set_progress_bar_config(disable=True)
    given = {**given, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}
    if "class_labels" in given:
        return torch.from_numpy(pipe(**given, output_type="np").images)
    out = pipe(**given, height=128, width=128, output_type="latent")
    return out.images if hasattr(out, "images") else out.frames


@pytest.mark.filterwarnings("ignore:.*less than 5 %")
@pytest.mark.parametrize("family", list(PIPELINES))
def test_a_pipeline(family: str):
    pipe, given = PIPELINES[family]()
    before = image(pipe, given)
    for method, parameters in (
        ("tomesd", {"max_downsample": 2, "merge_mlp": True, "refresh": 2, "share": "resolution"}),
        ("todo", {"factors": (1, 2)}),
    ):
        assert tokred.apply(pipe, method, **parameters) is pipe
        state = torch.get_rng_state()
        first = image(pipe, given)
        assert torch.equal(first, image(pipe, given)), "the same seed gives the same image at every call"
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(first, before)
        assert not torch.equal(first, image(pipe, given, seed=1))
        assert tokred.report(pipe).reduced > 0
    assert tokred.remove(pipe) is pipe
    assert torch.equal(image(pipe, given), before)
    with tokred.applied(pipe, "tomesd", ratio=0.0):
        assert torch.equal(image(pipe, given), before)
    size = (9, 128, 128) if family in ("cogvideox", "wan", "hunyuan") else 128
    if family != "dit":
        levels = tokred.explain(pipe, "todo", size, factors=(1, 2)).levels
        assert {v.tokens for v in levels} == ({192} if len(levels) and isinstance(size, tuple) else {64})


def test_two_denoisers_in_one_pipeline():
    """One expert for early and one for late steps: neither may be left as it is in silence."""
    pipe, _ = wan()
    pipe.register_modules(transformer_2=MODELS["wan"]())
    with pytest.raises(tokred.UnsupportedModelError, match=r"two denoisers.*pipe\.transformer and pipe\.transformer_2"):
        tokred.apply(pipe, "tomesd")
    for part in (pipe.transformer, pipe.transformer_2):
        tokred.apply(part, "tomesd")


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_offloading_of_a_pipeline(family: str):
    """Hooks of accelerate replace the denoiser's forward, before a patch or after it."""
    pytest.importorskip("accelerate")
    pipe, given = PIPELINES[family]()
    expected = image(tokred.apply(pipe, "tomesd", max_downsample=2, merge_mlp=True), given)
    for first in (True, False):
        pipe, given = PIPELINES[family]()
        if first:
            tokred.apply(pipe, "tomesd", max_downsample=2, merge_mlp=True)
        pipe.enable_model_cpu_offload(device="cpu")
        if not first:
            tokred.apply(pipe, "tomesd", max_downsample=2, merge_mlp=True)
        assert torch.equal(image(pipe, given), expected)
        pipe.remove_all_hooks()
        tokred.remove(pipe)


@pytest.mark.parametrize("kind", ["sd15", "flux", "wan"])
def test_layers_that_are_fetched_one_by_one(kind: str):
    """Sequential offloading hooks every layer that holds weights."""
    accelerate = pytest.importorskip("accelerate")
    given, method = inputs(kind), tokred.ToMeSD(max_downsample=2, merge_mlp=True)
    expected = run(tokred.apply(MODELS[kind](), method), given)
    model = tokred.apply(MODELS[kind](), method)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(run(model, given), expected)


@pytest.mark.parametrize("kind", ["flux", "wan", "hunyuan", "cogvideox"])
def test_saved_as_they_were(kind: str, tmp_path: Path):
    model, given = MODELS[kind](), inputs(kind)
    before, config = run(model, given), json.loads(model.to_json_string())
    tokred.apply(model, "tomesd", merge_mlp=True)
    model.save_pretrained(tmp_path)
    loaded = type(MODELS[kind]()).from_pretrained(tmp_path).eval()
    saved = json.loads(loaded.to_json_string())
    assert {k: saved[k] for k in config} == config
    assert torch.equal(run(loaded, given), before)


@pytest.mark.parametrize("kind", ["sd15", "flux", "wan"])
def test_adapters_of_peft(kind: str):
    """LoRA as diffusers has it, before a patch and after."""
    peft = pytest.importorskip("peft")
    given, outs = inputs(kind), []
    for first in (True, False):
        model = MODELS[kind]()
        if first:
            tokred.apply(model, "tomesd", max_downsample=2)
        torch.manual_seed(2)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
        if not first:
            tokred.apply(model, "tomesd", max_downsample=2)
        outs.append(run(model.eval(), given))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], run(tokred.apply(MODELS[kind](), "tomesd", max_downsample=2), given))


def test_image_prompts_of_a_unet():
    """The processors of an IP-Adapter, with the UNet's own projection of the image."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, given = MODELS["sd15"](), inputs("sd15")
    torch.manual_seed(5)
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=3)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    found: dict[str, Any] = {}
    for name in model.attn_processors:
        if "attn2" in name:
            width = model.get_submodule(name.removesuffix(".processor")).to_q.in_features
            found[name] = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(3,), scale=0.5)
        else:
            found[name] = AttnProcessor2_0()
    model.set_attn_processor(found)
    given["added_cond_kwargs"] = {"image_embeds": [embeds(2, 1, 6)]}
    before = run(model, given)
    tokred.apply(model, "tomesd", max_downsample=8, merge_crossattn=True, merge_mlp=True)
    after = run(model, given)
    assert tokred.report(model).reduced == len(tokred.report(model).sublayers)
    given["added_cond_kwargs"] = {"image_embeds": [embeds(2, 1, 6, seed=1)]}
    assert not torch.equal(run(model, given), after)
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.8


@pytest.mark.parametrize(("method", "parameters"), [("tomesd", {"max_downsample": 2}), ("todo", {"factors": (1, 2)})])
def test_image_prompts_of_flux(method: str, parameters: dict[str, Any]):
    """Their attention has few keys of its own, and is none of the method's business."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

    model, given = MODELS["flux"](), inputs("flux")
    torch.manual_seed(5)
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=3)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.set_attn_processor(
        {
            name: FluxAttnProcessor() if "single" in name else FluxIPAdapterAttnProcessor(16, 12, num_tokens=(3,))
            for name in model.attn_processors
        }
    )

    def prompted(seed: int) -> Tensor:
        extra = {"ip_adapter_image_embeds": [embeds(2, 1, 6, seed=seed)]}
        return run(model, {**given, "joint_attention_kwargs": extra})

    before = prompted(0)
    tokred.apply(model, method, **parameters)
    after = prompted(0)
    assert {row.left for row in tokred.report(model).sublayers if row.role == "self"} < {16, 32}
    assert not torch.equal(after, prompted(1))
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.8


def test_a_controlnet_of_flux():
    model, given = MODELS["flux"](), inputs("flux")
    tokred.apply(model, "tomesd", max_downsample=2, merge_mlp=True)
    plain = run(model, given)
    zeros = {"controlnet_block_samples": [torch.zeros(2, 64, 16)], "controlnet_single_block_samples": [0 * embeds(1)]}
    assert torch.equal(run(model, {**given, **zeros}), plain)
    zeros["controlnet_block_samples"] = [torch.full((2, 64, 16), 0.1)]
    assert not torch.equal(run(model, {**given, **zeros}), plain)


def test_a_timestep_for_each_token():
    """As Wan 2.2 has it: tokens of a given first frame stand at time zero, and gates are those of the tokens."""
    model, given = MODELS["wan"](), inputs("wan")
    n = FRAMES * 64

    def at(time: int) -> dict[str, Any]:
        times = torch.full((2, n), time)
        times[:, :64] = 0
        return {**given, "timestep": times}

    before = run(model, at(7))
    with tokred.applied(model, "tomesd", ratio=0.0):
        assert torch.equal(run(model, at(7)), before)
    tokred.apply(model, "tomesd", max_downsample=2, merge_mlp=True)
    rows = []
    for time in (7, 7, 8):
        after = run(model, at(time))
        plan = next(iter(model.__dict__["_tokred"].plans.values()))
        rows.append(plan.reduction.representative[0, -16:])
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.8
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2]), "steps draw anew"


def test_patches_over_frames():
    """As CogVideoX 1.5 has them: a token stands for two frames."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=1, sample_width=16, sample_height=16, patch_size_t=2, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    given = inputs("cogvideox")
    given["hidden_states"] = embeds(2, 4, 4, 16, 16)
    given["image_rotary_emb"] = (torch.ones(128, 16), torch.zeros(128, 16))
    before = run(model, given)
    tokred.apply(model, "todo", factors=(1, 2))
    after = run(model, given)
    assert [(r.tokens, r.left) for r in tokred.report(model).sublayers if r.role == "self"] == [(128, 32)]
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.8


@pytest.mark.hosts
def test_blocks_that_are_compiled_one_by_one():
    """Regional compilation, as diffusers has it."""
    model, given = tokred.apply(MODELS["wan"](), "tomesd", max_downsample=2), inputs("wan")
    steps = [{**given, "timestep": torch.full((2,), time)} for time in (7, 6)]
    plain = [run(model, step) for step in steps]
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for step, expected in zip(steps, plain, strict=True):
        torch.testing.assert_close(run(model, step), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("flux", tokred.ToMeSD(max_downsample=2, merge_mlp=True)), ("wan", tokred.ToDo(factors=(1, 2)))],
)
def test_training_with_checkpoints(kind: str, method: tokred.Method):
    model, given = tokred.apply(MODELS[kind]().train(), method), inputs(kind)
    found = []
    for checkpoints in (True, False):
        model.zero_grad()
        (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        model(**given).sample.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_mlps_alone():
    """Where an MLP shares a tensor with its attention, the attention would have to follow."""
    model = tokred.apply(MODELS["flux"](), "tomesd", max_downsample=2, merge_attn=False, merge_mlp=True)
    run(model, inputs("flux"))
    left = {(row.name, row.role): row.left for row in tokred.report(model).sublayers}
    assert left["transformer_blocks.0.ff", "mlp"] == 32
    assert left["single_transformer_blocks.0.mlp", "mlp"] == 64
    assert {tokens for (_, role), tokens in left.items() if role == "self"} == {64}
