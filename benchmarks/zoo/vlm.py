"""A small real VLM as transformers' LLaVA: DINOv2 ViT-S/14 at 224 px (256 tokens), two-layer projector, SmolLM2-135M.

Both ends are frozen and come from the carriers of :mod:`benchmarks.zoo.dinov2` and :mod:`benchmarks.zoo.smollm2`; the
projector was trained by ``benchmarks/vlm/train.py`` and lies beside this file. The model names the piece of clothing
in a scene: an item of Fashion-MNIST, 84 to 224 pixels large, anywhere on a cloudy background.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import data, dinov2, smollm2

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
        PreTrainedTokenizerBase,
    )

PROJECTOR = Path(__file__).parent / "vlm_projector.safetensors"
QUESTIONS = Path(__file__).parent / "vlm_questions.safetensors"
CLIPS = Path(__file__).parent / "vlm_clips.safetensors"  # for clips of up to 64 frames
SIZE, GRID = 224, 16
FRAME = (GRID // 2) ** 2
# Layers of the language model to whose weights a training may add products of two small matrices.
ADDED = ("q_proj", "k_proj", "v_proj", "o_proj")
TIMES = 2  # the product's factor: LoRA's alpha over its rank
# A token that no text has: SmolLM2's vocabulary keeps some for code.
IMAGE_TOKEN, STILL_TOKEN = "<empty_output>", "<file_sep>"
PROMPT = "This is a picture of a"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Scenes(NamedTuple):
    """Pictures ``[N, 3, 224, 224]`` uint8, the class of the item in each ``[N]``, and the share of each patch that it
    covers ``[N, 16, 16]``."""

    images: Tensor
    labels: Tensor
    covered: Tensor


def scenes(part: str, count: int, seed: int = 0) -> Scenes:
    """Items of Fashion-MNIST on cloudy backgrounds; the same for the same arguments.

    Args:
        part: "train" or "test".
        count: how many, no item twice.

    Raises:
        MissingWeights: the data set is absent.
    """
    items = data.fashion_mnist(part)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(items.images), generator=draw)[:count]
    images, covered = [], []
    for item in items.images[chosen]:
        side = int(torch.randint(84, SIZE + 1, (), generator=draw))
        top, left = (int(torch.randint(0, SIZE - side + 1, (), generator=draw)) for _ in range(2))
        x = F.interpolate(item[None].float() / 255, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)[0]
        shape = (x > 0.08).float()
        clouds = torch.rand(1, 1, 6, 6, generator=draw) * (0.1 + 0.5 * torch.rand((), generator=draw))
        canvas = F.interpolate(clouds, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)[0]
        cover = torch.zeros_like(canvas)
        box = (slice(None), slice(top, top + side), slice(left, left + side))
        canvas[box] = canvas[box] * (1 - shape) + x * shape
        cover[box] = shape
        images.append((canvas * 255).round().to(torch.uint8).expand(3, -1, -1))
        covered.append(F.avg_pool2d(cover, dinov2.PATCH)[0])
    return Scenes(torch.stack(images), items.labels[chosen], torch.stack(covered))


def build(projector: Path | None = PROJECTOR) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model in evaluation mode, and the language model's tokenizer.

    Args:
        projector: its weights; None: as the configuration initialises them.

    Raises:
        MissingWeights: a carrier is absent.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokens = {"image_token_index": IMAGE_TOKEN}
    more = {"image_seq_length": GRID * GRID, "projector_hidden_act": "gelu"}
    return _assembled(LlavaConfig, LlavaForConditionalGeneration, projector, tokens, **more)


def build_video(
    projector: Path = QUESTIONS,
) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model for clips, as transformers' LLaVA-OneVision: a frame has 64 tokens, averaged in windows of 2 x 2.

    Args:
        projector: weights that ``benchmarks vlm/train_questions`` trained on questions about pictures and clips.

    Raises:
        MissingWeights: a carrier is absent.
        FileNotFoundError: there is no such file.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokens = {
        "image_token_id": STILL_TOKEN,
        "video_token_id": IMAGE_TOKEN,
        "image_token_index": STILL_TOKEN,
        "video_token_index": IMAGE_TOKEN,
    }
    model, tokenizer = _assembled(LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, projector, tokens)
    core: Any = model.model
    # Position embeddings are those of 518 pixels, which the tower interpolates; the grid of a frame is that of 224.
    core.config.vision_config.image_size = SIZE
    with torch.no_grad():
        # Training saw no token behind a clip: a line feed, which the language model knows, says that it is over.
        core.image_newline.copy_(core.get_input_embeddings().weight[tokenizer.encode("\n")[0]])
    return model, tokenizer


def _assembled(
    config_class: Any, model_class: Any, projector: Path | None, tokens: dict[str, str], **more: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model of the tower, the projector and the language model, and the tokenizer.

    Args:
        config_class, model_class: of transformers.
        projector: weights; None: as the configuration initialises them.
        tokens: from fields of the configuration to the tokens whose ids they are.
        more: fields of the configuration.
    """
    from transformers import Dinov2Config

    llm, tokenizer = smollm2.load()
    tower = dinov2.load_hf()
    vision = tower.config.to_dict()
    config = config_class(
        vision_config=Dinov2Config(**{k: v for k, v in vision.items() if k != "model_type"}),
        text_config=llm.config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
        **more,
    )
    model = model_class(config)
    core = model.model
    core.vision_tower.load_state_dict(tower.state_dict())
    core.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.generation_config = llm.generation_config
    if projector is not None:
        restore(model, projector)
    return model.eval(), tokenizer


@torch.no_grad()
def restore(model: nn.Module, path: Path) -> None:
    """Gives a model what :func:`save` wrote: its projector's weights, and products that its attention's grow by.

    Args:
        model: LLaVA or LLaVA-OneVision, as it was before it was trained.
        path: a safetensors file.
    """
    from safetensors.torch import load_file

    core: Any = model.model
    llm: nn.Module = core.language_model
    state = {k: v.float() for k, v in load_file(path).items()}
    low = {k: state.pop(k) for k in [*state] if ".lora_" in k}
    core.multi_modal_projector.load_state_dict(state, strict=True)
    for name in [name.removesuffix(".lora_A") for name in low if name.endswith(".lora_A")]:
        down, up = low[f"{name}.lora_A"], low[f"{name}.lora_B"]
        llm.get_submodule(name).weight += TIMES * (up @ down)


def save(path: Path, projector: nn.Module, llm: nn.Module) -> None:
    """Writes what was trained in half precision: the projector, and what was added to the language model, if anything.

    Args:
        path: a safetensors file, which :func:`build` and :func:`build_video` take.
        projector: of the model.
        llm: the language model, where peft has put small matrices beside some of its layers.
    """
    from safetensors.torch import save_file

    low = {k.replace(".default.weight", ""): v for k, v in llm.state_dict().items() if ".lora_" in k}
    save_file({k: v.half().contiguous() for k, v in {**projector.state_dict(), **low}.items()}, path)


def clip_inputs(
    tokenizer: PreTrainedTokenizerBase, clips: Tensor, prompts: Sequence[str], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What the model for clips takes: pixels, and token ids with 64 places a frame and one more before the text.

    Args:
        clips: ``(B, T, 3, 224, 224)`` uint8.
        prompts: one of each, of as many tokens.
    """
    count, frames = clips.shape[:2]
    text = torch.tensor([tokenizer(one, add_special_tokens=False).input_ids for one in prompts])
    place = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    ids = torch.cat([start, torch.full((count, frames * FRAME + 1), place), text], 1)
    pixels = data.normalise(clips.flatten(0, 1)).unflatten(0, (count, frames)).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def inputs(
    tokenizer: PreTrainedTokenizerBase, images: Tensor, prompt: str = PROMPT, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What the model takes: pixels, and token ids with 256 places for each picture before the text."""
    text = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.expand(len(images), -1)
    place = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    start = torch.full((len(images), 1), tokenizer.bos_token_id)
    ids = torch.cat([start, torch.full((len(images), GRID * GRID), place), text], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": data.normalise(images).to(dtype)}


def asked(question: str) -> str:
    """The prompt of a question; of the beginning of a sentence, itself."""
    return f"Question: {question} Answer:" if question.endswith("?") else question


def ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of ``generate`` by which an answer ends behind its full stop."""
    stop = [tokenizer.convert_tokens_to_ids("."), tokenizer.eos_token_id]
    return {"eos_token_id": stop, "pad_token_id": stop[-1]}


def said(text: str) -> str:
    """An answer up to its full stop."""
    return text.split(".")[0].strip()


@torch.inference_mode()
def answers(model: Any, tokenizer: PreTrainedTokenizerBase, images: Tensor, tokens: int = 6) -> list[str]:
    """The greedy answer to each picture, up to its full stop."""
    given = inputs(tokenizer, images, dtype=model.dtype)
    out = model.generate(**given, max_new_tokens=tokens, do_sample=False, **ends(tokenizer))
    return [*map(said, tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True))]
