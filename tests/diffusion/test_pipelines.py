"""Pipelines, and what users add to a denoiser: ControlNet, LoRA, IP-Adapter, other processors, offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokred
from tests.diffusion.tiny import inputs, run, sd15, unet


def stable_diffusion(**parts: Any) -> Any:
    """A pipeline without tokenizer and text encoder: it is given embeddings of prompts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    components: dict[str, Any] = {
        "vae": vae, "text_encoder": None, "tokenizer": None, "unet": sd15(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    pipe = StableDiffusionPipeline(**{**components, **parts}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, seed: int = 0, **more: Any) -> torch.Tensor:
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(9))
    out = pipe(
        prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), num_inference_steps=3, height=32, width=32,
        generator=torch.Generator().manual_seed(seed), output_type="pt", **more,
    )  # fmt: skip
    return out.images


def test_a_pipeline():
    pipe = stable_diffusion()
    before = image(pipe)
    assert tokred.apply(pipe, "tomesd", ratio=0.5) is pipe
    first, other, again = image(pipe), image(pipe, seed=1), image(pipe)
    assert torch.equal(first, again), "the same seed gives the same image at every call"
    assert not torch.equal(first, before)
    assert not torch.equal(first, other)
    assert tokred.report(pipe).reduced > 0
    assert tokred.remove(pipe) is pipe
    assert torch.equal(image(pipe), before)
    with tokred.applied(pipe, "todo"):
        assert not torch.equal(image(pipe), before)
    with tokred.applied(pipe, "tomesd", ratio=0.0):
        assert torch.equal(image(pipe), before)
    assert torch.equal(image(pipe), before)
    assert {row.method for row in tokred.supports(pipe) if row.works} >= {"tomesd", "todo"}


def test_plans_kept_over_steps_give_the_same_image_at_every_call():
    pipe = stable_diffusion()
    tokred.apply(pipe, "tomesd", refresh=2, share="resolution", max_downsample=2)
    assert torch.equal(image(pipe), image(pipe))


def test_a_patched_pipeline_is_saved_as_it_was(tmp_path: Path):
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline(unet(), DDIMScheduler())
    before = run(pipe.unet, inputs("unet"))
    tokred.apply(pipe, "tomesd")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(DDPMPipeline.from_pretrained(tmp_path).unet.eval(), inputs("unet")), before)


def test_a_pipeline_without_a_denoiser():
    with pytest.raises(tokred.UnsupportedModelError, match="StableDiffusionPipeline has no denoiser"):
        tokred.apply(stable_diffusion(unet=None), "tomesd")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        tokred.apply(object(), "tomesd")


def test_residuals_of_a_controlnet():
    from diffusers import ControlNetModel

    model, given = sd15(), inputs("sd15")
    control = ControlNetModel.from_unet(model, conditioning_channels=3).eval()
    tokred.apply(model, "tomesd", max_downsample=8)
    plain = run(model, given)
    with torch.no_grad():
        picture = torch.rand(2, 3, 128, 128)
        down, mid = control(
            given["sample"], 7, given["encoder_hidden_states"], controlnet_cond=picture, return_dict=False
        )
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert torch.equal(run(model, {**given, **more}), plain), "a fresh ControlNet adds zeros"
    added = {
        "down_block_additional_residuals": [d + 0.1 for d in down],
        "mid_block_additional_residual": mid + 0.1,
    }
    assert not torch.equal(run(model, {**given, **added}), plain)


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, put in its place as LoRA does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_lora_before_and_after():
    given, outs = inputs("sd15"), []
    for first in (True, False):
        model = sd15()
        torch.manual_seed(3)
        if first:
            tokred.apply(model, "tomesd", max_downsample=8)
        for name in list(model.attn_processors):
            attention = model.get_submodule(name.removesuffix(".processor"))
            for linear in ("to_q", "to_k", "to_v"):
                setattr(attention, linear, LowRank(getattr(attention, linear)))
            attention.to_out[0] = LowRank(attention.to_out[0])
        if not first:
            tokred.apply(model, "tomesd", max_downsample=8)
        outs.append(run(model.eval(), given))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], run(tokred.apply(sd15(), "tomesd", max_downsample=8), given))


@pytest.mark.parametrize("crossed", [False, True])
def test_ip_adapter_processors(crossed: bool):
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "tomesd", max_downsample=8, merge_crossattn=crossed)
    torch.manual_seed(5)
    found = {}
    for name in model.attn_processors:
        if "attn2" in name:
            width = 16 if name.startswith(("down_blocks.0", "up_blocks.1")) else 32
            found[name] = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(3,), scale=0.5)
        else:
            found[name] = AttnProcessor2_0()
    model.set_attn_processor(found)
    states = (given["encoder_hidden_states"], [torch.randn(2, 1, 3, 12)])
    # The projection of images is no part of this: states are handed to the blocks as the UNet would make them.
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    x = torch.randn(2, 256, 16)
    model.__dict__["_tokred"].begin((16, 16), 7)
    with torch.no_grad():
        out = block(x, encoder_hidden_states=states)
        masks = [torch.ones(1, 1, 16, 16)]
        masked = block(x, encoder_hidden_states=states, cross_attention_kwargs={"ip_adapter_masks": masks})
        other = block(x, encoder_hidden_states=(states[0], [states[1][0] * 3]))
    records = model.__dict__["_tokred"].records
    assert out.shape == masked.shape == x.shape
    assert not torch.equal(out, other)
    cross = next(r for r in records.values() if r.role == "cross")
    assert cross.left == (128 if crossed else 256)
    if not crossed:
        torch.testing.assert_close(out, masked)


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("method", ["tomesd", "todo"])
def test_other_processors(name: str, method: str):
    from diffusers.models import attention_processor

    cls = getattr(attention_processor, name)
    processor = cls(1) if name == "SlicedAttnProcessor" else cls()
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, method)
    expected = run(model, given)
    model.set_attn_processor(processor)
    torch.testing.assert_close(run(model, given), expected, rtol=1e-4, atol=1e-5)


def test_fused_projections():
    given = inputs("sd15")
    model = tokred.apply(sd15(), "tomesd", max_downsample=8)
    expected = run(model, given)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, given), expected, rtol=1e-4, atol=1e-5)
    tokred.remove(model)
    model.unfuse_qkv_projections()
    expected = run(tokred.apply(model, "todo", factors=(2, 2)), given)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, given), expected, rtol=1e-4, atol=1e-5)


def test_a_processor_that_does_its_own_thing():
    class Doubling:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return attn.to_q(hidden_states)

    model = tokred.apply(sd15(), "tomesd")
    model.set_attn_processor(Doubling())
    with pytest.raises(tokred.UnsupportedModelError, match=r"Doubling of .*attn1 does not use"):
        run(model, inputs("sd15"))


def test_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    given = inputs("sd15")
    expected = run(tokred.apply(sd15(), "tomesd"), given)
    for first in (True, False):
        model = sd15()
        if first:
            tokred.apply(model, "tomesd")
        accelerate.cpu_offload_with_hook(model, execution_device="cpu")
        if not first:
            tokred.apply(model, "tomesd")
        assert torch.equal(run(model, given), expected)


def test_forward_in_chunks():
    given = inputs("sd15")
    model = tokred.apply(sd15(), "tomesd", merge_mlp=True)
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(64, 1)
    assert run(model, given).isfinite().all()
    assert {row.left for row in tokred.report(model).sublayers if row.role == "mlp"} == {64}


def test_two_models_in_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    models = [tokred.apply(sd15(), "tomesd", seed=i) for i in range(2)]
    given = [inputs("sd15", seed=i) for i in range(2)]
    alone = [run(m, g) for m, g in zip(models, given, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            both = list(pool.map(run, models, given))
            assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
