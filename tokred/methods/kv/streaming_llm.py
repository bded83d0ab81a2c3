"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Recency


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Attention sinks and a recent window, with the positions that the tokens had (the original re-numbers them).

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        sinks: first tokens that stay.
        every: generated tokens between evictions; 0: only at the end of the prompt.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, section 3; the eviction alone.
    """

    summary: ClassVar[str] = "the first tokens and the newest ones"
    source: ClassVar[str] = "Xiao et al., ICLR 2024 (arXiv 2309.17453)"
    example: ClassVar[Parameters] = {"budget": 9, "sinks": 2}

    budget: BudgetLike = 0.5
    sinks: int = 4
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """The newest rows, behind the sinks."""
        return Parts(Recency(), as_budget(self.budget), when=When(every=self.every), sinks=self.sinks)
