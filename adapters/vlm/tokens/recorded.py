"""Caches with a record of the tokens that never reached their layers, for decode and later turns.

The cache's class is exchanged for a subclass that reports the logical length, and keeps the record in step when samples
are reordered, repeated, or tokens taken back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.adapters.vlm.columns import Track
from tokred.adapters.vlm.taps import in_flight
from tokred.errors import TokenStateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Cache

    from tokred.adapters.kv.cache import Snapshot, TokCache

length_of = members.LENGTH.need
_TRACK = "_tokred_track"
_STATE = "tokred_track"


def track_of(cache: Cache | None) -> Track | None:
    """The record that hangs on a cache; None where nothing has left, or there is no cache."""
    return None if cache is None else cache.__dict__.get(_TRACK)


def set_track(cache: Cache, track: Track) -> None:
    """Hang ``track`` on a cache, and make the cache heed it."""
    if not hasattr(type(cache), "tokred_stock"):
        kind: Any = type(cache)
        cache.__class__ = _subclass(kind)
    cache.__dict__[_TRACK] = track


def _recorded(host: Any) -> Any:
    """An empty object of the subclass of a cache's class, whose own name nothing could find again."""
    kind: Any = _subclass(host)
    return kind.__new__(kind)


def physical_length(cache: Cache) -> int:
    """Columns that came to layer 0: the length that the cache's own class tells."""
    stock = getattr(type(cache), "tokred_stock", None)
    return int(length_of(cache)() if stock is None else length_of(stock)(cache))


@functools.cache
def _subclass(host: type[Cache]) -> type[Cache]:
    def get_seq_length(self: Cache, layer_idx: int = 0) -> int | Tensor:
        # transformers places new tokens, and cuts the caller's mask, by the length of layer 0: that has to be the
        # conversation's, or the first decoded token would stand where a dropped one stood.
        track = track_of(self)
        more = track.dropped if track is not None and layer_idx == 0 else 0
        return length_of(host)(self, layer_idx) + more  # type: ignore[no-any-return]

    def get_query_offset(self: Cache, layer_idx: int = 0) -> int | Tensor:
        layer = 0 if _seen_as_first(self, layer_idx) else layer_idx
        return length_of(host)(self, layer)  # type: ignore[no-any-return]

    def get_mask_sizes(self: Cache, query_length: int, layer_idx: int) -> tuple[int, int]:
        if in_flight.core is None and in_flight.language is None:
            raise TokenStateError(
                "this cache lacks tokens that left its prompt, but the model that uses it is not patched (any more): "
                "call tokred.apply(model, method), or give the model a cache of its own"
            )
        # Masks are made once for all layers of a kind, sized by the first of that kind, which may be one that holds
        # fewer columns; the full mask is needed, of which MaskMaker cuts each layer's part out.
        if _seen_as_first(self, layer_idx):
            return length_of(host)(self, 0) + query_length, 0
        return members.MASK_SIZES.need(host)(self, query_length, layer_idx)  # type: ignore[no-any-return]

    def __reduce_ex__(self: Cache, protocol: Any) -> Any:
        return _recorded, (host,), dict(self.__dict__)

    def reset(self: Cache) -> None:
        members.EMPTY.need(host)(self)
        self.__dict__.pop(_TRACK, None)

    def reorder_cache(self: Cache, beam_idx: Tensor) -> None:
        members.REORDER.need(host)(self, beam_idx)
        _pick(self, beam_idx)

    def batch_repeat_interleave(self: Cache, repeats: int) -> None:
        before = _batch(self)
        members.REPEAT.need(host)(self, repeats)
        if before:
            _pick(self, torch.arange(before).repeat_interleave(repeats))

    def batch_select_indices(self: Cache, indices: Tensor) -> None:
        members.SELECT.need(host)(self, indices)
        _pick(self, indices)

    def crop(self: Cache, tokens_to_remove: int) -> None:
        track, count = track_of(self), -int(tokens_to_remove)
        if track is None or count <= 0:
            members.CROP.need(host)(self, tokens_to_remove)
            return
        inside = count - (length_of(self)() - track.covered)
        # The copy is cut first, which may refuse: the cache is as it was then.
        trial = track.copy()
        if inside > 0:
            trial.cut(inside)
        members.CROP.need(host)(self, tokens_to_remove)
        self.__dict__[_TRACK] = trial

    body: dict[str, Callable[..., Any] | str | type | None] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "tokred_stock": host,
        "__reduce_ex__": __reduce_ex__,
        members.LENGTH.spelled(host): get_seq_length,
        members.QUERY_OFFSET.spelled(host): get_query_offset,
        members.MASK_SIZES.spelled(host): get_mask_sizes,
        members.EMPTY.spelled(host): reset,
        members.REORDER.spelled(host): reorder_cache,
        members.REPEAT.spelled(host): batch_repeat_interleave,
        members.SELECT.spelled(host): batch_select_indices,
        members.CROP.spelled(host): crop,
    }
    # Caches under a policy can be set back; what left before the layers is set back with them.
    if hasattr(host, "snapshot"):
        body.update(_snapshots(host))
    return type(host.__name__, (host,), body)


@contextlib.contextmanager
def own_sizes() -> Iterator[None]:
    """Inside, caches tell the sizes of each layer as they are; otherwise masks are made for the first layer's columns,
    of which those of later layers are cut out."""
    before = in_flight.own_sizes
    in_flight.own_sizes = True
    try:
        yield
    finally:
        in_flight.own_sizes = before


def _seen_as_first(cache: Cache, layer: int) -> bool:
    track = track_of(cache)
    if track is None or in_flight.own_sizes or track.inner(layer) is None:
        return False
    # A sliding layer that is full holds its window's rows alone, whatever came to layer 0.
    window = words.WINDOW.part(words.LAYERS.need(cache)[layer])
    return window is None or physical_length(cache) < window


def _snapshots(host: type[TokCache]) -> dict[str, Any]:
    def snapshot(self: Cache) -> Snapshot:
        found: Snapshot = host.snapshot(self)
        track = track_of(self)
        return found._replace(session={**found.session, _STATE: None if track is None else track.copy()})

    def restore(self: Cache, snapshot: Snapshot) -> None:
        session = dict(snapshot.session)
        track = session.pop(_STATE, None)
        host.restore(self, snapshot._replace(session=session))
        self.__dict__.pop(_TRACK, None)
        if track is not None:
            self.__dict__[_TRACK] = track.copy()

    return {"snapshot": snapshot, "restore": restore}


def _pick(cache: Cache, index: Tensor) -> None:
    track = track_of(cache)
    if track is not None:
        # A copy: snapshots share the record.
        track = track.copy()
        track.pick(torch.as_tensor(index))
        cache.__dict__[_TRACK] = track


def _batch(cache: Cache) -> int:
    track = track_of(cache)
    known = [] if track is None else [*(g.columns for g in track.groups), *(track.chosen or ())[:1]]
    return known[0].shape[0] if known else 0
