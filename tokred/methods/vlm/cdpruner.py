"""CDPruner: image tokens that differ from each other and fit the question, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.tools.budget import Budget
from tokred.vlm.tools.greedy import DENSE, determinant_points, directions
from tokred.vlm.tools.scores import Attention, attention_reads, patch_scores

FLOOR = 1e-6  # added to the distance from the least relevant token, as in the authors' code


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Budgeted):
    """Conditional diversity: the kernel is the similarity of two tokens times the relevance of both.

    The set of tokens with the largest determinant of that kernel is searched for greedily, one token after the other.

    The authors measure relevance in the embedding space of CLIP, with its text tower, which vision-language models do
    not carry. Here it is the mean cosine of a projected token with the input embeddings of the prompt's text (our
    reading), so no published figure speaks for it.

    Args:
        budget: tokens kept of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        relevance: ``"text"`` as above; ``"class"`` or ``"received"``: the attention of the vision tower (ours); or
            ``"none"``, which leaves diversity alone.
        sign: -1 prefers the tokens that are least relevant: the authors do so with CLIP, whose patches answer inversely
            to a text.
        theta: strength of relevance in (0, 1), or None: relevance itself, between 0 and 1.

    Source: Zhang et al., CDPruner, NeurIPS 2025, section 3, and its released code.
    """

    summary: ClassVar[str] = "image tokens that differ and fit the question (determinantal point process)"
    source: ClassVar[str] = "Zhang et al., NeurIPS 2025 (arXiv 2506.10967)"

    budget: Budget = 64
    relevance: Literal["text", "class", "received", "none"] = "text"
    sign: int = 1
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.relevance, "relevance", ("text", "class", "received", "none"))
        if self.sign not in (1, -1) or isinstance(self.sign, bool):
            raise ValueError(f"sign must be 1 or -1, got {self.sign!r}")
        if self.theta is not None and not (isinstance(self.theta, float) and 0 < self.theta < 1):
            raise ValueError(f"theta must be None or lie between 0 and 1, got {self.theta!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The projected features, and what says how relevant they are."""
        more = {"text": {"text"}, "none": set[str]()}.get(self.relevance)
        return frozenset({"x"} | (attention_reads(self.relevance) if more is None else more))  # type: ignore[arg-type]

    def choose(self, site: VisualSite) -> Reduction:
        """Weigh the tokens, pick one after the other."""
        n = site.shape[1]
        picks = determinant_points(site.x, self.count(n), self.weights(site), dense=DENSE)
        return Reduction.keep(picks.chosen, n)

    def weights(self, site: VisualSite) -> Tensor | None:
        """``(B, N)`` float32 relevance of every token, scaled as the kernel takes it; None: all alike."""
        if self.relevance == "none":
            return None
        if self.relevance == "text":
            value = text_relevance(site.x, site.text, site.text_mask)
        else:
            attention: Attention = self.relevance
            value = patch_scores(site, attention)
        return scaled(value * self.sign, self.theta)


def text_relevance(x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """Mean cosine of every token with the tokens of a text.

    Args:
        x: ``(B, N, C)``.
        text: ``(B, T, C)``.
        mask: ``(B, T)`` bool, False on padding; None: all are real.

    Returns:
        ``(B, N)`` float32; 0 where the text is empty.
    """
    words = directions(text)
    if mask is not None:
        words = words * mask.unsqueeze(-1)
        count = mask.sum(1).clamp_min(1).view(-1, 1, 1)
        mean = words.sum(1, keepdim=True) / count
    else:
        mean = words.sum(1, keepdim=True) / max(1, text.shape[1])
    return (directions(x) @ mean.mT).squeeze(-1).float()


def scaled(value: Tensor, theta: float | None = None) -> Tensor:
    """Relevance between its smallest and largest value of each image, ``(B, N)`` float32.

    Args:
        value: ``(B, N)``; where all values of an image are alike, its tokens weigh 1.
        theta: strength in (0, 1): the exponential of ``theta / (2 - 2 theta)`` times relevance; None: relevance.
    """
    low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
    span = high - low
    r = torch.where(span > 0, (value - low + FLOOR) / torch.where(span > 0, span, 1), 1.0)
    return r if theta is None else torch.exp(theta / (2 * (1 - theta)) * r)
