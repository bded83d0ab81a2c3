"""The laws on mixtures of experts: pairs of token and expert that are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokred
from tokred import adapters
from tokred.adapters.changes import states_in
from tokred.doctor.attention import LEFT
from tokred.doctor.laws import BrokenLawError, Case, check_close


def counts(model: nn.Module) -> tuple[int, int]:
    """Pairs of all layers, and those that are left."""
    report: Any = tokred.report(model)
    return report.pairs, report.pairs - report.dropped


class Experts(NamedTuple):
    """Experts of a layer, and ``(T, k)`` bool, which of the pairs that their router chooses they are to see."""

    module: nn.Module
    kept: Tensor


def check_dropped(case: Case) -> None:
    """Pairs that were dropped equal pairs of no weight, in experts that run on every token that they are sent."""
    model = case.build()
    tokred.apply(model, case.reducing)
    ours = case.run(model)
    state: Any = next(state for _, state in states_in(model) if state.stage == "experts")
    records = dict(state.records)
    tokred.remove(model)
    layers = adapters.find(model, "experts").layers
    with weighed([Experts(layers[i].experts, record.kept) for i, record in records.items()]) as called:
        theirs = case.run(model)
    if len(called) < len(records):
        raise BrokenLawError(f"experts were seen in {len(called)} of {len(records)} layers: nothing to compare with")
    check_close(ours, theirs, "the logits")


@contextmanager
def weighed(layers: Sequence[Experts]) -> Iterator[list[nn.Module]]:
    """Inside, experts run on all pairs in the host's own way, with next to no weight on those that are not kept.

    Yields:
        The experts that ran, in their order.
    """
    called: list[nn.Module] = []

    def weighing(kept: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states, ids, weights = args
            called.append(module)
            share = weights.float()
            # LEFT is the logarithm of what a dropped pair weighs, of its own weight
            left = torch.where(kept, share, share * math.exp(LEFT))
            # a host whose weights sum to one shares them anew among what is left
            if bool((share.sum(1) - 1).abs().max() < 1e-3):
                left = left / left.sum(1, keepdim=True).clamp(min=1e-30)
            return states, ids, left.to(weights.dtype)

        return hook

    handles = [layer.module.register_forward_pre_hook(weighing(layer.kept)) for layer in layers]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
