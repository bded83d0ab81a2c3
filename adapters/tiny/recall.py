"""A language model whose weights are written by hand, for showing what a cache's rows are worth: it recalls.

Given a text in which every word stands once, and then one of its words again, it goes on with what stood behind that
word. The first layer copies to every token the one before it; the second looks for the token whose copy is the current
one, and says what it is. So an answer is right as long as the rows that it stands in are in the cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WORDS = 512  # in the vocabulary
CODE = 64  # channels of a word's code
PAIRS = CODE // 2  # of rotary channels; the slower half of all turns so little that codes can be compared
SHARP = 15.0  # how steep attention is to distances
MATCH = 3.0  # and to codes


def build(words: int = WORDS) -> Any:
    """A ``LlamaForCausalLM`` of two layers and one head of 128 channels, in evaluation mode and float32.

    Args:
        words: in its vocabulary, up to 512; special tokens are the first three.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=3 * CODE, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2 * CODE, max_position_embeddings=4096, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.zero_()
        codes = _codes(words)
        # A stream of three parts: the word itself, the one before it, and the answer.
        model.model.embed_tokens.weight[:, :CODE] = codes
        model.lm_head.weight[:, 2 * CODE :] = codes
        copies, looks = (layer.self_attn for layer in model.model.layers)
        _write_copy(copies)
        _write_look(looks)
    return model


def _codes(words: int) -> Tensor:
    """``(words, CODE)``: directions of ones and minus ones, which have little in common."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (words, CODE), generator=g).float().mul_(2).sub_(1)


def _write_copy(attention: Any) -> None:
    """Every token attends to the one before it, and takes over its word as its second part."""
    angle = 1e8 ** (-torch.arange(PAIRS) / CODE)
    # Keys all point one way before positions turn them; queries one step back from there.
    attention.k_proj.bias[:PAIRS] = SHARP
    attention.q_proj.bias[:PAIRS] = SHARP * angle.cos()
    attention.q_proj.bias[CODE : CODE + PAIRS] = -SHARP * angle.sin()
    _place(attention.v_proj.weight, range(CODE), 0)
    _place(attention.o_proj.weight.T, range(CODE), CODE)


def _write_look(attention: Any) -> None:
    """Every token attends to those that stood behind the same word before, and takes over their word as its third."""
    slow = [*range(PAIRS, CODE), *range(CODE + PAIRS, 2 * CODE)]
    _place(attention.q_proj.weight, slow, 0, math.sqrt(MATCH))
    _place(attention.k_proj.weight, slow, CODE, math.sqrt(MATCH))
    _place(attention.v_proj.weight, range(CODE), 0)
    _place(attention.o_proj.weight.T, range(CODE), 2 * CODE)


def _place(weight: Tensor, channels: Any, part: int, value: float = 1.0) -> None:
    """Channels of a head are those of the stream from ``part`` on."""
    for i, channel in enumerate(channels):
        weight[channel, part + i] = value


def texts(count: int, length: int = 120, answer: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts that end in a word of theirs, and what they have to be answered with.

    Args:
        count: of prompts.
        length: of a prompt, all of whose words but the last are different; up to 500.
        answer: words of an answer.
        seed: of the words, and of the place that is asked for.

    Returns:
        Token ids ``(count, length)`` and ``(count, answer)``, int64.

    Raises:
        ValueError: there are too few words.
    """
    if not answer + 2 <= length <= WORDS - 11:
        raise ValueError(f"length must lie in {answer + 2}..{WORDS - 11}, got {length}")
    g = torch.Generator().manual_seed(seed)
    prompts, answers = [], []
    for _ in range(count):
        ids = 3 + torch.randperm(WORDS - 3, generator=g)[: length - 1]
        at = int(torch.randint(0, length - 1 - answer, (1,), generator=g))
        prompts.append(torch.cat([ids, ids[at : at + 1]]))
        answers.append(ids[at + 1 : at + 1 + answer])
    return torch.stack(prompts), torch.stack(answers)
