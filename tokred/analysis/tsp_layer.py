"""``choose_tsp_layer``: the layer after which a language model may go on with fewer tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred import adapters
from tokred.api import applied, patched
from tokred.methods.vlm.fastkv import FastKV, FastKVPropagation


class LayerDistance(NamedTuple):
    """Distance that the last hidden state moves when tokens leave after ``layer``: relative L2, mean over prompts."""

    layer: int
    distance: float


class Choice(NamedTuple):
    """The earliest layer that is near enough, and the distances of all."""

    layer: int
    distances: tuple[LayerDistance, ...]


def choose_tsp_layer(
    model: nn.Module, prompts: Iterable[Tensor | dict[str, Any]], tol: float = 0.05, method: FastKV | None = None
) -> Choice:
    """The layer after which FastKV may propagate fewer tokens: the earliest from which on the hidden state of the
    prompt's last token stays within ``tol`` of the full run's.

    Args:
        model: a language model, patched with nothing.
        prompts: token ids ``(B, N)``, or the arguments of the model's forward; longer than what is propagated.
        tol: relative L2 distance.
        method: how many tokens are propagated, and by which scores; None: as FastKV's parameters are.

    Returns:
        The layer (the last possible one where none is near enough), with the curve.

    Raises:
        UnsupportedModelError, MissingInputError: the model has no stage ``layer``.
        ValueError: there are no prompts, ``tol`` is not positive, or the model is patched.

    Source: Jo et al., FastKV, arXiv 2502.01068, third version (the curve); the rule and the distance are ours.
    """
    if tol <= 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if patched(model):
        raise ValueError("the model is patched: call tokred.remove(model) first")
    given = [one if isinstance(one, dict) else {"input_ids": one} for one in prompts]
    if not given:
        raise ValueError("at least one prompt is needed")
    host, base = adapters.find(model, "layer"), method or FastKV()
    full = [_last(model, host.language, one) for one in given]
    found = []
    for layer in range(host.depth - 1):
        with applied(model, FastKVPropagation(dataclasses.replace(base, tsp_layer=layer))):
            moved = [_last(model, host.language, one) for one in given]
        pairs = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(moved, full, strict=True)]
        found.append(LayerDistance(layer, float(torch.cat(pairs).mean())))
    for first in range(len(found)):
        if all(one.distance <= tol for one in found[first:]):
            return Choice(first, tuple(found))
    return Choice(len(found) - 1, tuple(found))


def _last(model: nn.Module, language: nn.Module, given: dict[str, Any]) -> Tensor:
    """``(B, C)`` float32: the hidden state of the last token."""
    seen: list[Tensor] = []
    handle = language.register_forward_hook(lambda module, args, output: seen.append(output[0][:, -1].float()))
    try:
        with torch.no_grad():
            model(**given)
    finally:
        handle.remove()
    return seen[-1]
