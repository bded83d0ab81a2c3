"""Importance: one score per token, from what a site offers; higher is kept. Shared by the methods that rank tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype
from tokred.rollout import contributions, tokentm_class_row, tokentm_rollout, tokentm_weights
from tokred.site import Site

__all__ = [
    "class_value",
    "contributions",
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
