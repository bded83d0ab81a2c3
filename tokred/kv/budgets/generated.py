"""So many generated rows, and the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.kv.parts import Budget, check_count
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Generated(Budget):
    """The prompt's rows, and ``amount`` of those that were generated. For policies that never touch the prompt.

    Args:
        amount: generated rows of each head; the newest count.

    Source: as counted by Mao et al., TriAttention, arXiv 2604.04921, in its form for serving.
    """

    name: ClassVar[str] = "generated"
    why_no_limit: ClassVar[str | None] = "its budget keeps the whole prompt"

    amount: int = 2048

    def __post_init__(self) -> None:
        check_count(self.amount, "amount", 1)

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """All of ``n`` tokens: a prompt's."""
        return n

    def rows(self, site: CacheSite) -> tuple[int, ...]:
        """Rows of the prompt and the generated ones."""
        return tuple(n + self.amount for n in site.prompt)
