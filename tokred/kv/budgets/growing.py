"""The prompt stays, the generated part grows by a share of what is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.kv.parts import Budget, check_count
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Growing(Budget):
    """``prompt + m * period / ratio + recent`` rows after ``m`` periods.

    Args:
        period: generated tokens of a period.
        ratio: of a period's tokens one in so many survives.
        recent: newest tokens, kept on top.

    Source: Song et al., Reasoning Path Compression, NeurIPS 2025 (arXiv 2505.13866).
    """

    name: ClassVar[str] = "growing"
    why_no_limit: ClassVar[str | None] = "its budget keeps the whole prompt, and grows"

    period: int = 1024
    ratio: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        check_count(self.period, "period", 1)
        check_count(self.ratio, "ratio", 1)
        check_count(self.recent, "recent", 1)
        if self.period % self.ratio:
            raise ValueError(f"period / ratio must be whole, got {self.period} / {self.ratio}")

    @property
    def amount(self) -> float:  # type: ignore[override]
        """A share, only to say whether everything is kept."""
        return 1 / self.ratio

    def rows(self, site: CacheSite) -> tuple[int, ...]:
        """Rows after the periods that are complete."""
        done = max(0, site.generated - self.recent) // self.period
        return tuple(n + done * self.period // self.ratio + self.recent for n in site.prompt)
