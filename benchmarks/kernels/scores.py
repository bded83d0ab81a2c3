"""Cases of ``column_scores`` and ``attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, Inputs, Outputs, Sizes, Work
from tokred.kernels.attention import attention, attention_with_lse, attention_with_scores
from tokred.kernels.column_scores import column_scores, column_statistics, row_lse

SOFTCAP = 5.0
TINY = {"B": 1, "H": 2, "N": 21, "D": 16}


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """``[B, H, M, N]``; keys are repeated for the query heads that share them."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5


def _causal(i: Inputs) -> Tensor:
    """Which keys the last ``M`` of ``N`` positions see, bool ``[M, N]``."""
    m, n = i["q"].shape[2], i["k"].shape[2]
    rows = torch.arange(n - m, n, device=i["q"].device)
    return torch.arange(n, device=i["q"].device) <= rows[:, None]


def _lse(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """What a fused attention would hand on, one sample at a time: the matrix is large."""
    parts = []
    for one_q, one_k in zip(q.float().split(1), k.float().split(1), strict=True):
        logits = _logits(one_q, one_k)
        if causal:
            logits = logits.masked_fill(~_causal({"q": q, "k": k}), -torch.inf)
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts)


def _heads(s: Sizes, draw: Draw) -> Inputs:
    shape = (s["B"], s["H"], s["N"], s["D"])
    return {"q": draw.normal(*shape), "k": draw.normal(*shape)}


def _with_lse(s: Sizes, draw: Draw) -> Inputs:
    i = _heads(s, draw)
    return {**i, "lse": _lse(i["q"], i["k"])}


def _chain(i: Inputs) -> Outputs:
    return (_logits(i["q"], i["k"]).softmax(-1).sum(-2),)


def _work(s: Sizes) -> Work:
    heads, n = s["B"] * s["H"], s["N"]
    return Work(heads * n * (4 * s["D"] + 8), 2 * heads * n * n * s["D"], heads * n * n)


def _twice(s: Sizes) -> Work:
    one = _work(s)
    return Work(2 * one.bytes, 2 * one.flops, 2 * one.exps)


columns = Case(
    "column scores, LSE given",
    _with_lse,
    lambda i: (column_scores(i["q"], i["k"], lse=i["lse"]),),
    _chain,
    TINY,
    _work,
    by_sample=True,
)
columns_twice = Case(
    "column scores, two passes",
    _heads,
    lambda i: (column_scores(i["q"], i["k"]),),
    _chain,
    TINY,
    _twice,
    by_sample=True,
)
lse_only = Case(
    "log-sum-exp of rows",
    _heads,
    lambda i: (row_lse(i["q"], i["k"]),),
    lambda i: (_logits(i["q"], i["k"]).logsumexp(-1),),
    TINY,
    _work,
    by_sample=True,
)


def _statistics_chain(i: Inputs) -> Outputs:
    p = _logits(i["q"], i["k"]).softmax(-1)
    return p.sum(-2), (p * p).sum(-2), p.amax(-2), -torch.xlogy(p, p).sum(-2)


statistics = Case(
    "column statistics",
    _with_lse,
    lambda i: column_statistics(i["q"], i["k"], lse=i["lse"]),
    _statistics_chain,
    TINY,
    _work,
    by_sample=True,
)

# The last queries of a prompt over all its keys, as SnapKV scores them.


def _window(s: Sizes, draw: Draw) -> Inputs:
    q = draw.normal(s["B"], s["H"], s["M"], s["D"])
    k = draw.normal(s["B"], s["Hk"], s["N"], s["D"])
    return {"q": q, "k": k}


def _window_with_lse(s: Sizes, draw: Draw) -> Inputs:
    i = _window(s, draw)
    return {**i, "lse": _lse(i["q"], i["k"], causal=True)}


def _window_chain(i: Inputs) -> Outputs:
    q, k = i["q"], i["k"]
    p = _logits(q, k).masked_fill(~_causal(i), -torch.inf).softmax(-1)
    return (p.sum(-2).unflatten(1, (k.shape[1], -1)).mean(2),)


def _window_work(s: Sizes) -> Work:
    pairs = s["B"] * s["H"] * s["M"] * s["N"]
    moved = s["B"] * (s["Hk"] * s["N"] * (2 * s["D"] + 4) + s["H"] * s["M"] * (2 * s["D"] + 4))
    return Work(moved, 2 * pairs * s["D"], pairs)


TINY_WINDOW = {"B": 1, "H": 4, "Hk": 2, "M": 5, "N": 24, "D": 16}
window = Case(
    "window scores, LSE given",
    _window_with_lse,
    lambda i: (column_scores(i["q"], i["k"], lse=i["lse"], causal=True, group="mean"),),
    _window_chain,
    TINY_WINDOW,
    _window_work,
)
window_twice = Case(
    "window scores, two passes",
    _window,
    lambda i: (column_scores(i["q"], i["k"], causal=True, group="mean"),),
    _window_chain,
    TINY_WINDOW,
    lambda s: Work(2 * _window_work(s).bytes, 2 * _window_work(s).flops, 2 * _window_work(s).exps),
)


def _many_options(s: Sizes, draw: Draw) -> Inputs:
    # Of any eight keys in a row one is visible, so that every query sees some.
    mask = torch.arange(s["N"], device=draw.device).expand(s["B"], -1) % 7 != 3
    return {
        **_window(s, draw),
        "weight": draw.normal(s["B"], s["M"], dtype=torch.float32),
        "bias": draw.normal(s["B"], s["N"], dtype=torch.float32),
        "mask": mask.contiguous(),
        "back": s["back"],
    }


def _options_chain(i: Inputs) -> Outputs:
    m, n = i["q"].shape[2], i["k"].shape[2]
    rows = torch.arange(n - m, n, device=i["q"].device)[:, None]
    near = torch.arange(n, device=i["q"].device) > rows - i["back"]
    logits = torch.tanh(_logits(i["q"], i["k"]) / SOFTCAP) * SOFTCAP + i["bias"].to(i["q"].dtype)[:, None, None]
    p = logits.masked_fill(~(_causal(i) & near & i["mask"][:, None, None]), -torch.inf).softmax(-1)
    total = (p * i["weight"].to(p.dtype)[:, None, :, None]).sum(-2)
    return (total.unflatten(1, (i["k"].shape[1], -1)).amax(2),)


options = Case(
    "column scores, all options",
    _many_options,
    lambda i: (
        column_scores(
            i["q"], i["k"], i["weight"], bias=i["bias"], key_mask=i["mask"], causal=True, window=i["back"],
            softcap=SOFTCAP, group="max",
        ),
    ),
    _options_chain,
    {"B": 2, "H": 4, "Hk": 2, "M": 9, "N": 24, "D": 16, "back": 10},
)  # fmt: skip

# Attention whose keys count as often as they have tokens.


def _sized(s: Sizes, draw: Draw) -> Inputs:
    i = _heads(s, draw)
    size = draw.integers(1, 5, s["B"], s["N"]).float()
    return {**i, "v": draw.normal(s["B"], s["H"], s["N"], s["D"]), "size": size}


def _sized_logits(i: Inputs) -> Tensor:
    return _logits(i["q"], i["k"]) + i["size"].log().to(i["q"].dtype)[:, None, None]


def _attention_chain(i: Inputs) -> Outputs:
    return (_sized_logits(i).softmax(-1) @ i["v"],)


def _lse_chain(i: Inputs) -> Outputs:
    logits = _sized_logits(i)
    return logits.softmax(-1) @ i["v"], logits.logsumexp(-1)


def _scores_chain(i: Inputs) -> Outputs:
    logits = _sized_logits(i)
    p = logits.softmax(-1)
    return p @ i["v"], logits.logsumexp(-1), p.sum(-2)


def _attention_work(s: Sizes) -> Work:
    heads, n = s["B"] * s["H"], s["N"]
    return Work(heads * n * (8 * s["D"] + 4), 4 * heads * n * n * s["D"], heads * n * n)


attend = Case(
    "attention, size bias",
    _sized,
    lambda i: (attention(i["q"], i["k"], i["v"], size=i["size"]),),
    _attention_chain,
    TINY,
    _attention_work,
    by_sample=True,
)
attend_channel = Case(
    "attention, size as a channel",
    _sized,
    lambda i: (attention(i["q"], i["k"], i["v"], size=i["size"], form="channel"),),
    _attention_chain,
    TINY,
    _attention_work,
    by_sample=True,
)
attend_lse = Case(
    "attention, size bias + LSE",
    _sized,
    lambda i: attention_with_lse(i["q"], i["k"], i["v"], size=i["size"]),
    _lse_chain,
    TINY,
    _attention_work,
    by_sample=True,
)
attend_scores = Case(
    "attention + column scores",
    _sized,
    lambda i: attention_with_scores(i["q"], i["k"], i["v"], size=i["size"]),
    _scores_chain,
    TINY,
    lambda s: Work(
        _attention_work(s).bytes + _work(s).bytes,
        _attention_work(s).flops + _work(s).flops,
        _attention_work(s).exps + _work(s).exps,
    ),
    by_sample=True,
)
