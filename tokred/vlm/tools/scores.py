"""Importance of each token of an image to its vision tower, and to the rows of a prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.vlm.before_llm import VisualSite
from tokred.vlm.in_llm import LayerSite, Of

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


def question_rows(site: LayerSite) -> Tensor:
    """``(B, L)`` bool: the text of each sample behind its last visual token; where there is none, its last token."""
    after = site.visual.flip(1).cummax(1).values.flip(1).logical_not() & site.text_rows
    return after | (site.newest == 0)


def peaks(site: LayerSite, rows: Tensor, *, of: Of = "own") -> Tensor:
    """``(B, L)`` float32: the most that any head of any of some query rows gives to each column.

    Args:
        site: inside the language model.
        rows: ``(B, L)`` bool, of each sample columns one behind the other; a sample with none gives zeros.
        of: see :meth:`LayerSite.attention_of`.

    Raises:
        MissingInputError: the host does not supply that attention.
    """
    source, found = site.attention_of(of), torch.zeros(rows.shape, device=rows.device)
    each = [mine.nonzero().squeeze(1) for mine in rows]
    spans = {i: (int(at[0]), int(at[-1]) + 1) for i, at in enumerate(each) if len(at)}
    if not spans:
        return found
    first, end = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
    q = source.queries(first, end)
    # A maximum over rows takes no weights, and samples ask about different rows: each by itself.
    for i, (a, b) in spans.items():
        asked = source.asked(i, q[i : i + 1, :, a - first : b - first], source.offset + a)
        found[i] = asked.statistics().max[0].amax(0)[source.offset :]
    return found
