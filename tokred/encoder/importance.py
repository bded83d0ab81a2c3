"""Importance: one score per token, from what a site offers; higher is kept. Shared by the methods that rank tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokred.core.site import Site
from tokred.kernels.dispatch import accumulator_dtype

__all__ = [
    "class_value",
    "tokentm_class_row",
    "tokentm_rollout",
    "tokentm_score",
    "tokentm_weights",
]


def class_value(site: Site) -> Tensor:
    """Class attention times value norm: how much of each patch the class token takes over.

    ``raw[j] = a[j] * |v[j]|`` with the class token's attention ``a``, summed over heads, and the norm of the value
    vector over all heads' channels; the scores are ``raw`` divided by its sum. Grouped value heads count once for every
    query head that reads them, a common factor which the division takes out again, as it does the sum over heads.

    Args:
        site: supplies ``class_attention`` (the attention that the host ran, with its size bias) and ``v``. The class
            token is row 0.

    Returns:
        ``(B, T)`` float32 over the ``T`` unprotected tokens: zero on padding (``site.mask``), one in sum over the
        others. Where every ``raw`` is zero all of them score alike. Carries no gradient.

    Raises:
        MissingInputError: the site lacks one of the two.

    Source: Fayyaz et al., Adaptive Token Sampling, ECCV 2022, section 3.1.
    """
    free = slice(site.prefix, site.shape[1] - site.suffix)
    with torch.no_grad():
        v = site.v[:, :, free]
        # Channels first, then heads: rows are contiguous in their channels only.
        norm = torch.linalg.vector_norm(v, dim=-1, dtype=accumulator_dtype(v.dtype)).norm(dim=1)
        raw = site.class_attention[:, free] * norm.float()
        real = torch.ones_like(raw, dtype=torch.bool) if site.mask is None else site.mask[:, free]
        raw = raw.masked_fill(~real, 0)
        total = raw.sum(1, keepdim=True)
        alike = real / real.sum(1, keepdim=True).clamp_min(1)
        return torch.where(total > 0, raw / total.clamp_min(torch.finfo(raw.dtype).tiny), alike)


def tokentm_score(site: Site, *, length_only: bool = False, direction_only: bool = False) -> Tensor:
    """Class attention times transformation weight, ``a[j] * w[j]``: the score of one layer, without a roll-out.

    Args:
        site: supplies ``class_attention`` and ``transform``.
        length_only, direction_only: see :func:`tokentm_weights`.

    Returns:
        ``(B, T)`` float32 over the ``T`` unprotected tokens, zero on padding. Carries no gradient.

    Raises:
        MissingInputError: the site lacks one of the two.

    Source: Wu et al., Token Transformation Matters, CVPR 2024; its use at a single layer is ours.
    """
    free = slice(site.prefix, site.shape[1] - site.suffix)
    with torch.no_grad():
        before, after = site.transform
        weight = tokentm_weights(
            before, after, length_only=length_only, direction_only=direction_only, mask=site.mask
        ).float()
        score = (site.class_attention * weight)[:, free]
        return score if site.mask is None else score.masked_fill(~site.mask[:, free], 0)


# A matrix (B, N, N) or (B, H, N, N), the site of a layer, or a function that makes one of the two when it is needed.
Attention = Tensor | Site | Callable[[], Tensor | Site]


# Lengths below it count as zero.
_SHORT = 1e-12


def tokentm_weights(
    e: Tensor,
    e_tilde: Tensor,
    *,
    length_only: bool = False,
    direction_only: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Growth of each token's length in a layer, times how well it keeps its direction against the other tokens.

    ``w = |e_tilde| / |e| * NECC``, where NECC is ``exp(cosine(e_tilde, e))`` divided by its mean over the tokens.

    Args:
        e: ``(B, N, C)`` tokens before a transformation.
        e_tilde: ``(B, N, C)`` the same tokens after it, or ``(B, H, N, C)``, after each head's.
        length_only: ``w`` is the ratio of lengths alone.
        direction_only: ``w`` is NECC alone.
        mask: ``(B, N)`` bool, False on padding, which is left out of the mean; None: all are real.

    Returns:
        ``(B, N)`` or ``(B, H, N)`` float32 (float64 for float64 input). A length below 1e-12 has ratio and cosine 0.

    Raises:
        ValueError: shapes do not fit, or both parts are switched off.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552); dividing by the mean is ours.
    """
    if length_only and direction_only:
        raise ValueError("length_only and direction_only exclude each other: nothing would be left of the weight")
    if e_tilde.ndim - e.ndim not in (0, 1) or e.shape[-2:] != e_tilde.shape[-2:]:
        raise ValueError(
            f"e_tilde must be (B, N, C) or (B, H, N, C) for e {tuple(e.shape)}, got {tuple(e_tilde.shape)}"
        )
    dtype = accumulator_dtype(e.dtype)
    before, after = e.to(dtype), e_tilde.to(dtype)
    if after.ndim > before.ndim:
        before, mask = before.unsqueeze(-3), None if mask is None else mask.unsqueeze(-2)
    short, long = before.norm(dim=-1), after.norm(dim=-1)
    known = (short >= _SHORT) & (long >= _SHORT)
    ratio = torch.where(known, long / short.clamp_min(_SHORT), 0)
    if length_only:
        return ratio
    cosine = (before * after).sum(-1) / (short * long).clamp_min(_SHORT * _SHORT)
    kept = torch.where(known, cosine, 0).clamp(-1, 1).exp()
    real = torch.ones_like(kept) if mask is None else mask.to(dtype)
    necc = kept / ((kept * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp_min(1)).clamp_min(_SHORT)
    return necc if direction_only else ratio * necc


def tokentm_rollout(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None = None,
    length: Tensor | None = None,
    *,
    mlp: Sequence[Tensor] | None = None,
    normalise: bool | None = None,
) -> Tensor:
    """The contribution of every original token to every token after the last layer.

    Starts from ``C = diag(length)``; each layer adds ``mean over heads of A diag(w) C``, and then ``diag(w') C`` of its
    MLP if given. Costs ``N`` cubed a layer; :func:`tokentm_class_row` has one row of it for ``N`` squared.

    Args:
        attention: of each layer, first to last: ``(B, N, N)``, ``(B, H, N, N)``, or its site.
        weight: of each layer, ``(B, N)`` or per head ``(B, H, N)``, see :func:`tokentm_weights`; None: ones.
        length: ``(B, N)`` lengths of the tokens before the first layer; None: ones. With neither this is attention
            roll-out with a residual.
        mlp: ``(B, N)`` weights of each layer's MLP; None: MLPs count as the identity.
        normalise: divide each row by its sum after each layer; None: where there are more than 12 layers.

    Returns:
        ``(B, N, N)`` float32: rows are the current tokens, columns the original ones.

    Raises:
        ValueError: the sequences differ in length, or there is no layer.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552).
    """
    weights, mlps, divide = _layers(attention, weight, mlp, normalise)
    first = _start(attention[0], length)
    c = torch.diag_embed(first)
    for layer, w, m in zip(attention, weights, mlps, strict=True):
        c = c + _mixed(layer, w, c)
        if m is not None:
            c = c + m.unsqueeze(-1) * c
        if divide:
            c = c / c.sum(-1, keepdim=True).clamp_min(1e-30)
    return c


def tokentm_class_row(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None = None,
    length: Tensor | None = None,
    *,
    row: Tensor | None = None,
    mlp: Sequence[Tensor] | None = None,
    normalise: bool | None = None,
) -> Tensor:
    """The class token's row of :func:`tokentm_rollout`, rolled from the last layer to the first.

    No product of two matrices is formed; where layers are given as sites, no matrix at all.

    Args:
        attention: see :func:`tokentm_rollout`, as all below.
        weight: see there.
        length: see there.
        row: ``(B, N)`` how the last layer's tokens are weighed, for models that pool; None: the first token alone.
        mlp: see there.
        normalise: see there.

    Returns:
        ``(B, N)`` float32, one score per original token.

    Raises:
        ValueError: the sequences differ in length, or there is no layer.
    """
    weights, mlps, divide = _layers(attention, weight, mlp, normalise)
    first = _start(attention[0], length)
    layers = list(zip(attention, weights, mlps, strict=True))
    sums, total = [], first
    for layer, w, m in layers if divide else []:
        total = total + _mixed(layer, w, total.unsqueeze(-1)).squeeze(-1)
        total = total if m is None else total + m * total
        sums.append(total.clamp_min(1e-30))
        total = total / sums[-1]
    if row is None:
        row = torch.zeros_like(first)
        row[:, 0] = 1
    for i in range(len(layers) - 1, -1, -1):
        layer, w, m = layers[i]
        row = row / sums[i] if divide else row
        row = row if m is None else row + row * m
        votes = _votes(layer, row)
        row = row + (votes if w is None else votes * _per_head(w)).mean(1)
    return row * first


def _layers(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None,
    mlp: Sequence[Tensor] | None,
    normalise: bool | None,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], bool]:
    """Weights and MLP weights of each layer, and whether rows are normalised."""
    depth = len(attention)
    if depth == 0:
        raise ValueError("attention holds no layer")
    for name, given in (("weight", weight), ("mlp", mlp)):
        if given is not None and len(given) != depth:
            raise ValueError(f"{name} has {len(given)} layers, attention has {depth}")
    nothing: list[Tensor | None] = [None] * depth
    return weight or nothing, mlp or nothing, depth > 12 if normalise is None else normalise


def _start(layer: Attention, length: Tensor | None) -> Tensor:
    if length is not None:
        return length.float()
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return torch.ones(made.shape, device=made.device)
    return torch.ones(made.shape[0], made.shape[-1], device=made.device)


def _per_head(w: Tensor) -> Tensor:
    return w.float().unsqueeze(1) if w.ndim == 2 else w.float()


def _mixed(layer: Attention, w: Tensor | None, c: Tensor) -> Tensor:
    """``(B, N, E)``: mean over heads of ``A diag(w) c``."""
    values = c.unsqueeze(1) if w is None else _per_head(w).unsqueeze(-1) * c.unsqueeze(1)
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return made.attention.attend(values).mean(1)
    a = made.float()
    return ((a if a.ndim == 4 else a.unsqueeze(1)) @ values).mean(1)


def _votes(layer: Attention, row: Tensor) -> Tensor:
    """``(B, H, N)``: ``row A`` of every head."""
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return made.attention.columns(row)
    a = made.float()
    return (row[:, None, None] @ (a if a.ndim == 4 else a.unsqueeze(1))).squeeze(2)
