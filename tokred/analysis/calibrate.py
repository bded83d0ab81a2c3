"""``calibrate``: statistics of a model's queries on a text, for policies that read them from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred import adapters
from tokred.adapters.contract import cache_kwargs, words
from tokred.adapters.kv.layer import TokLayer
from tokred.api import applied, kv_cache, patched
from tokred.kv.statistics import Statistics
from tokred.methods.kv.triattention import KIND, NOTES, TriAttention


def calibrate(model: nn.Module, texts: Iterable[Tensor | dict[str, Any]], out: str | Path | None = None) -> Statistics:
    """Means of the model's unrotated queries, and of their lengths, over the tokens of some texts.

    Any coherent text serves; some ten thousand tokens are enough for figures that change no more. Each text is read by
    itself, and none is kept.

    Args:
        model: a language model, patched with nothing.
        texts: token ids ``[B, N]`` without padding, or dicts that hold them as ``input_ids``.
        out: file to write; None: none.

    Returns:
        Statistics of kind ``"queries"``: ``centre`` ``[L, H, D/2, 2]``, ``length`` ``[L, H, D/2]`` and ``frequencies``
        ``[L, D/2]``, float32, of the layers that a policy acts on.

    Raises:
        UnsupportedModelError, MissingInputError: the model's cache takes no policies, or its rotary embedding cannot be
            undone.
        ValueError: there is no text, or the model is patched.

    Source: Mao et al., TriAttention, ICML 2026 (arXiv 2604.04921), section 4; the model's query norm is applied.
    """
    if patched(model):
        raise ValueError("the model is patched: call tokred.remove(model) first")
    host = adapters.find(model, "cache")
    facts = host.model_facts()
    policy = TriAttention(stats="prompt", budget=1 << 30, least=1)
    sums: list[list[Tensor]] = []
    turns: list[Tensor] = []
    count, digest = 0, hashlib.sha256()
    with applied(model, policy), torch.inference_mode():
        for text in texts:
            ids: Tensor = text["input_ids"] if isinstance(text, dict) else text
            cache = kv_cache(model, prompt=ids.shape[1])
            model(ids, **cache_kwargs(cache))
            digest.update(ids.cpu().numpy().tobytes())
            notes = [layer.notes for layer in words.LAYERS.need(cache) if isinstance(layer, TokLayer)]
            new = [[one[name].double().sum(0).cpu() for name in NOTES[:3]] for one in notes]
            sums = (
                new
                if not sums
                else [[a + b for a, b in zip(*both, strict=True)] for both in zip(sums, new, strict=True)]
            )
            turns = [one[NOTES[3]][0].float().cpu() for one in notes]
            count += ids.numel()
    if not count:
        raise ValueError("texts holds no tokens: give at least one text")
    found = Statistics(
        KIND,
        facts,
        {
            "centre": torch.stack([(total / n).float() for n, total, _ in sums]),
            "length": torch.stack([(length / n).float() for n, _, length in sums]),
            "frequencies": torch.stack(turns),
        },
        {"tokens": count, "text": digest.hexdigest()},
    )
    if out is not None:
        found.save(out)
    return found
