"""Costs of rows: the tokens, multiply-adds, rows and bytes that methods leave of the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokred import api
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Feed

# Attention as torch runs it: on a CPU, which its counter of operations leaves out, and on CUDA.
_NAMES = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FUSED = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in _NAMES]


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # torch's own formula refuses fewer key than query heads in older versions.
    b, heads, n, d = query
    return int(2 * b * heads * n * key[-2] * (d + value[-1]))


def counter() -> FlopCounterMode:
    """A context that counts floating-point operations, fused attention's included; two of them are a multiply-add."""
    return FlopCounterMode(display=False, custom_mapping={op: _attention for op in _FUSED if op is not None})


class Costs:
    """Costs on the first batch of the data.

    Args:
        target: the module that methods act on.
        feed: how the model is run.
        probe: ``probe(single)`` runs the model as it is now on the first batch, or on its first sample alone, as little
            as its report needs, and returns how many samples it had.
    """

    def __init__(self, target: Any, feed: Feed, probe: Callable[[bool], int]) -> None:
        self.target, self.feed, self.probe = target, feed, probe
        self._whole: float | None = None

    @property
    def whole(self) -> float:
        """Multiply-adds of a sample in the unpatched model's probe, in units of 1e9."""
        if self._whole is None:
            self._whole = self._counted(False)
        return self._whole

    def _counted(self, single: bool) -> float:
        """Multiply-adds of a sample in the model as it is now."""
        with counter() as counted:
            samples = self.probe(single)
        return float(counted.get_total_flops() / 2e9 / samples)

    def of(self, one: Entry, single: bool = False) -> Cost:
        """Fields of a record: what the row's methods leave of the first batch, or its first sample, by their report.

        Raises:
            ValueError: a method acts where such a run does not come by.
            Exception: whatever the method, or the model with it, refuses by.
        """
        others = one.stages - set(self.feed.stages)
        if others:
            raise ValueError(
                f"it acts at stage {', '.join(sorted(others))}, which run {self.feed.name!r} does not measure: that is "
                f"for {', '.join(self.feed.stages)}"
            )
        counted = bool(one.stages & {"projector", "layer", "attention"})
        dense = self.whole if counted else 0.0
        with one.applied(self.target):
            if counted:
                macs = self._counted(single)
            else:
                self.probe(single)
            report: Any = api.report(self.target)
        cost: Cost = {"gmacs": macs, "gmacs_share": macs / dense} if counted else {}
        for part in report.parts:
            cost = {**self._part(part), **cost}
        return cost

    def _part(self, part: Any) -> Cost:
        """Fields of one stage's report."""
        layers = part.layers if part.stage != "attention" else part.sublayers
        if part.stage == "block":
            ends = {"tokens_in": layers[0].tokens_in, "tokens_out": layers[-1].tokens_out}
            return {**ends, "gmacs": part.macs / 1e9, "gmacs_share": part.macs / part.macs_unpatched}
        if part.stage == "cache":
            rows = sum(layer.rows for layer in layers) / len(layers)
            return {"rows_left": rows, "bytes": part.bytes, "dense_bytes": part.dense_bytes}
        if part.stage == "attention":
            finest = max(row.tokens for row in layers)
            return {"tokens_in": finest, "tokens_out": min(row.left for row in layers if row.tokens == finest)}
        real = [sum(row.tokens) / len(row.tokens) for row in layers]
        last = layers[-1].visual
        return {
            "tokens_in": part.before,
            "tokens_out": layers[-1].columns,
            "tokens_left": sum(last) / len(last),
            "tokens_mean": sum(real) / len(real),
            "visual_mean": part.visual,
        }

    def unpatched(self, costs: list[Cost]) -> Cost:
        """The cost of the unpatched model, which every report tells beside that of its method."""
        found: Cost = {}
        # Where methods of several places are compared, the first one's tokens are the table's.
        for cost in costs:
            if "tokens_in" in cost and "tokens_in" not in found:
                found |= {"tokens_in": cost["tokens_in"], "tokens_out": cost["tokens_in"]}
            if "gmacs" in cost and "gmacs" not in found:
                found |= {"gmacs": cost["gmacs"] / cost["gmacs_share"], "gmacs_share": 1.0}
            dense = max(cost.get("dense_bytes", 0), found.get("dense_bytes", 0))
            if dense:
                found |= {"bytes": dense, "dense_bytes": dense}
        return found
