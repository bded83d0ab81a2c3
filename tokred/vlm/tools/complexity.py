"""The complexity of an image: how much there is to see in it, by scores between 0 (nothing) and 1."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from tokred.errors import MissingInputError
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.tools.scores import outliers, patch_scores

MOST = 1024  # tokens whose rank is computed


def effective_rank(x: Tensor) -> Tensor:
    """Number of directions that the tokens of an image spread over, as a share of those that they could.

    The exponential of the entropy of the squared singular values of the centred tokens, less one.

    Args:
        x: ``(B, N, C)``; of more than 1,024 tokens every so many one is taken.

    Returns:
        ``(B,)`` float32 in [0, 1]; 0 where tokens are alike or lie on a line.

    Source: the score is ours; effective rank as in Roy and Vetterli, EUSIPCO 2007.
    """
    x = x[:, :: -(-x.shape[1] // MOST)].float()
    n, c = x.shape[1:]
    most = min(n - 1, c) - 1
    if most < 1:
        return x.new_zeros(x.shape[0])
    centred = x - x.mean(1, keepdim=True)
    s = torch.linalg.svdvals(centred).square()
    # What rounding leaves of equal tokens is no direction.
    scale = x.square().sum((1, 2)).unsqueeze(1)
    s = torch.where(s > scale * 1e-10, s, 0)
    p = s / s.sum(1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    entropy = -torch.special.xlogy(p, p).sum(1)
    share: Tensor = (entropy.exp() - 1) / most
    return share.clamp(0, 1)


def redundancy(x: Tensor) -> Tensor:
    """One less the mean cosine of every token with its most similar other one, ``(B,)`` float32 in [0, 1].

    Args:
        x: ``(B, N, C)``.
    """
    if x.shape[1] < 2:
        return torch.ones(x.shape[0], device=x.device)
    best = best_match(x, x, exclude_self=True).score
    return (1 - best.float().mean(1)).clamp(0, 1)


def spread(attention: Tensor) -> Tensor:
    """Entropy of attention over the tokens of an image, as a share of the largest, ``(B,)`` float32 in [0, 1].

    Args:
        attention: ``(B, N)``, not negative.
    """
    n = attention.shape[1]
    if n < 2:
        return torch.zeros(attention.shape[0], device=attention.device)
    p = attention.float() / attention.float().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy: Tensor = -torch.special.xlogy(p, p).sum(1)
    return (entropy / math.log(n)).clamp(0, 1)


def compressed(pixels: Tensor, level: int = 9) -> Tensor:
    """Bits a pixel that deflate needs for a grey image of 8 bits, divided by 8, ``(B,)`` float32 in [0, 1].

    Args:
        pixels: ``(B, H, W)`` uint8.
        level: of the codec; part of the definition.

    Raises:
        ValueError: the pixels have another type or shape.
    """
    if pixels.ndim != 3 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be (B, H, W) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
    rows = pixels.cpu().flatten(1)
    sizes = [len(zlib.compress(bytes(row.tolist()), level)) for row in rows]
    return torch.tensor([min(1.0, size / rows.shape[1]) for size in sizes], device=pixels.device)


def _pixels(site: VisualSite) -> Tensor:
    pixels: Tensor | None = getattr(site, "pixels", None)
    if pixels is None:
        raise MissingInputError("this site does not supply 'pixels'")
    return compressed(pixels)


# What each score reads, and how it is made.
SCORES: dict[str, tuple[frozenset[str], Callable[[VisualSite], Tensor]]] = {
    "features": (frozenset({"x"}), lambda site: effective_rank(site.x)),
    "redundancy": (frozenset({"x"}), lambda site: redundancy(site.x)),
    "attention": (frozenset({"class_attention"}), lambda site: spread(patch_scores(site))),
    "received": (frozenset({"attention"}), lambda site: spread(patch_scores(site, "received"))),
    "outliers": (frozenset({"class_attention"}), lambda site: outliers(patch_scores(site)).float() / site.shape[1]),
    "pixels": (frozenset({"pixels"}), _pixels),
}


def calibrated(score: Tensor, known: tuple[float, ...]) -> Tensor:
    """The share of known scores that are lower, interpolated: uniform over the images that those come from.

    Args:
        score: ``(B,)``.
        known: at least two scores.

    Returns:
        ``(B,)`` float32 in [0, 1].
    """
    order = torch.tensor(sorted(known), dtype=torch.float64, device=score.device)
    value, n = score.double(), len(known)
    above = torch.searchsorted(order, value).clamp(1, n - 1)
    low, high = order[above - 1], order[above]
    part = torch.where(high > low, (value - low) / (high - low).clamp_min(1e-300), 0.5)
    return ((above - 1 + part) / (n - 1)).clamp(0, 1).float()
