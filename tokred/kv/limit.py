"""``Ledger``: the bytes of a cache against a hard limit, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from tokred.errors import TokredError
from tokred.kv.described import POSITION
from tokred.kv.parts import When, parse_bytes
from tokred.kv.policy import CachePolicy
from tokred.kv.site import CacheSite, Place

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_FAR = 1 << 40  # tokens, so that the length is no bound


class Ledger:
    """Bytes of one sample that each layer holds; what would pass the limit is refused before it comes.

    Args:
        limit: bytes of all layers of one sample.
        policy: of the cache.
        when: its times, as ``depth`` layers need them.
        depth: layers that the policy acts on.

    Attributes:
        peak: most bytes so far.
        queries: query heads of a layer; 0: as many as key/value heads.
        windows: rows that each layer which the policy does not act on keeps at most.
    """

    def __init__(self, limit: int, policy: CachePolicy, when: When, depth: int) -> None:
        self.limit = limit
        self.policy = policy
        self.when = when
        self.depth = depth
        self.peak = self.queries = 0
        self.windows: tuple[int, ...] = ()
        self._held: dict[int, int] = {}
        self._total = 0

    def claim(self, site: CacheSite) -> None:
        """Tell the site what budgets have to leave room for besides the rows they choose."""
        parts, heads = self.policy.parts, self.queries or site.heads
        window = parts.score.window
        # Queries are kept in the type of the keys, for as long as a later eviction may ask for them.
        kept = heads * site.key_bytes * window if window > 1 else 0
        kept += parts.score.note_bytes(heads, site.width)
        kept += parts.store.note_bytes(site.heads, site.width, uneven=parts.budget.headwise)
        rows = sum(self.windows) + len(self.windows) * self.when.chunk
        site.fixed_bytes = self.depth * kept + rows * site.heads * (site.fresh_bytes + site.state_bytes)
        if parts.budget.headwise:
            # What is kept for each row besides keys and values is as wide as the longest head, which may hold all rows.
            site.state_bytes += (site.heads - 1) * (POSITION + site.state_bytes)
        coming, row = self.when.coming(self.depth, deferred=parts.budget.deferred), site.place.row_bytes
        # Rows that have just come may take more than they will in the end.
        site.coming = -(-coming * (row - site.row_bytes + site.fresh_bytes) // row)

    def check(self, place: Place) -> None:
        """Refuse a limit that cannot hold a chunk and what is never evicted.

        Raises:
            ValueError: with what would do.
        """
        parts, chunk, row = self.policy.parts, self.when.chunk, place.heads * place.row_bytes
        first, newest = self.policy.guards(_FAR, parts.budget.mean(_FAR, place, self.depth))
        least = max(first + newest + parts.fate.room, 1)
        needed = place.fixed + row * place.coming + self.depth * place.held(least)
        if needed > self.limit:
            raise ValueError(
                f"a limit of {size_text(self.limit)} cannot hold a chunk of {chunk} tokens and the {least} tokens that "
                f"every layer keeps at least: that takes {size_text(needed)} in {self.depth} layers. Raise the limit, "
                f"or make the chunk smaller (a token takes {row} bytes a layer)"
            )

    def open(self, held: Mapping[int, int], besides: int) -> None:
        """A forward begins: ``held`` bytes by layer, and those of layers that the policy does not act on."""
        self._held = dict(held)
        self._total = sum(held.values()) + besides

    def write(self, layer: int, held: int) -> None:
        """A layer holds, or is about to hold, ``held`` bytes.

        Raises:
            TokredError: all layers together would hold more than the limit.
        """
        total = self._total - self._held.get(layer, 0) + held
        if total > self.limit:
            raise TokredError(
                f"the cache would hold {size_text(total)}, more than the limit of {size_text(self.limit)}: "
                "the policy keeps more than its budget"
            )
        self._held[layer], self._total = held, total
        self.peak = max(self.peak, total)


def ledger_of(policy: CachePolicy, when: When, depth: int) -> Ledger | None:
    """The ledger of a cache whose policy has a hard limit; else None."""
    amount = policy.parts.budget.amount if when.chunk else None
    return Ledger(parse_bytes(amount, "limit"), policy, when, depth) if isinstance(amount, str) else None


def size_text(count: int) -> str:
    """Bytes for reading: ``"1.5 MiB"``."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
