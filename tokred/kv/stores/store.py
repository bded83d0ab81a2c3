"""``Store``: in what form the rows of a cache are held. ``Shelf``: the rows of one layer, held so.

A store is a part of a policy like score and budget; no host is known to it. Whatever it does inside, to those who ask
its rows are a rectangle ``[B, Hk, K, D]`` of the model's type, and the newest ones stand last.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tokred.core.learned import Facts
from tokred.core.reduction import Reduction
from tokred.kv.described import POSITION, Made, plain_bytes
from tokred.kv.parts import Part
from tokred.kv.site import CacheSite

# What a store may be able to do, as it is said where a policy needs what it cannot.
ABILITIES = {
    "take": "free the rows that are evicted",
    "merge": "average rows into others",
    "rewrite": "hold other values than came",
    "ragged": "hold different numbers of rows in heads or samples",
    "tight": "hold uneven heads without empty rows",
    "crop": "take the newest rows back",
    "levels": "hold every row in the bits that it was given",
    "return": "take back rows of tokens that had left",
    "lead": "let its first rows stand elsewhere",
    "attend": "answer a query without unpacking",
}


class Query(NamedTuple):
    """One query of every sample, asked of all rows of a layer, none of which lies ahead of it.

    Attributes:
        q: ``[B, H, 1, D]``; of shelves that take several ``[B, H, M, D]``, of the newest ``M`` rows in order.
        scale, softcap: of the logits; None: ``D ** -0.5``, and no cap.
        padding: takes a number of newest slots, and gives ``[B, count]`` bool, False on padding; None: all are tokens.
        sinks: ``[H]`` logits that belong to no row, of shelves that take them; None: there are none.
    """

    q: Tensor
    scale: float | None
    softcap: float | None
    padding: Callable[[int], Tensor | None]
    sinks: Tensor | None = None


class Store(Part):
    """Base of all stores. A subclass is a frozen dataclass of its parameters, and makes shelves.

    Attributes:
        can: of :data:`ABILITIES`. A policy that needs more is refused when it is applied.
        reads: what :meth:`Shelf.settle` takes from the site, see :data:`tokred.core.site.READS`.
        replaces: kinds of caches that a caller may hand over, because this store does what they do: ``"plain"``,
            ``"offloaded"``, ``"quantised"``.
        searches: whether queries attend to some of the rows, chosen anew for each, so that :meth:`Shelf.attend` is not
            the attention over the rectangle.
    """

    kind = "store"
    can: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    replaces: ClassVar[frozenset[str]] = frozenset({"plain"})
    searches: ClassVar[bool] = False

    @abstractmethod
    def open(self) -> Shelf:
        """An empty shelf, for one layer."""

    def module(self, facts: Facts) -> nn.Module | None:
        """A new module with the weights that the store learns, for one model; None: it has none.

        Such a store reads ``"module"``, and finds it at ``site.learned`` when rows settle.
        """
        return None

    def fits(self, facts: Callable[[], Facts]) -> None:
        """Refuse a model that the store cannot serve.

        Args:
            facts: asks the model.

        Raises:
            ValueError: naming it, and what to do.
        """

    def shelves(self, depth: int) -> list[Shelf]:
        """Empty shelves for the ``depth`` layers of one cache, in order; a store may let them know of each other."""
        return [self.open() for _ in range(depth)]

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Refuse rows ``[B, Hk, n, D]`` that cannot be held, before the first are.

        Raises:
            ValueError: for example, the head size cannot be packed.
        """

    def objection(self, parts: Any) -> str:
        """Why the rows of a policy made of ``parts`` (:class:`tokred.kv.policy.Parts`) cannot be held so; empty: they
        can, as far as :attr:`can` goes."""
        return ""

    def hint(self, lacking: frozenset[str]) -> str:
        """The end of a refusal: what to do where a host does not supply ``lacking`` of :attr:`reads`."""
        return ""

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes that one more row of one head takes in the end, its position among them.

        Args:
            keys, values: ``[B, Hk, n, D]`` as they come from the model.
        """
        return plain_bytes(keys) + plain_bytes(values) + POSITION

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of a row that has just come and is not settled yet; arguments as :meth:`row_bytes`."""
        return self.row_bytes(keys, values)

    def whole_rows(self, keys: Tensor, values: Tensor) -> tuple[tuple[int, int], ...]:
        """Rows of a head that may take more than :meth:`row_bytes` in the end, and how many bytes more each takes.

        Returns:
            Pairs of both, which add up: where a head has fewer rows than a pair says, all of them may.
        """
        return ()

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        """Bytes of one sample and layer besides its rows, which are ``heads`` times ``width`` numbers wide.

        ``uneven``: heads hold different numbers of rows.
        """
        return 0

    def tight(self) -> Store:
        """A store like this one that holds no empty rows.

        Raises:
            ValueError: it always may.
        """
        raise ValueError(f"the store {self.name or self!r} cannot {ABILITIES['tight']}")


class Shelf(ABC):
    """The rows of one layer. Those of a forward are appended, attended to, and then settled.

    What holds tensors holds them as attributes, or in tuples and lists of attributes: then :attr:`tensors`,
    :meth:`snapshot` and :meth:`restore` need not be written again, as long as no tensor is changed in place that a
    snapshot refers to.

    Attributes:
        several: whether :meth:`attend` takes several queries of each sample.
        sunk: whether it takes logits that belong to no row.
        roomy: whether there may be room for more rows behind those that are held.
        frames: whether every forward is a frame of a stream, also one of a single token.
    """

    several: ClassVar[bool] = False
    sunk: ClassVar[bool] = False
    roomy = True
    frames = False

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    @abstractmethod
    def keys(self) -> Tensor | None:
        """``[B, Hk, K, D]`` of the model's type, made for the moment where they are held otherwise; None: no rows."""

    @property
    @abstractmethod
    def values(self) -> Tensor | None:
        """``[B, Hk, K, D]``, as :attr:`keys`."""

    @property
    @abstractmethod
    def newest(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the model's attention is handed: all, or those that :meth:`attend` has besides."""

    @property
    def complete(self) -> bool:
        """True if :attr:`newest` is all there is."""
        return True

    @property
    @abstractmethod
    def width(self) -> int:
        """Rows ``K`` of the rectangle: those of the longest head."""

    @property
    def mean_width(self) -> int:
        """Rows of a head on average, rounded up, where no empty rows are held; else :attr:`width`."""
        return self.width

    @property
    @abstractmethod
    def samples(self) -> int:
        """``B``, once there are rows."""

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        """Keys and values as a site takes them; a :class:`Made` where they have to be made."""
        keys, values = self.keys, self.values
        assert keys is not None  # something is there to look at
        assert values is not None
        return keys.detach(), values.detach()

    @property
    @abstractmethod
    def moved(self) -> bool:
        """True if rows have been taken or merged, so that rows and slots are no longer the same."""

    @abstractmethod
    def positions(self, seen: int) -> Tensor | None:
        """``[B, Hk, K]`` int32, the slot of each row, ``SENTINEL`` in empty ones; None while row ``i`` is slot ``i``.

        Args:
            seen: slots so far; rows that came after the last eviction hold the newest of them, in order.
        """

    # ------------------------------------------------------------------ what happens to them

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, Hk, n, D]`` behind the others."""

    def attend(self, query: Query) -> Tensor | None:
        """``[B, H, 1, D]``, the attention over all rows as they are held; None: over the rectangle, please."""
        return None

    def settle(self, site: CacheSite | None) -> None:  # noqa: B027 - rows that are held as they come need nothing
        """The attention of a forward is over, and the policy has acted: newest rows may take their lasting form.

        Args:
            site: what the policy has seen; None where it did not look and :attr:`Store.reads` is empty.
        """

    def ask(self) -> None:  # noqa: B027 - rows that are held as they come are a question's like any others
        """Rows that come from now on are a question's, and will be taken back by :meth:`restore`."""

    def take(self, step: Reduction, slots: Tensor) -> None:
        """Hold only the rows that ``step`` keeps, in its order; where it has a mask, the others are empty.

        Args:
            step: of mode ``"keep"``; its index is ``[B, Hk, K']``.
            slots: ``[B, Hk, K]`` int32, of the rows as they are.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot {ABILITIES['take']}")

    @property
    def swaps(self) -> bool:
        """True if :meth:`swap` can be called now."""
        return False

    @property
    def hole(self) -> Tensor | int | None:
        """The place of a row that has left, which the next single row takes: ``[B, Hk, 1]`` int64, or one number for
        all heads; None: there is none. Rows beside it are seen when it is closed."""
        return None

    def close(self) -> None:  # noqa: B027 - most shelves leave no hole
        """Let the last row take the place of the one that has left."""

    def swap(self, gone: Tensor, slots: Tensor, seen: int) -> None:
        """Let one row of each head go, so that no other has to move: there is a :attr:`hole` then.

        Args:
            gone: ``[B, Hk, 1]`` int64.
            slots: ``[B, Hk, K]`` int32, of the rows as they are.
            seen: slots so far.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot put a row in the place of another")

    @property
    def turned(self) -> int:
        """Slots when :meth:`turn` was last called, if rows stand as it left them but for what came into the hole; else
        -1."""
        return -1

    def turn(self, first: int, seen: int) -> bool:
        """Let the oldest row of every head go, but for those of the ``first`` slots of all.

        Rows stand in the order of their slots, none is empty, or they are :attr:`turned`.

        Returns:
            False if nothing was done, since some of the ``first`` slots have no row.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot put a row in the place of another")

    def place(self, slots: Tensor, seen: int) -> None:
        """Let the newest rows be of tokens that had left.

        Args:
            slots: ``[B, n]`` int32 of them, ``SENTINEL`` in empty ones.
            seen: slots before they came.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take back rows of tokens that had left")

    def lead(self, keys: Tensor) -> None:
        """Hold other ``keys`` ``[B, Hk, n, D]`` for the first ``n`` rows, which no head lacks."""
        raise NotImplementedError(f"{type(self).__name__} cannot {ABILITIES['lead']}")

    def lend(self) -> None:  # noqa: B027 - only those who change tensors in place have to know
        """Somebody may go on holding the tensors of keys and values, who must not see them change."""

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        """Hold only what ``step`` makes of the rows, weighted by ``weights`` ``[B, Hk, K]``; otherwise :meth:`take`."""
        raise NotImplementedError(f"{type(self).__name__} cannot {ABILITIES['merge']}")

    def rewrite(self, values: Tensor, slots: Tensor | None, keys: Tensor | None = None) -> None:
        """Hold other ``values`` ``[B, Hk, K, D]`` for the rows as they are, whose ``slots`` are :meth:`positions`, and
        other ``keys`` unless None."""
        raise NotImplementedError(f"{type(self).__name__} cannot {ABILITIES['rewrite']}")

    def crop(self, count: int) -> None:
        """Take the newest ``count`` rows back, all of which came after the last eviction."""
        raise NotImplementedError(f"{type(self).__name__} cannot {ABILITIES['crop']}")

    @abstractmethod
    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        """Take off the newest ``count`` rows of a forward that is not settled yet, to be appended again."""

    @abstractmethod
    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        """The rows of other samples: ``index`` ``[B']`` of the old ones.

        Args:
            index: int64.
            listed: gives the same as numbers, which waits for the device.
        """

    # ------------------------------------------------------------------ memory

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that memory is held for."""
        return _tensors(self.__dict__.values())

    @property
    def away(self) -> Iterator[Tensor]:
        """Those of :attr:`tensors` that are kept in host memory, away from the device where the layer runs."""
        yield from ()

    def snapshot(self) -> dict[str, Any]:
        """The whole state of the store, by reference."""
        return dict(self.__dict__)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that :meth:`snapshot` gave, which can be used again."""
        self.__dict__.clear()
        self.__dict__.update(state)


class WholeShelf(Shelf):
    """Base of shelves that hold all rows, in the order in which they came."""

    @property
    def moved(self) -> bool:
        return False

    def positions(self, seen: int) -> Tensor | None:
        return None


def missing(store: Store, needs: dict[str, str]) -> str:
    """Abilities that a store lacks of those needed, as a sentence; empty where it has all.

    Args:
        store: to be asked.
        needs: of :data:`ABILITIES`, each with who needs it.
    """
    lacking = [(who, ABILITIES[what]) for what, who in needs.items() if what not in store.can]
    return "; ".join(f"{who} needs a store that can {what}" for who, what in lacking)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Shelf):
            yield from value.tensors
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(vars(value).values())
