"""kv: any score with any budget, fate, time and store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.checks import check_share
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Fate, Score, When, as_part, check_count
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_positions, check_room
from tokred.kv.stores import Store


@register("kv")
@dataclass(frozen=True)
class KVPolicy(CachePolicy):
    """A policy put together from its parts; the named presets are such policies.

    Args:
        score: an object of :mod:`tokred.kv`, or its name.
        budget: a budget of :mod:`tokred.kv`, its name, a share in (0, 1], tokens, or bytes such as "64 MiB".
        fate: "evict" or "merge", or an object.
        when: a :class:`tokred.kv.When`; None: at the end of the prompt.
        sinks: first tokens that are never evicted.
        recent: newest tokens that are never evicted; a float is a share of the kept rows.
        store: in what form rows are held, an object of :mod:`tokred.kv` or its name.
        positions: ``"cache"``: the sinks move up behind what has left, see :class:`StreamingLLM`; ``"text"``: tokens
            stand where they were.

    Source: ours.
    """

    summary: ClassVar[str] = "any score with any budget, fate, time and store"
    source: ClassVar[str] = "tokred"
    example: ClassVar[Parameters] = {
        "score": "key_norm",
        "budget": {"part": "adaptive", "amount": 9},
        "when": {"part": "when", "every": 2},
        "sinks": 1,
        "recent": 2,
    }

    score: Score | str = "window"
    budget: BudgetLike = 0.5
    fate: Fate | str = "evict"
    when: When | None = None
    sinks: int = 0
    recent: int | float = 0
    store: Store | str = "flat"
    positions: str = "text"

    def __post_init__(self) -> None:
        when = When() if self.when is None else as_part(self.when, When, "when")
        check_count(self.sinks, "sinks")
        if isinstance(self.recent, float):
            check_share(self.recent, "recent", zero=True)
        else:
            check_count(self.recent, "recent")
        made = {
            "score": as_part(self.score, Score, "score"),  # type: ignore[type-abstract]
            "budget": as_budget(self.budget),
            "fate": as_part(self.fate, Fate, "fate"),  # type: ignore[type-abstract]
            "when": when,
            "store": as_part(self.store, Store, "store"),  # type: ignore[type-abstract]
        }
        for name, part in made.items():
            object.__setattr__(self, name, part)
        check_room(self)
        check_positions(self.positions)

    @property
    def parts(self) -> Parts:
        score, fate, store = self.score, self.fate, self.store
        assert isinstance(score, Score)  # made so above
        assert isinstance(fate, Fate)
        assert isinstance(store, Store)
        return Parts(score, as_budget(self.budget), fate, self.when or When(), self.sinks, self.recent, store)
