"""Cases of ``similarity_rows``: best matches, top-k, sums and counts of similarities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, Inputs, Outputs, Sizes, Work
from tokred.kernels.similarity_rows import (
    best_match,
    cell_regions,
    similarity_count,
    similarity_sum,
    similarity_topk,
)

MARGIN = 0.1
THRESHOLD = 0.2


def unit(x: Tensor) -> Tensor:
    """Rows divided by their length."""
    return x / x.norm(dim=-1, keepdim=True)


def similarities_at(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """``a[n] . b[index[n, k]]`` for ``a`` ``(B, Na, D)``, ``b`` ``(B, Nb, D)`` and ``index`` ``(B, Na, k)``."""
    batch, rows, k = index.shape
    partners = b.gather(1, index.reshape(batch, -1, 1).expand(-1, -1, b.shape[-1]))
    return (a.unsqueeze(2) * partners.view(batch, rows, k, -1)).sum(-1)


# Alternate tokens against each other, as in a vision transformer.


def _tokens(s: Sizes, draw: Draw) -> Inputs:
    return {"x": draw.normal(s["B"], s["N"], s["C"])}


def _alternate_chain(i: Inputs) -> Outputs:
    metric = unit(i["x"])
    return (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)


def _alternate_values(i: Inputs, outputs: Outputs) -> Outputs:
    metric, (score, index) = unit(i["x"]), outputs
    return score, similarities_at(metric[:, ::2], metric[:, 1::2], index.unsqueeze(-1))


def _alternate_work(s: Sizes) -> Work:
    a = (s["N"] + 1) // 2
    b = s["N"] - a
    return Work(2 * s["B"] * s["N"] * s["C"] + 12 * s["B"] * a, 2 * s["B"] * a * b * s["C"])


alternate = Case(
    "best match",
    _tokens,
    lambda i: best_match(i["x"][:, ::2], i["x"][:, 1::2]),
    _alternate_chain,
    {"B": 2, "N": 21, "C": 12},
    _alternate_work,
    _alternate_values,
)

# Every token of a grid against one destination per 2 x 2 cell, as in a diffusion model.


def _sources(s: Sizes, draw: Draw) -> Inputs:
    quarter = s["N"] // 4
    return {"a": draw.normal(s["B"], s["N"] - quarter, s["C"]), "b": draw.normal(s["B"], quarter, s["C"])}


def _pair_values(i: Inputs, outputs: Outputs) -> Outputs:
    score, index = outputs
    return score, similarities_at(unit(i["a"]), unit(i["b"]), index.unsqueeze(-1))


def _global_work(s: Sizes) -> Work:
    b = s["N"] // 4
    a = s["N"] - b
    return Work(2 * s["B"] * s["N"] * s["C"] + 12 * s["B"] * a, 2 * s["B"] * a * b * s["C"])


everywhere = Case(
    "best match, global",
    _sources,
    lambda i: best_match(i["a"], i["b"]),
    lambda i: (unit(i["a"]) @ unit(i["b"]).mT).max(-1),
    {"B": 1, "N": 40, "C": 20},
    _global_work,
    _pair_values,
    by_sample=True,
)


def _grid(s: Sizes, draw: Draw) -> Inputs:
    side = math.isqrt(s["N"])
    windows = cell_regions(side, side, (s["window"], s["window"]), device=draw.device)
    return {"x": draw.normal(s["B"], s["N"], s["C"]), "windows": windows}


def _in_windows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows ``(B, W, n, C)``."""
    return x[:, positions]


def _window_chain(i: Inputs) -> Outputs:
    metric, windows = unit(i["x"]), i["windows"]
    score, index = (_in_windows(metric, windows.a) @ _in_windows(metric, windows.b).mT).max(-1)
    return score, windows.b.expand(score.shape[0], -1, -1).gather(2, index)


def _window_values(i: Inputs, outputs: Outputs) -> Outputs:
    metric, (score, index) = unit(i["x"]), outputs
    a = _in_windows(metric, i["windows"].a).flatten(1, 2)
    return score, similarities_at(a, metric, index.flatten(1).unsqueeze(-1))


def _window_work(s: Sizes) -> Work:
    pairs = 3 * s["window"] ** 2 // 4 * s["N"] // 4
    return Work(2 * s["B"] * s["N"] * s["C"] + 9 * s["B"] * s["N"], 2 * s["B"] * pairs * s["C"])


windowed = Case(
    "best match, windows",
    _grid,
    lambda i: best_match(i["x"], i["x"], windows=i["windows"]),
    _window_chain,
    {"B": 1, "N": 64, "C": 20, "window": 4},
    _window_work,
    _window_values,
)

# The other reductions.


def _all_pairs(i: Inputs) -> Tensor:
    metric = unit(i["x"])
    return metric @ metric.mT


def _all_pairs_work(s: Sizes) -> Work:
    return Work(2 * s["B"] * s["N"] * s["C"] + 4 * s["B"] * s["N"], 2 * s["B"] * s["N"] ** 2 * s["C"])


energy = Case(
    "sum of similarities",
    _tokens,
    lambda i: (similarity_sum(i["x"], i["x"], function="elu", margin=MARGIN, mean=True),),
    lambda i: (F.elu(_all_pairs(i) - MARGIN).mean(-1),),
    {"B": 2, "N": 21, "C": 12},
    lambda s: Work(_all_pairs_work(s).bytes, _all_pairs_work(s).flops, s["B"] * s["N"] ** 2),
)
count = Case(
    "count of similarities",
    _tokens,
    lambda i: (similarity_count(i["x"], i["x"], THRESHOLD),),
    lambda i: ((_all_pairs(i) >= THRESHOLD).sum(-1),),
    {"B": 2, "N": 21, "C": 12},
    _all_pairs_work,
)


def _masked_tokens(s: Sizes, draw: Draw) -> Inputs:
    mask = torch.arange(s["N"], device=draw.device) % 5 != 2
    return {"x": draw.normal(s["B"], s["N"], s["C"]), "mask": mask, "k": s["k"]}


def _topk_chain(i: Inputs) -> Outputs:
    own = torch.eye(i["x"].shape[1], dtype=torch.bool, device=i["x"].device)
    return _all_pairs(i).masked_fill(own | ~i["mask"], -torch.inf).topk(i["k"])


def _topk_values(i: Inputs, outputs: Outputs) -> Outputs:
    metric, (score, index) = unit(i["x"]), outputs
    return score, similarities_at(metric, metric, index)


topk = Case(
    "top k",
    _masked_tokens,
    lambda i: similarity_topk(i["x"], i["x"], i["k"], b_mask=i["mask"], exclude_self=True),
    _topk_chain,
    {"B": 1, "N": 21, "C": 12, "k": 3},
    _all_pairs_work,
    _topk_values,
)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return -(a.unsqueeze(2) - b.unsqueeze(1)).norm(dim=-1)


def _distance_values(i: Inputs, outputs: Outputs) -> Outputs:
    score, index = outputs
    return score, _distances(i["a"], i["b"]).gather(2, index.unsqueeze(-1))


nearest = Case(
    "best match, distance",
    _sources,
    lambda i: best_match(i["a"], i["b"], metric="distance"),
    lambda i: _distances(i["a"], i["b"]).max(-1),
    {"B": 1, "N": 24, "C": 9},
    _global_work,
    _distance_values,
)
