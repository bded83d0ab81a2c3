"""transformers: the tables of text encoders, and of the heads around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokred.adapters.contract import terms, words

Demand = str | Callable[[Any], str]


@dataclass(frozen=True)
class TextEncoder:
    """One encoder class.

    Attributes:
        layers: where its list of layers is.
        windowed: some layers attend within windows of positions, so their masks say more than what is padding.
        positions: keyword arguments of a layer that follow the tokens, and how.
        keys: sub-module of a layer that makes the keys before rotary embedding, fused with queries and values.
    """

    layers: str
    windowed: bool = False
    positions: dict[str, Callable[..., Any]] = field(default_factory=dict)


def gather_tables(tables: tuple[Tensor, ...], representative: Tensor, prefix: int) -> tuple[Tensor, ...]:
    """Cosine and sine tables ``(1 or B, N, D)`` at the rows that are left, ``(B, M, D)``."""
    b = representative.shape[0]
    index = representative.unsqueeze(-1)
    return tuple(t.expand(b, -1, -1).gather(1, index.expand(-1, -1, t.shape[-1])) for t in tables)


_BERT = TextEncoder("encoder.layer")
ENCODERS = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "CamembertModel": _BERT,
    "ElectraModel": _BERT,
    "ErnieModel": _BERT,
    "DistilBertModel": TextEncoder("transformer.layer"),
    "ModernBertModel": TextEncoder("layers", windowed=True, positions={words.TABLES.name: gather_tables}),
}


def _modern(model: Any) -> str:
    pool = words.POOLING.need(words.CONFIG.need(model))
    return "short" if pool in terms.FIRST_TOKEN.names else "last"


# Start of the class names, where the encoder is, what the model does with the tokens by the rest of the name.
_FAMILIES = {
    "Bert": "bert",
    "Roberta": "roberta",
    "XLMRoberta": "roberta",
    "Camembert": "roberta",
    "Electra": "electra",
    "Ernie": "ernie",
    "DistilBert": "distilbert",
    "ModernBert": "model",
}
_HEADS: dict[str, Demand] = {
    "ForSequenceClassification": "short",
    "ForMultipleChoice": "short",
    "ForNextSentencePrediction": "short",
    "ForTokenClassification": "last",
    "ForQuestionAnswering": "last",
    "ForMaskedLM": "last",
    "ForPreTraining": "last",
}
HEADS: dict[str, tuple[str, Demand]] = {
    family + head: (path, _modern if family == "ModernBert" and demand == "short" else demand)
    for family, path in _FAMILIES.items()
    for head, demand in _HEADS.items()
}
