"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.policy import check_positions
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Recency(Score):
    """The newer the better; with sinks this is StreamingLLM.

    Source: Xiao et al., StreamingLLM, ICLR 2024 (arXiv 2309.17453), the eviction alone.
    """

    name: ClassVar[str] = "recency"
    ordered: ClassVar[bool] = False
    oldest: ClassVar[bool] = True

    def __call__(self, site: CacheSite) -> Tensor:
        """The number of the token."""
        return site.token.double().expand(site.extent)

    def quick(self, q: Tensor, k: Tensor, slots: Tensor, scale: float | None, rows: dict[str, Tensor]) -> Tensor | None:
        """The slots."""
        return slots


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(KVPreset):
    """Attention sinks and a recent window.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        sinks: first tokens that stay.
        every: generated tokens between evictions; 0: only at the end of the prompt.
        positions: ``"cache"``: those inside the cache, as in the paper, for texts longer than the model was trained
            for: the sinks move up behind what has left, and stand at most an eighth of the rows further from it than
            in a text that begins with the window. ``"text"``: tokens stand where they were.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, section 3.
    """

    summary: ClassVar[str] = "the first tokens and the newest ones"
    source: ClassVar[str] = "Xiao et al., ICLR 2024 (arXiv 2309.17453)"
    example: ClassVar[Parameters] = {"budget": 9, "sinks": 2}

    sinks: int = 4
    every: int = 1
    positions: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positions(self.positions)

    def make_score(self) -> Score:
        return Recency()
