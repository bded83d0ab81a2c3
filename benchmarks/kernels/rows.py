"""Cases of ``merge_rows`` and ``gather_rows``: merges in all modes, un-merge, compaction of tokens and of caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, Inputs, Outputs, Run, Sizes, Work
from tokred.kernels.gather_rows import gather_cache, gather_cache_, gather_rows
from tokred.kernels.merge_rows import merge_rows, merge_rows_norm, merge_sizes, unmerge_rows

TINY = {"B": 2, "N": 19, "M": 14, "C": 12}


def _bipartite(s: Sizes, draw: Draw) -> Inputs:
    """Of the even tokens ``N - M`` go into odd ones; slots are the other even tokens and then the odd ones."""
    b, n, r = s["B"], s["N"], s["N"] - s["M"]
    even = (n + 1) // 2
    odd = n - even
    order = torch.rand(b, even, generator=draw.generator, device=draw.device).argsort(-1)
    merged, kept = order[:, :r], order[:, r:].sort(-1).values
    match = draw.integers(0, odd, b, r)
    others = torch.arange(odd, device=draw.device).expand(b, -1) * 2 + 1
    size = draw.integers(1, 5, b, n).float()
    return {
        "x": draw.normal(b, n, s["C"]),
        "size": size,
        "column": size.to(draw.dtype).unsqueeze(-1),
        "merged": merged,
        "kept": kept,
        "match": match,
        "representative": torch.cat([kept * 2, others], 1),
        "source": merged * 2,
        "target": match + kept.shape[1],
        "norm_weight": draw.normal(s["C"]),
        "norm_bias": draw.normal(s["C"]),
        "gradient": draw.normal(b, s["M"], s["C"]),
    }


def _rows(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return i["x"], i["representative"], i["source"], i["target"]


def _combine(t: Tensor, i: Inputs, how: str = "sum") -> Tensor:
    """Gathers and a scatter with expanded indices, as published code does it."""
    channels = t.shape[-1]
    a, b = t[:, ::2], t[:, 1::2]
    kept = a.gather(1, i["kept"].unsqueeze(-1).expand(-1, -1, channels))
    gone = a.gather(1, i["merged"].unsqueeze(-1).expand(-1, -1, channels))
    b = b.scatter_reduce(1, i["match"].unsqueeze(-1).expand(-1, -1, channels), gone, reduce=how)
    return torch.cat([kept, b], 1)


def _mean(i: Inputs) -> Tensor:
    return _combine(i["x"] * i["column"], i) / _combine(i["column"], i)


def _mean_and_norm(i: Inputs) -> Outputs:
    y = _mean(i)
    return y, F.layer_norm(y, y.shape[-1:], i["norm_weight"], i["norm_bias"])


def _long_mean(i: Inputs) -> Tensor:
    """The mean's direction with the length of the longest member."""
    y = _mean(i)
    return y / y.norm(dim=-1, keepdim=True) * _combine(i["x"].norm(dim=-1, keepdim=True), i, "amax")


def _merge_work(outputs: int) -> Callable[[Sizes], Work]:
    def work(s: Sizes) -> Work:
        return Work(2 * s["B"] * s["C"] * (s["N"] + outputs * s["M"]) + 4 * s["B"] * s["N"])

    return work


def _backward(merge: Callable[[Inputs], Tensor]) -> Run:
    def run(i: Inputs) -> Outputs:
        with torch.enable_grad():
            x = i["x"].detach().requires_grad_()
            return torch.autograd.grad(merge({**i, "x": x}), x, i["gradient"])

    return run


def _ours(mode: str) -> Run:
    return lambda i: (merge_rows(*_rows(i), size=i["size"], mode=mode),)


merge = Case("merge", _bipartite, _ours("mean"), lambda i: (_mean(i),), TINY, _merge_work(1))
merge_norm = Case(
    "merge + LayerNorm",
    _bipartite,
    lambda i: merge_rows_norm(*_rows(i), i["norm_weight"], i["norm_bias"], size=i["size"]),
    _mean_and_norm,
    TINY,
    _merge_work(2),
)
merge_sum = Case("merge, sum", _bipartite, _ours("sum"), lambda i: (_combine(i["x"], i),), TINY)
merge_max = Case("merge, max", _bipartite, _ours("max"), lambda i: (_combine(i["x"], i, "amax"),), TINY)
merge_long = Case("merge, norm-preserving", _bipartite, _ours("mlerp"), lambda i: (_long_mean(i),), TINY)
merge_back = Case(
    "merge, backward",
    _bipartite,
    _backward(lambda i: merge_rows(*_rows(i), size=i["size"])),
    _backward(_mean),
    TINY,
)
sizes = Case(
    "sizes of slots",
    _bipartite,
    lambda i: (merge_sizes(i["size"], i["representative"], i["source"], i["target"], i["x"].shape[1]),),
    lambda i: (_combine(i["size"].unsqueeze(-1), i).squeeze(-1),),
    TINY,
)


def _merged(s: Sizes, draw: Draw) -> Inputs:
    return {"y": draw.normal(s["B"], s["M"], s["C"]), "index": draw.integers(0, s["M"], s["B"], s["N"])}


unmerge = Case(
    "un-merge",
    _merged,
    lambda i: (unmerge_rows(i["y"], i["index"]),),
    lambda i: (i["y"].gather(1, i["index"].unsqueeze(-1).expand(-1, -1, i["y"].shape[-1])),),
    TINY,
    lambda s: Work(2 * s["B"] * s["C"] * (s["N"] + s["M"]) + 8 * s["B"] * s["N"]),
)


def _kept(s: Sizes, draw: Draw) -> Inputs:
    return {"x": draw.normal(s["B"], s["N"], s["C"]), "index": draw.subset((s["B"],), s["N"], s["M"])}


gather = Case(
    "gather",
    _kept,
    lambda i: (gather_rows(i["x"], i["index"]),),
    lambda i: (i["x"].gather(1, i["index"].unsqueeze(-1).expand(-1, -1, i["x"].shape[-1])),),
    TINY,
    lambda s: Work(4 * s["B"] * s["C"] * s["M"] + 8 * s["B"] * s["M"]),
)


def _cache(s: Sizes, draw: Draw) -> Inputs:
    b, heads, n = s["B"], s["Hk"], s["N"]
    return {
        "k": draw.normal(b, heads, n, s["D"]),
        "v": draw.normal(b, heads, n, s["D"]),
        "positions": torch.arange(n, dtype=torch.int32, device=draw.device).expand(b, heads, n).contiguous(),
        "index": draw.subset((b, heads), n, s["K"]),
    }


def _cache_chain(i: Inputs) -> Outputs:
    index = i["index"].unsqueeze(-1).expand(-1, -1, -1, i["k"].shape[-1])
    return i["k"].gather(2, index), i["v"].gather(2, index), i["positions"].gather(2, i["index"])


TINY_CACHE = {"B": 1, "Hk": 2, "N": 24, "K": 12, "D": 8}
cache = Case(
    "KV gather",
    _cache,
    lambda i: gather_cache(i["k"], i["v"], i["positions"], i["index"]),
    _cache_chain,
    TINY_CACHE,
    lambda s: Work(s["B"] * s["Hk"] * s["K"] * (8 * s["D"] + 16)),
)
cache_in_place = Case(
    "KV gather, in place",
    _cache,
    lambda i: gather_cache_(i["k"].clone(), i["v"].clone(), i["positions"].clone(), i["index"]),
    _cache_chain,
    TINY_CACHE,
)
