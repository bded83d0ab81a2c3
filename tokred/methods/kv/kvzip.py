"""KVzip: the rows that the model needs to repeat the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokred.core.checks import check_choice
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.errors import MissingInputError
from tokred.kv.budgets import Global
from tokred.kv.parts import Score, check_amount, check_count
from tokred.kv.preset import KVPreset
from tokred.kv.repeat import REPEATED, Repeats
from tokred.kv.site import CacheSite

FIRST = "Repeat the previous context exactly."
LATER = "Repeat the part of the previous context exactly, starting with"


@dataclass(frozen=True)
class Reconstruction(Score):
    """The largest attention that a row receives while the model is fed the context once more, piece by piece.

    The repeated tokens share their attention out among the sinks, the piece of the context that they repeat, and
    themselves; they leave the cache again. No question has to be at hand.

    Args:
        chunk: tokens of the context that one forward repeats.
        sinks: first tokens (a chat template's), which are not repeated and stand above all others.
        instruction: token ids before the first piece, such as those of "Repeat the previous context exactly."; None:
            the plain repetition.
        later: token ids before each other piece, such as those of "Repeat the part of the previous context exactly,
            starting with"; None: as ``instruction``.
        overlap: tokens of the piece before, which follow the later instruction and say where it starts.
        norm: "plus": each weight is divided by the length of what its query was made of, and multiplied by the length
            of what its value adds to the stream (KVzip+ of the paper on KVzap, arXiv 2601.07891); "none".

    Source: Kim et al., KVzip, NeurIPS 2025 (arXiv 2505.23416).
    """

    name: ClassVar[str] = "reconstruction"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    accumulates: ClassVar[bool] = True
    numbers: ClassVar[int] = 1

    chunk: int = 2048
    sinks: int = 4
    instruction: tuple[int, ...] | None = None
    later: tuple[int, ...] | None = None
    overlap: int = 8
    norm: str = "none"

    def __post_init__(self) -> None:
        check_count(self.chunk, "chunk", 1)
        check_choice(self.norm, "norm", ("none", "plus"))
        check_count(self.sinks, "sinks")
        check_count(self.overlap, "overlap")
        for name in ("instruction", "later"):
            object.__setattr__(self, name, check_ids(getattr(self, name), name))

    @property
    def repeats(self) -> Repeats:
        """The pieces and what comes before them."""
        first = self.instruction or ()
        later, plus = first if self.later is None else self.later, self.norm == "plus"
        return Repeats(self.chunk, self.sinks, first, later, self.overlap, plus)

    @property
    def needs(self) -> frozenset[str]:
        """Queries and keys, and what lengths are taken of."""
        return self.reads | ({"v", "projection", "hidden"} if self.norm == "plus" else set())

    def __call__(self, site: CacheSite) -> Tensor:
        """The attention that forwards which repeat have found.

        Raises:
            MissingInputError: there were none.
        """
        found = site.rows.get(REPEATED)
        if found is None:
            raise MissingInputError(
                "the reconstruction score is known after forwards that repeat the context, which a site alone cannot "
                "run: apply the policy to a model"
            )
        return found


def check_ids(value: object, argument: str) -> tuple[int, ...] | None:
    """Token ids as a tuple; None stays None.

    Raises:
        TypeError: a text, whose tokenizer is not known here, or something else that holds no ids.
        ValueError: an id is negative.
    """
    if value is None:
        return None
    listed = value if isinstance(value, str) else getattr(value, "tolist", lambda: value)()
    if isinstance(listed, str) or not isinstance(listed, list | tuple):
        raise TypeError(f"{argument} must be token ids, as tokenizer.encode(text) gives them, got {value!r}")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise TypeError(f"{argument} must be a flat list of token ids, got {value!r}")
    if any(i < 0 for i in listed):
        raise ValueError(f"{argument} must be token ids of at least 0, got {value!r}")
    return tuple(listed)


@register("kvzip")
@dataclass(frozen=True)
class KVzip(KVPreset):
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
        norm: "plus" for KVzip+, see :class:`Reconstruction`; "none".

    Source: Kim et al., KVzip, NeurIPS 2025 (arXiv 2505.23416).
    """

    summary: ClassVar[str] = "what the model attends to while it repeats the context"
    source: ClassVar[str] = "Kim et al., NeurIPS 2025 (arXiv 2505.23416)"
    example: ClassVar[Parameters] = {"budget": 0.4, "chunk": 9, "sinks": 2}

    chunk: int = 2048
    sinks: int = 4
    instruction: tuple[int, ...] | None = None
    later: tuple[int, ...] | None = None
    overlap: int = 8
    turns: bool = False
    norm: str = "none"

    def __post_init__(self) -> None:
        budget = self.budget
        if budget is None:
            budget = Global()
        elif isinstance(budget, float | int) or (isinstance(budget, str) and not budget.isidentifier()):
            budget = Global(check_amount(budget))
        object.__setattr__(self, "budget", budget)
        score = self.make_score()
        object.__setattr__(self, "instruction", score.instruction)
        object.__setattr__(self, "later", score.later)
        super().__post_init__()

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

    def make_score(self) -> Reconstruction:
        return Reconstruction(self.chunk, self.sinks, self.instruction, self.later, self.overlap, self.norm)
