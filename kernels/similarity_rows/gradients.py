"""Gradients of both reductions, and the ``autograd.Function`` that puts them around the torch path.

Nothing of the matrix is kept for the backward pass: a best match needs only its own pairs, a sum recomputes blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype, without_autocast
from tokred.kernels.similarity_rows import torch_path
from tokred.kernels.similarity_rows.reference import NORM_FLOOR

Options = tuple[Any, ...]


def _through_unit(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Gradient by ``x`` of ``x / max(|x|, floor)``, given the one by the quotient; below the floor it is linear."""
    radial = (grad * x).sum(-1, keepdim=True) / (norm * norm)
    return (grad - torch.where(norm > NORM_FLOOR, radial, 0) * x) / norm


def _norms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_min(NORM_FLOOR)


def top_backward(
    grad: Tensor, a: Tensor, b: Tensor, score: Tensor, index: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores ``(B, Na, k)`` by ``a`` and ``b``; only the chosen pairs have any."""
    dtype = accumulator_dtype(a.dtype)
    batch, rows, k = index.shape
    with without_autocast(a):
        x, y = a.to(dtype), b.to(dtype)
        if y.shape[1] == 0 or index.numel() == 0:
            return torch.zeros_like(a), torch.zeros_like(b)
        grad = torch.where(score == -torch.inf, 0, grad).unsqueeze(-1)  # [B, Na, k, 1]
        shift = torch.arange(batch, device=a.device).view(-1, 1, 1) * y.shape[1]
        flat = (index + shift).flatten()
        partner = y.flatten(0, 1).index_select(0, flat).view(batch, rows, k, y.shape[2])
        own = x.unsqueeze(2)
        if metric == "distance":
            apart = own - partner
            distance = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
            by_own = torch.where(distance > 0, -grad * apart / distance, 0)
            by_partner = -by_own
        elif metric == "dot":
            by_own, by_partner = grad * partner, grad * own
        else:
            own_norm, partner_norm = _norms(own), _norms(partner)
            by_own = _through_unit(grad * partner / partner_norm, own, own_norm)
            by_partner = _through_unit(grad * own / own_norm, partner, partner_norm)
        da = by_own.sum(2)
        db = torch.zeros_like(y.flatten(0, 1)).index_add(0, flat, by_partner.flatten(0, 2)).view_as(b)
    return da.to(a.dtype), db.to(b.dtype)


def _slope(s: Tensor, function: str, margin: float, alpha: float) -> Tensor:
    """Derivative of `reference.transform`; at a kink, torch's own choice."""
    if function == "elu":
        return torch.where(s > margin, 1, alpha * torch.exp((s - margin).clamp_max(0)))
    if function == "relu":
        return (s > margin).to(s.dtype)
    if function == "identity":
        return torch.ones_like(s)
    if function == "count":
        return torch.zeros_like(s)
    u = (1 - s) / (1 - margin)
    return u * torch.exp(-u * u / 2) / ((1 - margin) ** 2 * math.sqrt(2 * math.pi))


def total_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    function: str,
    margin: float,
    alpha: float,
    metric: str,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums ``(B, Na)`` by ``a`` and ``b``, over the same blocks as the forward pass."""
    dtype = accumulator_dtype(a.dtype)
    with without_autocast(a):
        x, y = a.to(dtype), b.to(dtype)
        grad = grad if a_mask is None else torch.where(a_mask, grad, 0)
        if metric == "cosine":
            x_norm, y_norm = _norms(x), _norms(y)
            dx, dy = _matrix_backward(grad, x / x_norm, y / y_norm, (function, margin, alpha, metric), b_mask)
            dx, dy = _through_unit(dx, x, x_norm), _through_unit(dy, y, y_norm)
        else:
            dx, dy = _matrix_backward(grad, x, y, (function, margin, alpha, metric), b_mask)
    return dx.to(a.dtype), dy.to(b.dtype)


def _matrix_backward(
    grad: Tensor, x: Tensor, y: Tensor, options: Options, b_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for ``s = x @ y.mT`` or the negative distance, with ``x`` and ``y`` as they enter the product."""
    batch, rows = x.shape[:2]
    step, row_step = torch_path.block_sizes(batch, rows, y.shape[1], x)
    if step == batch and row_step == rows:
        # Without a loop over sizes, which would bind a compiled graph to them.
        return _block_backward(grad, x, y, options, b_mask)
    by_x, by_y = [], []
    for i in range(0, batch, step):
        here = slice(i, i + step)
        yi, mask = y[here], None if b_mask is None else b_mask[here]
        dyi, dxi = torch.zeros_like(yi), []
        for j in range(0, rows, row_step):
            dxj, dyj = _block_backward(grad[here, j : j + row_step], x[here, j : j + row_step], yi, options, mask)
            dxi.append(dxj)
            dyi = dyi + dyj
        by_x.append(torch.cat(dxi, 1))
        by_y.append(dyi)
    return torch.cat(by_x), torch.cat(by_y)


def _block_backward(
    grad: Tensor, x: Tensor, y: Tensor, options: Options, b_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for one block, whose matrix ``(B, Na, Nb)`` is formed."""
    function, margin, alpha, metric = options
    s = torch.bmm(x, y.mT)
    if metric == "distance":
        squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(1)
        s = -(squares - 2 * s).clamp_min(torch.finfo(s.dtype).tiny).sqrt()
    w = _slope(s, function, margin, alpha) * grad.unsqueeze(-1)
    if b_mask is not None:
        w = w * b_mask.unsqueeze(1)
    if metric == "distance":
        w = torch.where(s.square() > torch.finfo(s.dtype).tiny, -w / s, 0)
    dx, dy = torch.bmm(w, y), torch.bmm(w.mT, x)
    if metric == "distance":
        dx, dy = dx - w.sum(-1, keepdim=True) * x, dy - w.sum(1).unsqueeze(-1) * y
    return dx, dy


class Top(torch.autograd.Function):
    """Autograd around `torch_path.top`."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, k: int, metric: str, a_mask: Tensor | None, b_mask: Tensor | None, self_: bool
    ) -> tuple[Tensor, Tensor]:
        score, index = torch_path.top(a, b, k, metric, a_mask, b_mask, self_)
        ctx.metric = metric
        ctx.save_for_backward(a, b, score, index)
        ctx.mark_non_differentiable(index)
        return score, index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, score, index = ctx.saved_tensors
        da, db = top_backward(grads[0], a, b, score, index, ctx.metric)
        return da, db, None, None, None, None, None


class Total(torch.autograd.Function):
    """Autograd around `torch_path.total`."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        function: str,
        margin: float,
        alpha: float,
        metric: str,
        a_mask: Tensor | None,
        b_mask: Tensor | None,
    ) -> Tensor:
        ctx.options = function, margin, alpha, metric
        ctx.save_for_backward(a, b, a_mask, b_mask)
        return torch_path.total(a, b, function, margin, alpha, metric, a_mask, b_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, a_mask, b_mask = ctx.saved_tensors
        function, margin, alpha, metric = ctx.options
        da, db = total_backward(grads[0], a, b, function, margin, alpha, metric, a_mask, b_mask)
        return da, db, None, None, None, None, None, None
