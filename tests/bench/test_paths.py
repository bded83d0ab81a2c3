"""The paths of users, from a model in memory to a plot in at most eight lines: tiny models, and real weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

import tokred
from tests.bench import saved

QUICK: dict[str, Any] = {"progress": False, "rounds": 1, "baselines": False}


def drawn(path: Path, result: Any) -> None:
    """A plot, and a table without gaps."""
    assert path.stat().st_size > 5000
    assert not any(row["reason"] for row in result.rows), str(result)


def test_a_fine_tuned_model_of_timm_and_a_loader(tmp_path):
    timm = pytest.importorskip("timm")
    from torch.utils.data import DataLoader, TensorDataset

    model = timm.create_model("test_vit", num_classes=3)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 160, 160), torch.arange(8) % 3), batch_size=4)
    result = tokred.benchmark(model, ["tome r=8", "evit kappa=0.7"], loader, "top1", **QUICK)
    drawn(result.plot(tmp_path / "timm.png"), result)
    assert result.metric == "top1"


def test_a_language_model_and_a_text_file(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = saved.llama(tmp_path / "llama"), saved.book(tmp_path / "book.txt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(file.read_text(), return_tensors="pt").input_ids
    windows = list(ids[:, : ids.shape[1] // 128 * 128].view(-1, 1, 128))
    result = tokred.benchmark(model, ["snapkv budget=0.25", "knorm budget=0.25"], windows, **QUICK)
    drawn(result.plot(tmp_path / "text.png"), result)
    assert (result.run, result.metric) == ("text", "perplexity")
    assert len(windows) == result.rows[0]["samples"] == 4


def stable_diffusion() -> Any:
    """A pipeline of Stable Diffusion with everything that makes a prompt into a picture, tiny."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from tokred.adapters.tiny import diffusion

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    words = saved.tokenizer()
    words.model_max_length = 8
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=2, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    text = CLIPTextModel(config)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=diffusion.build("sd15"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def test_a_pipeline_of_diffusers_and_prompts(tmp_path):
    pytest.importorskip("diffusers")
    pipe = stable_diffusion()
    prompts = [{"prompt": ["a red fox", "a blue dog"], "num_inference_steps": 2, "height": 32, "width": 32},
               {"prompt": ["a fox in snow"], "num_inference_steps": 2, "height": 32, "width": 32}]  # fmt: skip
    result = tokred.benchmark(pipe, ["tomesd ratio=0.5", "todo"], prompts, **QUICK)
    drawn(result.plot(tmp_path / "images.png"), result)
    assert (result.run, result.metric) == ("pipeline", "psnr")
    assert [row["samples"] for row in result.rows] == [3, 3, 3]
    assert result.rows[0]["quality"] == 100 > result.rows[1]["quality"], "the same seeds give the same pictures"
    assert result.rows[1]["denoiser_seconds"] > 0


def test_a_model_with_vision_and_questions(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = saved.llava(tmp_path / "llava")
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    pictures = [image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    questions = [{"images": pictures, "prompt": ["<image> what is this", "<image> fox"], "answers": ["red", "blue"]}]
    methods = ["divprune budget=4", "fastv layer=1 ratio=0.5", "snapkv budget=0.5 window=4"]
    result = tokred.benchmark(model, methods, questions, "exact", tokenizer=processor, max_new_tokens=3, **QUICK)
    drawn(result.plot(tmp_path / "answers.png"), result)
    assert result.run == "generate"
    assert result.against == "answers"
    assert all(row["generated"] == 3 for row in result.rows)


def test_whisper_and_recordings(tmp_path, capfd):
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = saved.whisper(tmp_path / "whisper")
    model, tokenizer = WhisperForConditionalGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    features = WhisperFeatureExtractor.from_pretrained(folder)
    model.generation_config.max_length = 40  # as real ones have
    sounds = [torch.randn(32000, generator=torch.Generator().manual_seed(i)).numpy() for i in range(2)]
    heard = [{**features(x, sampling_rate=16000, return_tensors="pt"), "text": "a red fox"} for x in sounds]
    result = tokred.benchmark(model, ["tome r=8"], heard, "wer", tokenizer=tokenizer, max_new_tokens=4, **QUICK)
    drawn(result.plot(tmp_path / "speech.png"), result)
    assert result.against == "text"
    assert result.rows[1]["encoder_seconds"] > 0
    assert model.generation_config.max_length == 40
    assert "max_length" not in capfd.readouterr().err, "no warning at every call"


# ------------------------------------------------------------------------------------ real weights


def real(test):
    """A test on weights of the zoo, which says how to get them where they are missing."""

    @functools.wraps(test)
    def run():
        from benchmarks.zoo.carriers import MissingWeights

        try:
            test()
        except MissingWeights as error:
            pytest.skip(str(error))

    return run


@pytest.mark.weights
@real
def test_smollm2_and_a_text():
    from benchmarks.zoo import data, smollm2

    model, tokenizer = smollm2.load()
    ids = tokenizer(data.devils_dictionary(), return_tensors="pt").input_ids[:, : 4 * 512]
    result = tokred.benchmark(model, ["snapkv budget=0.25"], list(ids.view(-1, 1, 512)), progress=False)
    rows = {row["method"]: row for row in result.rows}
    assert 5 < rows["unpatched"]["quality"] < 100
    assert 0 < rows["snapkv"]["difference"] < 1
    assert rows["random_evict"]["difference"] > rows["snapkv"]["difference"], "most of what is read again is copied"
    assert rows["snapkv"]["bytes"] < 0.3 * rows["snapkv"]["dense_bytes"]


@pytest.mark.weights
@real
def test_the_small_model_with_vision_and_questions():
    from benchmarks.zoo import vlm

    model, tokenizer = vlm.build()
    scenes = vlm.scenes("test", 8)
    ends = {"eos_token_id": [tokenizer.convert_tokens_to_ids("."), tokenizer.eos_token_id]}
    batches = []
    # It is right about two of three scenes, and about one of the first four: the others take half of the time.
    for images, labels in zip(scenes.images[4:].split(2), scenes.labels[4:].split(2), strict=True):
        right = {"answers": [f"{vlm.CLASSES[y]}." for y in labels]}
        batches.append({**vlm.inputs(tokenizer, images), **ends, **right})
    result = tokred.benchmark(
        model, ["divprune budget=64"], batches, "exact", tokenizer=tokenizer, max_new_tokens=6, rounds=1,
        pairs=1, progress=False,
    )  # fmt: skip
    rows = {row["method"]: row for row in result.rows}
    assert rows["unpatched"]["quality"] >= 0.5
    assert rows["divprune"]["tokens_out"] == rows["divprune"]["tokens_in"] - 192
    assert rows["divprune"]["tower_seconds"] > rows["divprune"]["selection_seconds"] > 0
    assert {"random_visual", "uniform_visual", "downsample_visual"} < set(rows)


@pytest.mark.weights
@real
def test_whisper_and_real_recordings():
    from benchmarks.zoo import data, whisper

    model, tokenizer, features = whisper.load()
    spoken = data.speech(("demo-thanks", "demo-congrats"))
    heard = [features(one.audio, sampling_rate=whisper.RATE, return_tensors="pt").data for one in spoken]
    result = tokred.benchmark(
        model, ["tome r=200"], heard, "wer", tokenizer=tokenizer, max_new_tokens=60, rounds=1, progress=False,
        baselines=False,
    )  # fmt: skip
    assert result.rows[0]["quality"] == 0
    assert result.rows[1]["quality"] < 0.5
    assert result.rows[0]["generated"] > 5


@pytest.mark.weights
@real
def test_the_terrain_model_and_noise():
    from benchmarks.zoo import terrain

    def sample(model, seed):
        return (model.sample(2, seed=seed) + 1) / 2

    result = tokred.benchmark(
        terrain.load(), ["tomesd ratio=0.5 max_downsample=4"], [0, 1], "psnr", run=sample, progress=False
    )
    rows = {row["method"]: row for row in result.rows}
    assert rows["unpatched"]["quality"] == 100
    assert 10 < rows["tomesd"]["quality"] < 60
    assert {"random_latent_prune", "todo"} < set(rows)
