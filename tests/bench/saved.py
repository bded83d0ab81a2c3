"""Tiny models of every kind, saved to folders, and data for them, as a user has them on a disk."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import torch

TEXT = "the a red blue fox dog sits runs on in snow grass and then what is this colour one two three"
WORDS = TEXT.split()


def tokenizer(size: int = 99, image: int | None = None) -> Any:
    """A tokenizer of words with ids below ``size``; the last ids may stand for a picture."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for word in WORDS:
        vocabulary[word] = len(vocabulary)
    for i in range(len(vocabulary), size):
        vocabulary[f"w{i}" if i != image else "<image>"] = i
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {} if image is None else {"additional_special_tokens": ["<image>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


def llama(folder: Path) -> Path:
    from tokred.adapters.tiny import kv

    kv.build("llama").save_pretrained(folder)
    tokenizer(97).save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    t.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vit(folder: Path, classes: int = 2) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=classes,
    )  # fmt: skip
    t.ViTForImageClassification(config).save_pretrained(folder)
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = t.CLIPConfig(
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    t.CLIPModel(config).save_pretrained(folder)
    words = tokenizer()
    words.model_max_length = 16
    words.save_pretrained(folder)
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    import transformers as t

    from tokred.adapters.tiny import vlm

    vlm.build("llava").save_pretrained(folder)
    images = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    t.LlavaProcessor(
        images, tokenizer(99, vlm.IMAGE), patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def whisper(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=100,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    t.WhisperForConditionalGeneration(config).save_pretrained(folder)
    t.WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def ast(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_length=64,
        num_mel_bins=32, num_labels=3,
    )  # fmt: skip
    t.ASTForAudioClassification(config).save_pretrained(folder)
    t.ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)
    return folder


def videomae(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_frames=4, num_labels=3,
    )  # fmt: skip
    t.VideoMAEForVideoClassification(config).save_pretrained(folder)
    return folder


def unet(folder: Path) -> Path:
    from tokred.adapters.tiny import diffusion

    diffusion.build("unet", sample_size=16).save_pretrained(folder)
    return folder


def pipeline(folder: Path) -> Path:
    import diffusers

    from tokred.adapters.tiny import diffusion

    torch.manual_seed(0)
    diffusers.DDIMPipeline(diffusion.build("unet", sample_size=16), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def pictures(folder: Path, each: int = 4) -> Path:
    """Dark and bright pictures, a folder each."""
    from PIL import Image

    for name, level in (("blue", 30), ("red", 220)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (40 + i, 36), (level + i, level, level // 2)).save(folder / name / f"{i}.png")
    return folder


def book(file: Path, words: int = 600) -> Path:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    file.write_text(" ".join(WORDS[i] for i in chosen), "utf8")
    return file


def questions(folder: Path) -> Path:
    pictures(folder / "seen", 1)
    rows = [
        {"image": f"seen/{name}/0.png", "question": "what colour is this", "answer": name} for name in ("red", "blue")
    ]
    file = folder / "vqa.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf8")
    return file


def recordings(folder: Path, transcripts: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(("one two", "three")):
        sound(folder / f"{i}.wav", 8000, 1.0)
        if transcripts:
            (folder / f"{i}.txt").write_text(text, "utf8")
    return folder


def sound(file: Path, rate: int, seconds: float, channels: int = 1) -> Path:
    """A tone of 440 Hz."""
    t = torch.arange(int(rate * seconds)) / rate
    x = (torch.sin(2 * torch.pi * 440 * t) * 20000).to(torch.int16)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(x.repeat_interleave(channels).numpy().tobytes())
    return file
