"""The laws on models with vision: visual tokens that leave before the language model, and between its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred import adapters
from tokred.adapters.vlm.tokens.recorded import track_of
from tokred.doctor.attention import LEFT, weighed
from tokred.doctor.caches import STEPS, generated
from tokred.doctor.laws import BrokenLawError, Case, check_close

Batch = dict[str, Tensor]


def counts(model: nn.Module) -> tuple[int, int]:
    """Visual tokens at the first and at the last decoder layer, if all had come to the first and were still there."""
    report: Any = tokred.report(model)
    first, last = report.layers[0], report.layers[-1]
    return report.before * len(first.tokens), sum(last.tokens)


def check_dropped(case: Case, batch: Batch) -> None:
    """Tokens that left equal keys that no query attends to, from their layer on, in the prompt and in later steps."""
    model = case.build()
    tokred.apply(model, case.reducing)
    ours, cache = generated(model, batch)
    kept = _kept(cache, batch["input_ids"].shape[1])
    tokred.remove(model)
    if len(kept) < len(case.reducing):
        raise BrokenLawError(f"tokens left before {len(kept)} layers instead of {len(case.reducing)}")
    layers = [layer for _, layer in adapters.find(model, "layer").layers]
    parts = []
    for i, layer in enumerate(layers):
        firsts = [first for first in kept if first <= i]
        if firsts:
            keep = kept[max(firsts)]
            parts.append((layer, torch.zeros(keep.shape).masked_fill(~keep, LEFT), False))
    with weighed(parts) as mode:
        theirs, _ = generated(model, batch)
    if mode.calls < STEPS * len(parts):
        raise BrokenLawError(f"attention was seen {mode.calls} times instead of {STEPS * len(parts)}")
    check_close(ours, theirs, "the logits")


def _kept(cache: Any, n: int) -> dict[int, Tensor]:
    """Mask of the prompt's ``n`` tokens in the cache: ``(B, N)`` bool by the first layer that it is said of."""
    track = track_of(cache)
    found: dict[int, Tensor] = {}
    if track is None:
        return found
    outer = track.outer
    for group in track.groups:
        columns, valid = group.columns, group.valid
        if group.first > 0 and outer is not None:
            # Those of layer 0, and after them what was generated since.
            tail = torch.arange(outer.width, outer.width + STEPS).expand(len(columns), -1)
            columns = torch.cat([outer.columns, tail], 1).gather(1, columns)
        place = torch.where(valid & (columns < n), columns, n)
        found[group.first] = torch.zeros(len(columns), n + 1, dtype=torch.bool).scatter(1, place, True)[:, :n]
    return found
