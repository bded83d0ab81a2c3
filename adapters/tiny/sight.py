"""A model with vision whose weights are written by hand, for showing what visual tokens are worth: it names colours.

Its pictures are 8 x 8 patches, some of which hold a pattern in some colour. Asked for a pattern, it answers with the
pattern's colour, as long as that patch's token is there. The tower's class token looks at whatever has a pattern; the
first three layers of the language model look at what is asked for, and the fourth says its colour.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.tiny.recall import CODE, MATCH, PAIRS

SIDE, PATCH = 8, 8  # patches of a picture's side, and pixels of a patch's
PATTERNS = 16
COLOURS = {
    "red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0), "yellow": (0.71, 0.71, 0.11),
    "purple": (0.71, 0.11, 0.71), "cyan": (0.11, 0.71, 0.71),
}  # fmt: skip
FEATURES = 3 + PATTERNS  # of a patch: its mean colour, and how much of each pattern is in it
IMAGE = 3  # placeholder of a visual token, after the three special ones
FIRST_PATTERN = 4
FIRST_COLOUR = FIRST_PATTERN + PATTERNS
WORDS = FIRST_COLOUR + len(COLOURS)
WIDTH = 2 * (FEATURES + 1)  # of the tower: features, and their mirror images, so that their mean is zero
LEVEL = 8.0  # of two channels that are the same everywhere, so that norms change nothing
SALIENCE = 24.0  # how much more the class token attends to patterns than to the rest


class Questions(NamedTuple):
    """Pictures and questions about them.

    Attributes:
        pixels: ``(N, 3, 64, 64)`` float32 in 0..1.
        ids: ``(N, 66)`` int64, the prompts: the first token, the picture's 64, and the pattern that is asked for.
        answers: ``(N,)`` int64, the tokens of the colours.
        places: ``(N,)`` int64, the patches that the answers stand in.
    """

    pixels: Tensor
    ids: Tensor
    answers: Tensor
    places: Tensor

    def batch(self, some: slice = slice(None)) -> dict[str, Tensor]:
        """Arguments of ``generate`` for some of the samples."""
        ids = self.ids[some]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[some]}


def build() -> Any:
    """A ``LlavaForConditionalGeneration`` in evaluation mode and float32: a tower of two layers, four decoder layers.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE * PATCH,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=WORDS, hidden_size=3 * CODE, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2 * CODE, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.zero_()
        _write_tower(model)
        _write_projector(model.model.multi_modal_projector)
        _write_language(model)
    return model.eval()


def _patterns() -> Tensor:
    """``(PATTERNS, 8, 8)`` of ones and minus ones: Walsh functions, each as often the one as the other."""
    rows = torch.ones(1, 1)
    while len(rows) < PATCH:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    planes = torch.einsum("ay,bx->abyx", rows, rows).reshape(-1, PATCH, PATCH)
    return planes[1 : PATTERNS + 1]


def _codes() -> Tensor:
    """``(PATTERNS, CODE)``: directions of ones and minus ones for the patterns, at right angles to one another."""
    rows = torch.ones(1, 1)
    while len(rows) < CODE:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[1 : PATTERNS + 1]


def _write_tower(model: Any) -> None:
    tower = next(part for part in model.modules() if hasattr(part, "patch_embedding"))
    kernel, mirrored = tower.patch_embedding.weight, FEATURES + 1
    for i in range(3):
        kernel[i, i] = 1 / PATCH**2
    kernel[3:FEATURES] = _patterns()[:, None] / (PATCH**2 / 2)
    kernel[mirrored : mirrored + FEATURES] = -kernel[:FEATURES]
    tower.position_embedding.weight[:, FEATURES] = LEVEL
    tower.position_embedding.weight[:, mirrored + FEATURES] = -LEVEL
    for attention in (part for name, part in model.named_modules() if "vision" in name and hasattr(part, "k_proj")):
        attention.k_proj.weight[0, 3:FEATURES] = SALIENCE
        attention.q_proj.bias[0] = math.sqrt(WIDTH)


def _write_projector(projector: Any) -> None:
    """A visual token is its colour, its pattern's code as a thing to be found by, and a level that is always there."""
    shift = 6.0  # where GELU is a straight line
    projector.linear_1.weight[:FEATURES, :FEATURES] = torch.eye(FEATURES)
    projector.linear_1.bias[:FEATURES] = shift
    out = projector.linear_2.weight
    out[:3, :3] = torch.eye(3) * LEVEL
    out[CODE : 2 * CODE, 3:FEATURES] = _codes().T * LEVEL
    projector.linear_2.bias.copy_(-shift * out.sum(1))
    projector.linear_2.bias[-1] = 3 * LEVEL


def _write_language(model: Any) -> None:
    language = model.model.language_model
    language.embed_tokens.weight[FIRST_PATTERN:FIRST_COLOUR, :CODE] = _codes()
    model.lm_head.weight[FIRST_COLOUR:, 2 * CODE : 2 * CODE + 3] = torch.tensor(list(COLOURS.values()))
    slow = torch.tensor([*range(PAIRS, CODE), *range(CODE + PAIRS, 2 * CODE)])
    code = torch.arange(CODE)
    for layer in language.layers:
        layer.self_attn.q_proj.weight[slow, code] = math.sqrt(MATCH)
        layer.self_attn.k_proj.weight[slow, CODE + code] = math.sqrt(MATCH)
    says = language.layers[-1].self_attn
    says.v_proj.weight[code[:3], code[:3]] = 1.0
    says.o_proj.weight[2 * CODE + code[:3], code[:3]] = 1.0


def questions(count: int, seed: int = 0) -> Questions:
    """Grey pictures with all of the patterns, each once, in colours and places that are drawn.

    Args:
        count: of pictures, each with one question.
        seed: of them.
    """
    g = torch.Generator().manual_seed(seed)
    colours, masks = torch.tensor(list(COLOURS.values())), (1 + _patterns()) / 2
    pixels = 0.3 + 0.02 * torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH, generator=g)
    slope = torch.linspace(-0.1, 0.1, SIDE * PATCH)
    pixels = pixels + slope[:, None] * torch.rand(count, 1, 1, 1, generator=g)
    ids, answers, places = [], [], []
    for picture in pixels:
        where = torch.randperm(SIDE**2, generator=g)[:PATTERNS]
        drawn = torch.randint(0, len(COLOURS), (PATTERNS,), generator=g)
        for at, colour, mask in zip(where.tolist(), drawn.tolist(), masks, strict=True):
            y, x = at // SIDE * PATCH, at % SIDE * PATCH
            picture[:, y : y + PATCH, x : x + PATCH] = colours[colour][:, None, None] * mask
        asked = int(torch.randint(0, PATTERNS, (1,), generator=g))
        ids.append(torch.tensor([1, *[IMAGE] * SIDE**2, FIRST_PATTERN + asked]))
        answers.append(FIRST_COLOUR + drawn[asked])
        places.append(where[asked])
    return Questions(pixels.clamp(0, 1), torch.stack(ids), torch.stack(answers), torch.stack(places))
