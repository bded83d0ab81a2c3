"""For every row of ``a``, a reduction over its similarities with the rows of ``b``, without storing the matrix.

``best_match``, ``similarity_topk``, ``similarity_sum`` and ``similarity_count``; ``similarity_rows`` calls one by name.

Shapes: ``a`` is ``(..., Na, D)`` and ``b`` ``(..., Nb, D)`` with the same leading dimensions (at least one), any float
type and any strides. Leading dimensions are batch, so windows that already lie apart are ``(B, W, n, D)``. With
``windows`` (see `Windows`, `grid_regions`, `cell_regions`) the inputs stay ``(B, N, D)`` and rows are compared inside
their group only: results are ``(B, W, n)`` for the rows at ``windows.a``, and indices are positions in ``b``.

Similarities are computed in float32 (float64 for float64 input), also for half precision and under autocast; higher is
closer. ``metric`` is ``cosine`` (norms are clamped to 1e-6, so a zero row has similarity 0), ``dot``, or ``distance``:
the negative Euclidean distance. Values must be finite. Masks are bool, ``(..., Na)`` and ``(..., Nb)`` or without
leading dimensions, True = takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype
from tokred.kernels.similarity_rows.checks import FUNCTIONS, MAX_K, METRICS, REDUCTIONS, check_function, checked
from tokred.kernels.similarity_rows.dispatching import top, total, why_not
from tokred.kernels.similarity_rows.torch_path import norms
from tokred.kernels.similarity_rows.windows import Windows, cell_regions, grid_regions

__all__ = [
    "FUNCTIONS",
    "MAX_K",
    "METRICS",
    "REDUCTIONS",
    "BestMatch",
    "TopMatches",
    "Windows",
    "best_match",
    "cell_regions",
    "grid_regions",
    "similarity_count",
    "similarity_rows",
    "similarity_sum",
    "similarity_topk",
    "unit",
    "why_not",
]


def unit(x: Tensor) -> Tensor:
    """Rows of length one, ``(..., D)`` in the type of the sums; a row shorter than 1e-6 keeps its shortness."""
    x = x.to(accumulator_dtype(x.dtype))
    return x / norms(x)


class BestMatch(NamedTuple):
    """The best partner of every row.

    Attributes:
        score: ``(..., Na)`` float32, float64 for float64 input; -inf where a row has no partner.
        index: ``(..., Na)`` int64; 0 where a row has no partner.
    """

    score: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name, which nobody calls here


class TopMatches(NamedTuple):
    """The ``k`` best partners of every row, best first.

    Attributes:
        score: ``(..., Na, k)`` float32, float64 for float64 input; -inf beyond the last partner.
        index: ``(..., Na, k)`` int64; 0 beyond the last partner.
    """

    score: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name, which nobody calls here


def best_match(
    a: Tensor,
    b: Tensor,
    *,
    metric: str = "cosine",
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    exclude_self: bool = False,
    windows: Windows | None = None,
) -> BestMatch:
    """The most similar row of ``b`` for every row of ``a``; equal scores resolve to the lower index.

    Args:
        a: ``(..., Na, D)``.
        b: ``(..., Nb, D)``.
        metric: ``cosine``, ``dot`` or ``distance``.
        a_mask: ``(..., Na)`` or ``(Na,)``, False = finds no partner.
        b_mask: ``(..., Nb)`` or ``(Nb,)``, False = is nobody's partner.
        exclude_self: row ``i`` of ``a`` is not compared with row ``i`` of ``b`` (with windows: of its group).
        windows: compare inside groups; see the module.

    Returns:
        Scores, differentiable by both inputs, and indices; ``(..., Na)`` each, or ``(B, W, Na)`` with windows.

    Raises:
        TypeError: wrong types or mixed ones.
        ValueError: wrong shapes, mixed devices, or an unknown metric.
    """
    call = checked(a, b, metric, a_mask, b_mask, exclude_self, windows)
    score, index = top(call, 1)
    return BestMatch(score.squeeze(-1), index.squeeze(-1))


def similarity_topk(
    a: Tensor,
    b: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    exclude_self: bool = False,
    windows: Windows | None = None,
) -> TopMatches:
    """The ``k`` most similar rows of ``b``, best first; equal scores in the order of their indices.

    Args:
        a: ``(..., Na, D)``.
        b: ``(..., Nb, D)``.
        k: 1 to 16, at most ``Nb`` (with windows: the length of a group).
        metric: ``cosine``, ``dot`` or ``distance``.
        a_mask: as in `best_match`, like the other arguments.
        b_mask: see there.
        exclude_self: see there.
        windows: see there.

    Raises:
        TypeError: wrong types or mixed ones.
        ValueError: ``k`` is out of range, wrong shapes, mixed devices, or an unknown metric.
    """
    call = checked(a, b, metric, a_mask, b_mask, exclude_self, windows)
    columns = b.shape[-2] if windows is None else windows.b.shape[-1]
    if not 1 <= k <= MAX_K or k > columns:
        raise ValueError(f"k is {k}; allowed are 1 to {MAX_K}, and at most the {columns} rows of b")
    return TopMatches(*top(call, k))


def similarity_sum(
    a: Tensor,
    b: Tensor,
    *,
    function: str = "elu",
    margin: float = 0.0,
    alpha: float = 1.0,
    metric: str = "cosine",
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    mean: bool = False,
    windows: Windows | None = None,
) -> Tensor:
    """The sum of a function of the similarities ``s`` of every row of ``a``.

    Args:
        a: ``(..., Na, D)``.
        b: ``(..., Nb, D)``; pass ``a`` again for the energy of a set, which includes each row's own similarity 1.
        function: ``elu``: ELU(s - margin); ``relu``: max(s - margin, 0); ``identity``: s - margin; ``gaussian``: the
            normal density of 1 - s with deviation 1 - margin.
        margin: see ``function``; must be below 1 for ``gaussian``.
        alpha: the floor of ELU is -alpha.
        metric: ``cosine``, ``dot`` or ``distance``.
        a_mask: ``(..., Na)`` or ``(Na,)``; rows that are False get 0.
        b_mask: ``(..., Nb)`` or ``(Nb,)``; rows that are False add nothing.
        mean: divide by the number of partners; a row without any gets 0.
        windows: compare inside groups; see the module.

    Returns:
        ``(..., Na)`` float32, float64 for float64 input; ``(B, W, Na)`` with windows. Differentiable.

    Raises:
        TypeError: wrong types or mixed ones.
        ValueError: wrong shapes, mixed devices, an unknown metric or function, or a margin that does not fit it.

    Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging (PiToMe), NeurIPS 2024.
    """
    check_function(function, margin)
    call = checked(a, b, metric, a_mask, b_mask, False, windows)
    result = total(call, function, margin, alpha)
    if not mean:
        return result
    partners = call.partners()
    return result / (partners.clamp_min(1) if isinstance(partners, Tensor) else max(partners, 1))


def similarity_count(
    a: Tensor,
    b: Tensor,
    threshold: float,
    *,
    metric: str = "cosine",
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    windows: Windows | None = None,
) -> Tensor:
    """How many rows of ``b`` have a similarity of at least ``threshold`` (not strict, as SAINT's degree).

    Args:
        a: ``(..., Na, D)``.
        b: ``(..., Nb, D)``.
        threshold: in the units of the metric; for ``distance`` the negative of the largest one.
        metric: ``cosine``, ``dot`` or ``distance``.
        a_mask: ``(..., Na)`` or ``(Na,)``; rows that are False get 0.
        b_mask: ``(..., Nb)`` or ``(Nb,)``; rows that are False are not counted.
        windows: compare inside groups; see the module.

    Returns:
        ``(..., Na)`` int64; ``(B, W, Na)`` with windows. Has no gradient.

    Raises:
        TypeError: wrong types or mixed ones.
        ValueError: wrong shapes, mixed devices, or an unknown metric.

    Source: Jeddi et al., Similarity-Aware Token Pruning (SAINT), 2025.
    """
    call = checked(a.detach(), b.detach(), metric, a_mask, b_mask, False, windows)
    return total(call, "count", threshold, 1.0).to(torch.int64)


_BY_NAME: dict[str, Callable[..., Any]] = {
    "max": best_match,
    "sum": similarity_sum,
    "count": similarity_count,
    "topk": similarity_topk,
}


def similarity_rows(a: Tensor, b: Tensor, reduce: str = "max", **options: Any) -> BestMatch | TopMatches | Tensor:
    """One of the four reductions by name.

    Args:
        a: ``(..., Na, D)``.
        b: ``(..., Nb, D)``.
        reduce: ``max`` (`best_match`), ``sum`` (`similarity_sum`), ``count`` (`similarity_count`, which takes
            ``threshold``) or ``topk`` (`similarity_topk`, which takes ``k``).
        options: keyword arguments of that function.

    Raises:
        ValueError: an unknown name.
    """
    if reduce not in _BY_NAME:
        raise ValueError(f"reduce is {reduce!r}; allowed are {', '.join(_BY_NAME)}")
    result: BestMatch | TopMatches | Tensor = _BY_NAME[reduce](a, b, **options)
    return result
