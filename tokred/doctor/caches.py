"""The laws on caches of language models: rows that a policy evicts, and the generation after that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred import adapters
from tokred.doctor.attention import LEFT, Weighed
from tokred.doctor.laws import BrokenLawError, Case, check_close
from tokred.kernels.decode_attention import SENTINEL

STEPS = 4
LONG = 12  # as many as policies need that evict while tokens are generated


def counts(model: nn.Module) -> tuple[int, int]:
    """Slots that all layers have seen, and rows that they hold."""
    # The cache's own report: that of a model whose tokens leave between layers too tells of the layers.
    report: Any = next(part for part in tokred.report(model).parts if part.stage == "cache")
    rows = report.layers
    return sum(row.seen for row in rows), sum(row.rows for row in rows)


def generated(model: Any, batch: dict[str, Tensor], steps: int = STEPS) -> tuple[list[Tensor], Any]:
    """The logits of some greedy steps, and the cache after them."""
    out = model.generate(
        **batch, min_new_tokens=steps, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    # By what it is: hosts have called it by several names.
    cache = next(value for value in out.values() if hasattr(value, "layers"))
    return list(out.logits), cache


class _Steps:
    """Forward pre-hook of a layer: from the second forward on, its keys are weighed."""

    def __init__(self, mode: Weighed, bias: Tensor) -> None:
        self.mode, self.bias, self.calls = mode, bias, 0

    def __call__(self, module: Any, args: Any) -> None:
        self.mode.bias = self.bias if self.calls else None
        self.calls += 1

    def end(self, module: Any, args: Any, out: Any) -> None:
        """Forward hook."""
        self.mode.bias = None


def check_dropped(case: Case, batch: dict[str, Tensor]) -> None:
    """Evicted rows equal rows that no query attends to, after the prompt."""
    model = case.build()
    tokred.apply(model, "snapkv", budget=9, window=4, pool=3)
    ours, cache = generated(model, batch)
    n = batch["input_ids"].shape[1]
    biases = [_bias(getattr(layer, "positions", None), n) for layer in cache.layers]
    # Layers that keep no rows have no attention that could be hidden from.
    tokred.remove(model)
    mode, handles = Weighed(), []
    host: Any = adapters.find(model, "cache")
    modules = [(i, attention) for i, (_, attention) in host.attentions.items()]
    modules += [(owner, attention) for _, attention, owner in host.readers.values()]
    for i, attention in modules:
        bias = biases[i]
        if bias is not None:
            hook = _Steps(mode, bias)
            handles += [attention.register_forward_pre_hook(hook), attention.register_forward_hook(hook.end)]
    if not handles:
        raise BrokenLawError("no layer of the cache has evicted anything")
    try:
        with mode:
            theirs, _ = generated(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not mode.calls:
        raise BrokenLawError("attention was not seen: nothing to compare with")
    check_close(ours, theirs, "the logits")


def _bias(positions: Tensor | None, n: int) -> Tensor | None:
    """``(B, Hk, N)``: of the prompt's slots, those that no row holds any more have left; None: nothing was evicted."""
    if positions is None:
        return None
    place = torch.where((positions == SENTINEL) | (positions >= n), n, positions.long())
    bias = torch.full((*positions.shape[:2], n + 1), LEFT).scatter(2, place, 0.0)
    return bias[..., :n]
