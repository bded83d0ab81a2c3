"""The laws on denoisers: sub-layers that run on fewer tokens of the image and give all of them back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred import adapters
from tokred.diffusion.grid import kept_lines
from tokred.doctor.attention import LEFT, weighed
from tokred.doctor.laws import BrokenLawError, Case, check_close

FACTOR = 2


def counts(model: torch.nn.Module) -> tuple[int, int]:
    """Tokens of all sub-layers, and what they ran on."""
    report: Any = tokred.report(model)
    rows = report.sublayers
    return sum(row.tokens for row in rows), sum(row.left for row in rows)


def check_dropped(case: Case, frames: int) -> None:
    """Keys that self-attention does without are keys that no query wants. ToDo drops keys and nothing else, and by
    their place alone, so that the whole denoiser is the one with these keys weighed with nothing."""
    model = case.build()
    tokred.apply(model, "todo", factors=(FACTOR,) * 4)
    ours = case.run(model)
    report: Any = tokred.report(model)
    rows = [row for row in report.sublayers if row.role == "self" and row.left < row.tokens]
    tokred.remove(model)
    if not rows:
        raise BrokenLawError("no self-attention ran on fewer keys")
    text_first = {name: part.first for part in adapters.find(model, "attention").parts for name, *_ in part.sublayers}
    parts = [(model.get_submodule(row.name), _bias(row.tokens, frames), text_first[row.name]) for row in rows]
    with weighed(parts) as mode:
        theirs = case.run(model)
    if mode.calls < len(rows):
        raise BrokenLawError(f"attention was seen in {mode.calls} of {len(rows)} sub-layers: nothing to compare with")
    check_close(ours, theirs, "the predictions")


def _bias(tokens: int, frames: int) -> Tensor:
    """``(1, N)``: of each square of ``FACTOR`` x ``FACTOR`` of every frame one key has stayed."""
    side = math.isqrt(tokens // frames)
    kept = torch.tensor(kept_lines(side, FACTOR))
    bias = torch.full((frames, side, side), LEFT)
    bias[:, kept.unsqueeze(1), kept] = 0.0
    return bias.view(1, -1)
