"""KVzip: the rows that the model needs to repeat the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Global
from tokred.kv.parts import When, check_amount
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Reconstruction

FIRST = "Repeat the previous context exactly."
LATER = "Repeat the part of the previous context exactly, starting with"


@register("kvzip")
@dataclass(frozen=True)
class KVzip(CachePolicy):
    """The prompt is read, fed once more piece by piece, and judged by the attention that its rows receive from that.

    Costs about two more prompts' time, and asks no question, so that the cache serves any. The repeated tokens leave it
    before the first token is generated.

    Args:
        budget: what is kept: a share in (0, 1], tokens or bytes such as "64 MiB" of all layers and heads together; or a
            budget of :mod:`tokred.kv`.
        chunk: tokens that one forward repeats.
        sinks: first tokens (a chat template's), which are not repeated and stay.
        instruction: token ids before the first piece; None: the plain repetition. :meth:`instructed` makes them.
        later: token ids before each other piece; None: as ``instruction``.
        overlap: tokens of the piece before, which follow the later instruction and say where it starts.
        turns: repeat and choose again at the end of later turns, or of each chunk of a prompt.

    Source: Kim et al., KVzip, NeurIPS 2025 (arXiv 2505.23416).
    """

    summary: ClassVar[str] = "what the model attends to while it repeats the context"
    source: ClassVar[str] = "Kim et al., NeurIPS 2025 (arXiv 2505.23416)"
    example: ClassVar[Parameters] = {"budget": 0.4, "chunk": 9, "sinks": 2}

    budget: BudgetLike = 0.5
    chunk: int = 2048
    sinks: int = 4
    instruction: tuple[int, ...] | None = None
    later: tuple[int, ...] | None = None
    overlap: int = 8
    turns: bool = False

    def __post_init__(self) -> None:
        budget = self.budget
        if budget is None:
            budget = Global()
        elif isinstance(budget, float | int) or (isinstance(budget, str) and not budget.isidentifier()):
            budget = Global(check_amount(budget))
        object.__setattr__(self, "budget", as_budget(budget))
        score = self.parts.score
        assert isinstance(score, Reconstruction)  # made below
        object.__setattr__(self, "instruction", score.instruction)
        object.__setattr__(self, "later", score.later)
        check_room(self)

    @classmethod
    def instructed(cls, tokenizer: Any, first: str = FIRST, later: str = LATER, **parameters: Any) -> KVzip:
        """The policy with instructions in words.

        Args:
            tokenizer: has ``encode(text, add_special_tokens=False)``.
            first: before the first piece.
            later: before each other piece; its overlap follows.
            parameters: of the policy.
        """
        ids = [tuple(tokenizer.encode(f"\n\n{text}\n\n", add_special_tokens=False)) for text in (first, later)]
        return cls(instruction=ids[0], later=ids[1], **parameters)

    @property
    def parts(self) -> Parts:
        """The reconstruction's attention, shared out among all layers and heads."""
        score = Reconstruction(self.chunk, self.sinks, self.instruction, self.later, self.overlap)
        budget = as_budget(self.budget)
        return Parts(score, budget, when=When(turns=self.turns), sinks=self.sinks)
