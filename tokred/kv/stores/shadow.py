"""``ShadowKV``: a prompt's keys as a product of small matrices, its values in host memory, chunks as queries ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_flags
from tokred.kv.described import Made
from tokred.kv.site import CacheSite
from tokred.kv.stores.pairs import Rows
from tokred.kv.stores.rectangle import RectangleShelf
from tokred.kv.stores.shadows import Buffer, Shadow
from tokred.kv.stores.store import Query, Store


@dataclass(frozen=True)
class ShadowKV(Store):
    """Nothing is forgotten; a query attends to the chunks of the prompt that it asks for, and to all later rows.

    At the end of a prompt its keys, as they were before their rotation, become a product of rank ``rank``, and its
    values go to host memory. Mean keys of chunks choose, for each key/value head, which chunks come back; chunks that a
    mean does not stand for, the newest ones, and all that is generated stay as they came. Prompts that are no longer
    than what is attended to stay whole. Several tokens at once, as in a second turn, attend to all rows.

    Args:
        budget: tokens that a query chooses, a multiple of the chunk.
        rank: of the keys of all heads side by side.
        chunk: tokens that come together.
        outliers: chunks of each head that stay as they came, those least similar to their mean.
        local: newest chunks that stay as they came, with what is left over behind the last.
        offload: whether values wait in host memory.
        refresh: rows behind the prompt with which, at the end of a later turn, all become a shadow anew; 0: never.

    Source: Sun et al., ShadowKV, ICML 2025 (arXiv 2410.21465), section 4.
    """

    name: ClassVar[str] = "shadowkv"
    can: ClassVar[frozenset[str]] = frozenset({"crop", "attend"})
    searches: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"rotation"})
    replaces: ClassVar[frozenset[str]] = frozenset({"plain", "offloaded"})

    budget: int = 2048
    rank: int = 160
    chunk: int = 8
    outliers: int = 48
    local: int = 4
    offload: bool = True
    refresh: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("chunk", 1), ("outliers", 0), ("local", 1), ("refresh", 0)):
            check_count(getattr(self, name), name, least)
        check_count(self.budget, "budget", self.chunk)
        if self.budget % self.chunk:
            raise ValueError(f"budget must be a multiple of chunk={self.chunk}, got {self.budget}")
        check_flags(offload=self.offload)

    def open(self) -> ShadowShelf:
        return ShadowShelf(self)

    def chunks(self, length: int) -> int:
        """Chunks of a prompt of ``length`` tokens that become a shadow, outliers counted; 0: it stays as it is."""
        m = max(0, length // self.chunk - self.local)
        return 0 if m <= self.budget // self.chunk + self.outliers else m


class ShadowShelf(RectangleShelf):
    """Rows as they come; after the prompt, shadows of its samples, and behind them the rows that came since.

    Args:
        store: what it belongs to.
    """

    def __init__(self, store: ShadowKV) -> None:
        super().__init__()
        self.store = store
        self._shadows: tuple[Shadow, ...] = ()  # one of all samples, or where their lengths differ one of each
        self._places: tuple[Tensor | None, ...] = ()  # of each, which slots its rows have; None: all, in order
        self._buffers: tuple[Buffer | None, ...] = ()
        self._slots_before = 0  # of the prompt, padding counted
        self._new = 0  # rows of this forward

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._making(0)() if self._shadows else super().keys

    @property
    def values(self) -> Tensor | None:
        return self._making(1)() if self._shadows else super().values

    @property
    def newest(self) -> Rows:
        keys, values = super().newest
        if self.complete:
            return keys, values
        first = keys.shape[2] - self._new
        return keys[:, :, first:], values[:, :, first:]

    @property
    def complete(self) -> bool:
        return not self._shadows

    @property
    def width(self) -> int:
        return self._slots_before + super().width

    @property
    def samples(self) -> int:
        return super().newest[0].shape[0]

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if not self._shadows:
            return super().show()
        keys, values = super().newest
        return Made.of(keys, self.width, self._making(0)), Made.of(values, self.width, self._making(1))

    def _making(self, which: int) -> Callable[[], Tensor]:
        """Gives the keys or the values of all rows, as they are now."""
        return partial(_restored, which, self._shadows, self._places, self._slots_before, super().newest[which])

    @property
    def away(self) -> Iterator[Tensor]:
        if self.store.offload:
            yield from (shadow.values for shadow in self._shadows)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(keys, values)
        self._new = keys.shape[2]

    def settle(self, site: CacheSite | None) -> None:
        if site is None or not site.read:
            return
        later = self.width - self._slots_before
        if self._shadows and self.store.refresh and later >= self.store.refresh:
            self._open()
        if not self._shadows and self.store.chunks(site.read):
            self._begin(site)

    def _open(self) -> None:
        """Hold all rows as a rectangle again."""
        self._keys, self._values = self.keys, self.values
        self._shadows, self._places, self._buffers, self._slots_before = (), (), (), 0

    def _begin(self, site: CacheSite) -> None:
        """Make shadows of the prompt, or of all that has been read."""
        keys, values = super().newest
        count, angle = site.read, site.rope.turns()[0]
        padding = None if site.padding is None else site.padding.until(count)
        both = keys[:, :, :count], values[:, :, :count]
        if padding is None:
            self._shadows, self._places = (Shadow.of(self.store, *both, angle),), (None,)
        elif any(map(self.store.chunks, padding.lengths)):
            # A sample's answer must not depend on its batch-mates: each has chunks of its own.
            places = [row.nonzero().view(-1) for row in padding.mask]
            some = [[x[i : i + 1].index_select(2, at) for x in both] for i, at in enumerate(places)]
            self._shadows = tuple(Shadow.of(self.store, k, v, angle) for k, v in some)
            self._places = tuple(places)
        else:
            return
        self._buffers, self._slots_before = (None,) * len(self._shadows), count
        # A view would keep the whole prompt alive.
        self._keys, self._values = keys[:, :, count:].clone(), values[:, :, count:].clone()
        self._new = self._keys.shape[2]

    def crop(self, count: int) -> None:
        if self._shadows and count > super().width:
            self._open()
        super().crop(count)
        self._new = 0

    def detach(self, count: int) -> Rows:
        self._new -= count
        return super().detach(count)

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        if not self._shadows:
            return
        if self._places == (None,):
            self._shadows = (self._shadows[0].select(index),)
        else:
            self._shadows, self._places = (
                tuple(self._shadows[i] for i in listed()),
                tuple(self._places[i] for i in listed()),
            )
        self._buffers = (None,) * len(self._shadows)

    def snapshot(self) -> dict[str, Any]:
        """The whole state but for buffers, which are changed in place, and can be made again."""
        return {**super().snapshot(), "_buffers": (None,) * len(self._shadows)}

    # ------------------------------------------------------------------ one query

    def attend(self, query: Query) -> Tensor | None:
        if not self._shadows:
            return None
        keys, values = super().newest
        b, h, _, d = query.q.shape
        scale = d**-0.5 if query.scale is None else query.scale
        kind = torch.promote_types(query.q.dtype, torch.float32)
        q = query.q.reshape(b, keys.shape[1], h // keys.shape[1], d).to(kind) * scale
        padding = query.padding(keys.shape[2])
        out, buffers = [], []
        for i, (shadow, last) in enumerate(zip(self._shadows, self._buffers, strict=True)):
            part = slice(None) if len(self._shadows) == 1 else slice(i, i + 1)
            logits, v, buffer = shadow.parts(q[part], query.softcap, last)
            logits.append(q[part] @ keys[part].to(kind).mT)
            hidden = None if padding is None else ~padding[part]
            out.append(_attention(logits, [*v, values[part]], hidden, query.softcap))
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        return torch.cat(out).reshape(b, h, 1, -1).to(query.q.dtype)


def _attention(parts: list[Tensor], values: list[Tensor], hidden: Tensor | None, cap: float | None) -> Tensor:
    """``[B, Hk, G, Dv]``: one softmax over several lots of rows; ``hidden`` ``[B, t]`` of the last lot."""
    logits = torch.cat(parts, -1)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if hidden is not None:
        n = logits.shape[-1] - hidden.shape[1]
        last = logits[..., n:].masked_fill(hidden[:, None, None], -torch.inf)
        logits = torch.cat([logits[..., :n], last], -1)
    # A query of padding may see nothing at all.
    weights = logits.softmax(-1) if hidden is None else logits.softmax(-1).nan_to_num(0.0)
    shares = weights.split([v.shape[2] for v in values], -1)  # type: ignore[no-untyped-call]
    return torch.stack([w @ v.to(w.dtype) for w, v in zip(shares, values, strict=True)]).sum(0)


def _restored(
    which: int, shadows: tuple[Shadow, ...], places: tuple[Tensor | None, ...], count: int, later: Tensor
) -> Tensor:
    """``[B, Hk, K, D]``: keys or values of the prompt, zeros where it has padding, and those that came later."""
    parts = []
    for shadow, at in zip(shadows, places, strict=True):
        x = shadow.restored(which)
        if at is not None:
            x = x.new_zeros(*x.shape[:2], count, x.shape[3]).index_copy_(2, at, x)
        parts.append(x)
    return torch.cat([torch.cat(parts), later], 2)
