"""TokenSelect: every row stays, and each token attends to those that the heads of a layer vote for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("tokenselect")
@dataclass(frozen=True)
class TokenSelect(Keeping):
    """Nothing is forgotten; each generated token attends to the first, the newest, and those that heads vote for.

    Args:
        budget: tokens that are chosen, beside the first and newest ones.
        sinks: first tokens, always attended to.
        recent: newest tokens, always attended to.
        theta: a query whose fingerprint has at least this cosine with that of the last choice takes its list over.
        vote: "soft", "raw" or "hard", see :class:`tokred.kv.TokenSelect`.
        pool: width of a maximum over neighbours of the votes, odd; 0: none.
        positions: "compact", tokens that are attended to are numbered anew; "true", they stay where they stood.
        scaled: whether logits of the vote are scaled as the attention's are.

    Source: Wu et al., TokenSelect, EMNLP 2025 (arXiv 2411.02886).
    """

    summary: ClassVar[str] = "all rows; each token attends to those that heads vote for"
    source: ClassVar[str] = "Wu et al., EMNLP 2025 (arXiv 2411.02886)"
    example: ClassVar[Parameters] = {"budget": 4, "sinks": 1, "recent": 4}
    nothing: ClassVar[Parameters | None] = {"recent": 1 << 20}
    form = stores.TokenSelect

    budget: int = 2048
    sinks: int = 128
    recent: int = 512
    theta: float = 0.9
    vote: str = "soft"
    pool: int = 0
    positions: str = "compact"
    scaled: bool = True
