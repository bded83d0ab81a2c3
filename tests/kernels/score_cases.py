"""Inputs that the tests of column scores, attention and decode attention share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.column_scores.checks import check
from tokred.kernels.column_scores.reference import Options

HALVES = (torch.bfloat16, torch.float16)


def queries_keys(
    b: int, h: int, hk: int, m: int, n: int, d: int, dtype: torch.dtype, *, layout: str = "rows", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; ``layout`` is "contiguous", "rows" (heads inside rows) or "expanded" (one sample)."""
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, rows: int) -> Tensor:
        if layout == "contiguous":
            return torch.randn(b, heads, rows, d, generator=generator).to(dtype)
        samples = 1 if layout == "expanded" else b
        x = torch.randn(samples, rows, heads, d, generator=generator).to(dtype).transpose(1, 2)
        return x.expand(b, heads, rows, d)

    return make(h, m), make(hk, n), make(hk, n)


def score_options(**given: Any) -> Options:
    """Checked options of a call with these keywords."""
    q = torch.zeros(1, 1, 1, given.pop("d"))
    names = ("scale", "causal", "window", "softcap", "group")
    defaults: dict[str, Any] = {"scale": None, "causal": False, "window": None, "softcap": None, "group": "none"}
    values = {**defaults, **{k: v for k, v in given.items() if k in names}}
    return check(q, q, None, None, None, None, *(values[name] for name in names))


def key_terms(kind: str, b: int, h: int, n: int) -> dict[str, Tensor]:
    """Bias and mask of a case: "none", "bias", "head bias", "mask", "both" (with -inf in the bias), "dead" sample."""
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(b, n, generator=generator)
    mask = torch.rand(b, n, generator=generator) > 0.4
    if kind == "both":
        bias[:, ::5] = -torch.inf
        return {"bias": bias, "key_mask": mask}
    if kind == "dead":
        mask[0] = False
    return {
        "none": {},
        "bias": {"bias": bias},
        "head bias": {"bias": torch.randn(b, h, n, generator=generator)},
        "mask": {"key_mask": mask},
        "dead": {"key_mask": mask},
    }[kind]


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the error, relative to that of the truth."""
    error = (value.double() - truth).pow(2).mean().sqrt()
    return float(error / truth.pow(2).mean().sqrt().clamp(min=1e-30))
