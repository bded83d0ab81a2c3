"""``Preset``: a policy of published parts under the name of its paper."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

from tokred.kv.fates import Evict
from tokred.kv.parts import Budget, Fate, Score, When, as_part
from tokred.kv.policy import REMEMBERED, BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.stores import Flat, Store

_EVICT, _FLAT = Evict(), Flat()


@dataclass(frozen=True)
class Preset(CachePolicy):
    """Base of presets: a subclass has fields, and makes its score and its budget of them.

    Fields named ``every``, ``turns``, ``sinks``, ``recent`` mean what they mean in :class:`tokred.kv.When` and
    :class:`tokred.kv.policy.Parts`; a field ``score`` may be given by name.

    Args:
        store: in what form rows are held, an object of :mod:`tokred.kv` or its name; None: ``tokred.kv.Flat()``.
    """

    store: Store | str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.store is not None:
            object.__setattr__(self, "store", as_part(self.store, Store, "store"))  # type: ignore[type-abstract]
        if hasattr(self, "score"):
            object.__setattr__(self, "score", as_part(self.score, Score, "score"))  # type: ignore[type-abstract]
        check_room(self)

    @abstractmethod
    def make_score(self) -> Score:
        """The score, of the fields."""

    @abstractmethod
    def make_budget(self) -> Budget:
        """The budget, of the fields."""

    def make_fate(self) -> Fate:
        """The fate of rows that are not kept: they are evicted."""
        return _EVICT

    def make_when(self) -> When:
        """The times: the end of the prompt, and what fields say."""
        return When(every=getattr(self, "every", 0), turns=getattr(self, "turns", False))

    @property
    def parts(self) -> Parts:
        """All that the subclass makes, put together."""
        remembered: Parts | None = self.__dict__.get(REMEMBERED)
        if remembered is not None:
            return remembered
        sinks, recent = getattr(self, "sinks", 0), getattr(self, "recent", 0)
        store = _FLAT if self.store is None else self.store
        assert isinstance(store, Store)  # made so above
        return Parts(self.make_score(), self.make_budget(), self.make_fate(), self.make_when(), sinks, recent, store)


@dataclass(frozen=True)
class KVPreset(Preset):
    """A preset that goes with any budget.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
    """

    budget: BudgetLike = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        super().__post_init__()

    def make_budget(self) -> Budget:
        return as_budget(self.budget)
