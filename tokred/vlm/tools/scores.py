"""Importance of each token of an image to its vision tower."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.vlm.before_llm import VisualSite

Attention = Literal["class", "received"]
ATTENTION = ("class", "received")


def attention_reads(attention: Attention) -> set[str]:
    """Names of the attributes that :func:`patch_scores` takes from a site."""
    return {"class_attention"} if attention == "class" else {"attention"}


def patch_scores(site: VisualSite, attention: Attention = "class") -> Tensor:
    """Attention that every token received in the layer of the tower whose features are used.

    Args:
        site: of the stage ``projector``.
        attention: ``"class"``: from the class token, mean over heads; ``"received"``: from all tokens of the image,
            mean over heads and queries, which towers without a class token have too (our choice for them).

    Returns:
        ``(B, N)`` float32.

    Raises:
        MissingInputError: the site does not supply it.
    """
    if attention == "class":
        return site.class_attention
    return site.column_scores().mean(1) / site.shape[1]


def outliers(attention: Tensor, whisker: float = 1.5) -> Tensor:
    """How many tokens of each image are above the upper whisker of a box plot.

    Args:
        attention: ``(B, N)``.
        whisker: distances of the quartiles from the third one to the end of the whisker.

    Returns:
        ``(B,)`` int64. Quartiles are interpolated linearly; a value on the whisker's end is none.
    """
    a = attention.float()
    low, high = torch.quantile(a, torch.tensor([0.25, 0.75], device=a.device), dim=1, keepdim=True)
    above: Tensor = a > high + whisker * (high - low)
    return above.sum(1)
