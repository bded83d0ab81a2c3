"""``calibrate``: what a model does on a text, in a file, for cache policies that read it from there."""

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
from tokred.core.folders import check_file
from tokred.core.method import Method
from tokred.kv.budgets.curves import KIND as UTILITIES
from tokred.kv.budgets.curves import curve
from tokred.kv.budgets.generated import Generated
from tokred.kv.parts import When, check_count
from tokred.kv.statistics import Statistics
from tokred.methods.kv.kv import KVPolicy
from tokred.methods.kv.lukv import JUDGED, LUKV, UTILITY, Utility
from tokred.methods.kv.triattention import KIND as QUERIES
from tokred.methods.kv.triattention import NOTES, TriAttention

# Rows that no text reaches, so that nothing is evicted while something is measured.
_ALL = 1 << 30


def calibrate(
    model: nn.Module,
    texts: Iterable[Tensor | dict[str, Any]],
    out: str | Path | None = None,
    *,
    method: Method | None = None,
    steps: int = 64,
) -> Statistics:
    """Statistics of a model on some texts, for a policy that needs them. Each text is read by itself, and none is kept.

    For ``triattention``: the means of unrotated queries, and of their lengths; any coherent text serves, of some ten
    thousand tokens. For ``lukv``: how rows are best divided among heads, for its score, sinks and newest tokens; the
    model goes on with each text, and what it attends to then says which rows would have been missed.

    Args:
        model: a language model, patched with nothing.
        texts: token ids ``[B, N]`` without padding, or dicts that hold them as ``input_ids``.
        out: file to write; None: none.
        method: the policy, :class:`tokred.TriAttention` or :class:`tokred.LUKV`; None: the former.
        steps: tokens that are generated after each text, for ``lukv``.

    Returns:
        Statistics of kind ``"queries"`` (``centre`` ``[L, H, D/2, 2]``, ``length`` ``[L, H, D/2]``, ``frequencies``
        ``[L, D/2]``) or ``"utility"`` (``curves`` ``[99, L, Hk]``), float32, of the layers that policies act on.

    Raises:
        UnsupportedModelError, MissingInputError: the model's cache takes no policies, or does not supply what is read.
        TypeError: ``method`` needs no statistics.
        ValueError: there is no text, or the model is patched.
        OSError: the file cannot be written.

    Source: Mao et al., TriAttention, ICML 2026 (arXiv 2604.04921), section 4, with the model's query norm; Tang et al.,
    LU-KV, ICML 2026 (arXiv 2602.08585), section 3.
    """
    made = TriAttention() if method is None else method
    if not isinstance(made, TriAttention | LUKV):
        raise TypeError(f"method must be triattention or lukv, which need statistics, got {made!r}")
    check_count(steps, "steps", 1)
    if out is not None:
        check_file(out)
    if patched(model):
        raise ValueError("the model is patched: call tokred.remove(model) first")
    given = (text["input_ids"] if isinstance(text, dict) else text for text in texts)
    found = _queries(model, given) if isinstance(made, TriAttention) else _curves(model, given, made, steps)
    if out is not None:
        found.save(out)
    return found


def _queries(model: nn.Module, texts: Iterable[Tensor]) -> Statistics:
    facts = adapters.find(model, "cache").model_facts()
    sums: list[list[Tensor]] = []
    turns: list[Tensor] = []
    count, digest = 0, hashlib.sha256()
    with applied(model, TriAttention(stats="prompt", budget=_ALL, least=1)), torch.inference_mode():
        for ids in texts:
            cache = kv_cache(model, prompt=ids.shape[1])
            model(ids, **cache_kwargs(cache))
            digest.update(ids.cpu().numpy().tobytes())
            notes = [layer.notes for layer in _layers(cache)]
            new = [[one[name].double().sum(0).cpu() for name in NOTES[:3]] for one in notes]
            both = zip(sums or [[torch.zeros_like(t) for t in one] for one in new], new, strict=True)
            sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in both]
            turns = [one[NOTES[3]][0].float().cpu() for one in notes]
            count += ids.numel()
    _check_any(count)
    tensors = {
        "centre": torch.stack([(total / n).float() for n, total, _ in sums]),
        "length": torch.stack([(length / n).float() for n, _, length in sums]),
        "frequencies": torch.stack(turns),
    }
    return Statistics(QUERIES, facts, tensors, {"tokens": count, "text": digest.hexdigest()})


def _curves(model: nn.Module, texts: Iterable[Tensor], method: LUKV, steps: int) -> Statistics:
    score = method.parts.score
    if score.repeats is not None:
        raise ValueError(f"curves cannot be made for the score {score.name!r}, which reads the context again")
    facts = adapters.find(model, "cache").model_facts()
    watching = KVPolicy(score=Utility(score), budget=Generated(_ALL), when=When(every=1), recent=1)
    found, count, many, digest = None, 0, 0, hashlib.sha256()
    with applied(model, watching), torch.inference_mode():
        for ids in (row[None] for text in texts for row in text):
            cache = kv_cache(model, prompt=ids.shape[1], steps=steps)
            given = ids
            for _ in range(steps + 1):
                logits = model(given, **cache_kwargs(cache)).logits
                given = logits[:, -1:].argmax(-1)
            digest.update(ids.cpu().numpy().tobytes())
            n, layers = ids.shape[1], _layers(cache)
            both = [torch.stack([one.rows[name][0, :, :n].cpu() for one in layers]) for name in (JUDGED, UTILITY)]
            new = curve(both[0], both[1], method.sinks, method.recent)
            found = new if found is None else found + new
            count, many = count + n, many + 1
    _check_any(count)
    assert found is not None  # there was a text
    about = {"tokens": count, "text": digest.hexdigest(), "score": score.to_dict(), "steps": steps}
    about |= {"sinks": method.sinks, "recent": method.recent}
    return Statistics(UTILITIES, facts, {"curves": (found / many).float()}, about)


def _layers(cache: Any) -> list[TokLayer]:
    return [layer for layer in words.LAYERS.need(cache) if isinstance(layer, TokLayer)]


def _check_any(count: int) -> None:
    if not count:
        raise ValueError("texts holds no tokens: give at least one text")
