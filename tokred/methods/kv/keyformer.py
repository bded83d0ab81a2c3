"""Keyformer: accumulated attention of noisy logits, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Gumbel


@register("keyformer")
@dataclass(frozen=True)
class Keyformer(CachePolicy):
    """As H2O, with Gumbel noise and a rising temperature in the score; the model's own attention has neither.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        recent: share of the kept rows that are the newest (a whole number: tokens).
        tau: temperature at the prompt and at the last token.
        noise: "gumbel", "gaussian", "constant" (temperature alone) or "none" (H2O).
        seed: which noise.
        steps: tokens that will be generated; None: as ``generate`` says.
        every: generated tokens between evictions.

    Source: Adnan et al., Keyformer, MLSys 2024, section 3; the row that leaves the window competes, as in the text.
    """

    summary: ClassVar[str] = "accumulated attention of Gumbel-noisy logits, at every step"
    source: ClassVar[str] = "Adnan et al., MLSys 2024 (arXiv 2403.09054)"

    budget: BudgetLike = 0.6
    recent: float | int = 0.3
    tau: tuple[float, float] = (1.0, 2.0)
    noise: str = "gumbel"
    seed: int = 0
    steps: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if len(self.tau) != 2:
            raise ValueError(f"tau must be two temperatures, got {self.tau!r}")
        object.__setattr__(self, "tau", tuple(self.tau))
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Noisy accumulated attention, at every step."""
        score = Gumbel(*self.tau, noise=self.noise, seed=self.seed, steps=self.steps)
        return Parts(score, as_budget(self.budget), when=When(every=self.every), recent=self.recent)
