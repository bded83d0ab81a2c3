"""``Joined``: a cache whose rows are there before the forward; some are computed again, and take their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.adapters.contract import host_object, members, words

CacheLayerMixin: Any = host_object("base of cache layers")
DynamicCache: Any = host_object("cache of rows that grow")


class KnownError(Exception):
    """Keys and values of a layer are known, and no more is wanted of it now."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__("keys and values are known")
        self.rows = keys, values


@members.under_each_name
class JoinedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Rows of all tokens of one layer.

    Args:
        keys, values: ``[B, Hk, N, D]`` as they were stored; None: the forward brings all.

    Attributes:
        places: ``[m]`` int64 of the tokens that come; None: all.
        asking: whether an update only says what came, and goes no further.
        shown: keys and values that are attended to in place of those held; None: these.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.places: Tensor | None = None
        self.asking = False
        self.shown: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: rows are there, or come whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put rows in their places, and return all that are attended to.

        Raises:
            KnownError: that was all that was wanted.
        """
        if self.asking:
            raise KnownError(key_states, value_states)
        if self.places is None or self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            # The cache owns its rows: they are copies of the chunks'.
            self.keys.index_copy_(2, self.places, key_states)
            self.values.index_copy_(2, self.places, value_states)
        shown, self.shown = self.shown, None
        return (self.keys, self.values) if shown is None else shown

    def get_seq_length(self) -> int:
        """Nothing: all tokens come in this forward, at positions from 0 on."""
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a forward over joined rows takes nothing back")

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        assert self.keys is not None  # a forward has run, or they were given
        assert self.values is not None
        return self.keys, self.values


class Joined(DynamicCache):  # type: ignore[misc]
    """A cache of :class:`JoinedLayer`, for one forward of the decoder, which hooks of a policy leave alone.

    Args:
        layers: of all layers.
    """

    def __init__(self, layers: list[JoinedLayer]) -> None:
        super().__init__()
        words.LAYERS.set(self, layers)
        members.LAYER_CLASS.set(self, None)


def empty(depth: int) -> Joined:
    """A cache that takes all rows of one forward."""
    return Joined([JoinedLayer() for _ in range(depth)])


def joined(layers: list[tuple[Tensor, Tensor]]) -> Joined:
    """A cache of keys and values ``[B, Hk, N, D]`` of each layer, which it may change."""
    return Joined([JoinedLayer(*rows) for rows in layers])


def in_a_row(rows: list[tuple[Tensor, Tensor] | int]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hk, N, D]``, copied, of parts that stand one behind the other.

    Args:
        rows: keys and values ``[B, Hk, n, D]`` of each part in order, or a number of rows that are not known.
    """
    like = next(r for r in rows if not isinstance(r, int))
    keys, values = (
        torch.cat([like[w].new_zeros(*_shape(like[w], r)) if isinstance(r, int) else r[w] for r in rows], 2)
        for w in (0, 1)
    )
    return keys, values


def _shape(like: Tensor, count: int) -> tuple[int, ...]:
    return (*like.shape[:2], count, like.shape[3])
