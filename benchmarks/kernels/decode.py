"""Cases of ``decode_attention``: one query per head over heads that hold different numbers of keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, Inputs, Outputs, Sizes, Work
from tokred.kernels.decode_attention import (
    SENTINEL,
    decode_attention,
    decode_attention_flat,
    decode_attention_flat_with_weights,
    decode_attention_with_weights,
)


def _ragged(s: Sizes, draw: Draw) -> Inputs:
    """Heads with a quarter to seven quarters of the mean length; ``T`` rows in all, ``Hk`` heads, one sample."""
    heads, rows = s["Hk"], s["T"]
    share = 0.25 + 1.5 * torch.rand(heads, generator=draw.generator, device=draw.device)
    inner = (share.cumsum(0) / share.sum() * rows).round().to(torch.int64)[:-1]
    ends = torch.zeros(heads + 1, dtype=torch.int64, device=draw.device)
    ends[1:-1], ends[-1] = inner, rows
    return {
        "q": draw.normal(1, s["H"], s["D"]),
        "k": draw.normal(rows, s["D"]),
        "v": draw.normal(rows, s["D"]),
        "offsets": ends.to(torch.int32),
        "ends": ends.tolist(),
    }


def _flat_chain(i: Inputs) -> Outputs:
    """Head after head, on slices: the host knows the lengths."""
    ends, d = i["ends"], i["q"].shape[-1]
    queries = i["q"].view(len(ends) - 1, -1, d)
    outputs, sums, weights = [], [], []
    for head, (start, stop) in enumerate(pairwise(ends)):
        logits = queries[head] @ i["k"][start:stop].mT * d**-0.5
        p = logits.softmax(-1)
        weights.append(p)
        outputs.append(p @ i["v"][start:stop])
        sums.append(logits.logsumexp(-1))
    return torch.cat(outputs).unsqueeze(0), torch.cat(sums).unsqueeze(0), torch.cat(weights, 1)


def _flat_work(weights: bool) -> Callable[[Sizes], Work]:
    def work(s: Sizes) -> Work:
        group = s["H"] // s["Hk"]
        moved = 4 * s["T"] * s["D"] + (4 * group * s["T"] if weights else 0)
        return Work(moved, 4 * group * s["T"] * s["D"], group * s["T"])

    return work


TINY_FLAT = {"H": 4, "Hk": 2, "T": 40, "D": 16}
flat_weights = Case(
    "decode, flat, with weights",
    _ragged,
    lambda i: decode_attention_flat_with_weights(i["q"], i["k"], i["v"], i["offsets"]),
    _flat_chain,
    TINY_FLAT,
    _flat_work(True),
)
flat = Case(
    "decode, flat",
    _ragged,
    lambda i: decode_attention_flat(i["q"], i["k"], i["v"], i["offsets"]),
    lambda i: _flat_chain(i)[:2],
    TINY_FLAT,
    _flat_work(False),
)


def _rectangular(s: Sizes, draw: Draw) -> Inputs:
    """Every head has its own number of filled slots, at least half of them; some hold positions after the query."""
    b, heads, k = s["B"], s["Hk"], s["K"]
    filled = draw.integers(k // 2, k + 1, b, heads, 1)
    slots = torch.arange(k, device=draw.device)
    positions = torch.where(slots < filled, slots, SENTINEL).to(torch.int32)
    return {
        "q": draw.normal(b, s["H"], s["D"]),
        "k": draw.normal(b, heads, k, s["D"]),
        "v": draw.normal(b, heads, k, s["D"]),
        "positions": positions,
        "at": max(1, k * 3 // 4),
        "mask": (torch.arange(k, device=draw.device).expand(b, -1) % 5 != 1).contiguous(),
    }


def _seen(i: Inputs) -> Tensor:
    """``[B, Hk, 1, K]``: filled, not later than the query, not padding. Here slot ``n`` holds position ``n``."""
    return ((i["positions"] <= i["at"]) & i["mask"][:, None])[:, :, None]


def _rectangular_chain(i: Inputs) -> Outputs:
    q, k, v = i["q"], i["k"], i["v"]
    b, h, d = q.shape
    logits = q.view(b, k.shape[1], -1, d) @ k.mT * d**-0.5
    logits = logits.masked_fill(~_seen(i), -torch.inf)
    p = logits.softmax(-1)
    return (p @ v).view(b, h, -1), logits.logsumexp(-1).view(b, h), p.view(b, h, -1)


def _rectangular_work(s: Sizes) -> Work:
    rows = s["B"] * s["Hk"] * s["K"]
    group = s["H"] // s["Hk"]
    return Work(rows * (4 * s["D"] + 4), 4 * group * rows * s["D"], group * rows)


TINY_RECTANGULAR = {"B": 2, "H": 4, "Hk": 2, "K": 24, "D": 16}
rectangular = Case(
    "decode, rectangular",
    _rectangular,
    lambda i: decode_attention(
        i["q"], i["k"], i["v"], positions=i["positions"], query_position=i["at"], key_mask=i["mask"]
    ),
    lambda i: _rectangular_chain(i)[:2],
    TINY_RECTANGULAR,
    _rectangular_work,
)
rectangular_weights = Case(
    "decode, rectangular, with weights",
    _rectangular,
    lambda i: decode_attention_with_weights(
        i["q"], i["k"], i["v"], positions=i["positions"], query_position=i["at"], key_mask=i["mask"]
    ),
    _rectangular_chain,
    TINY_RECTANGULAR,
    _rectangular_work,
)
