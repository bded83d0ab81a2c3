"""``Zones``: rows in several precisions, as a budget says: values row by row, keys channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_cache
from tokred.kernels.packed_rows import pack, unpack
from tokred.kv.described import Made
from tokred.kv.site import CacheSite
from tokred.kv.stores.codecs import check_bits
from tokred.kv.stores.grown import ROOM, Grown
from tokred.kv.stores.rectangle import SlottedShelf, without_empty
from tokred.kv.stores.sides import Window
from tokred.kv.stores.store import Store

# What a budget leaves: in the state of the rows the bits of each one's value, and in the notes those of each channel.
BITS, CHANNELS = "bits", "channels"
LEVELS = (0, 2, 4, 8, 16)
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Zones(Store):
    """At the end of the prompt values are rounded to as many bits as the budget gave their row, keys to those of their
    channel. Later rows are in full precision until ``block`` newer ones stand behind them; then their values get
    ``later`` bits, and keys those of their channels.

    Steps restore the rows of the layer that attends, so memory is saved, and not time.

    Args:
        later: bits of later values: 2, 4, 8 or 16.
        block: later rows that are rounded at a time, and of the newest that are not.

    Source: Zhang et al., RDKV (arXiv 2605.08317).
    """

    name: ClassVar[str] = "zones"
    can: ClassVar[frozenset[str]] = frozenset({"take", "ragged", "crop", "levels"})

    later: int = 4
    block: int = 128

    def __post_init__(self) -> None:
        check_bits(self.later, "later", LEVELS[1:])
        check_count(self.block, "block", 1)

    def open(self) -> ZonesShelf:
        return ZonesShelf(self)

    def objection(self, parts: Any) -> str:
        when = parts.when
        if not parts.budget.levels:
            return f"its rows have the bits that a budget says, such as 'water', and {parts.budget.name!r} says none"
        if when.every or when.turns or when.chunk or not when.prefill:
            return "bits are said once, at the end of the prompt, and rows are to go at other times too"
        return ""


class Piece(NamedTuple):
    """Keys or values of some rows of one sample, ``[Hk, n, D]``, in several precisions.

    Attributes:
        levels: uint8, which of :data:`LEVELS` each row, or each channel, has: two a byte.
        codes: uint8, of the numbers of 2, 4 and 8 bits in turn, as they follow each other.
        whole: those that are not rounded.
        scale, zero: float16, of each row or channel that is rounded.
    """

    levels: Tensor
    codes: tuple[Tensor, ...]
    whole: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, x: Tensor, bits: Tensor, real: Tensor, dim: int) -> Piece:
        """Of rows ``x``; ``bits`` ``[Hk, n, 1]`` or ``[Hk, 1, D]`` int64, ``real`` ``[Hk, n, 1]``, scales along it."""
        level = sum((bits == b) * i for i, b in enumerate(LEVELS))
        assert isinstance(level, Tensor)  # five parts
        rows = x.float()
        low = rows.masked_fill(~real, torch.inf).amin(dim, keepdim=True).clamp(-_LARGEST, _LARGEST)
        high = rows.masked_fill(~real, -torch.inf).amax(dim, keepdim=True)
        zero = low.half()
        steps = 2.0 ** bits.clamp(2, 8) - 1
        scale = ((high - zero.float()) / steps).clamp(0, _LARGEST).half()
        step = scale.float()
        made = ((rows - zero.float()) / torch.where(step > 0, step, 1.0)).round().clamp_(min=0).minimum(steps)
        made = torch.where(step > 0, made, 0.0).to(torch.uint8)
        masks = _masks(bits, real, x.shape)
        codes = tuple(pack(made[mask], b, 0) for b, mask in zip(LEVELS[1:-1], masks, strict=False))
        some = (bits > 0) & (bits < LEVELS[-1])
        packed = pack(level.flatten().to(torch.uint8), 4, 0)
        return cls(packed, codes, x[masks[-1]], scale[some], zero[some])

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """``[Hk, n, 1]`` or ``[Hk, 1, D]`` int64, as ``shape`` says."""
        count = torch.Size(shape).numel()
        named = torch.tensor(LEVELS, device=self.levels.device)
        return named[unpack(self.levels, 4, 0, count).long()].view(shape)

    def restored(self, bits: Tensor, real: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``[Hk, n, D]``; zeros where there is no bit."""
        some = (bits > 0) & (bits < LEVELS[-1])
        scale, zero = (torch.zeros(bits.shape, device=bits.device) for _ in range(2))
        scale[some], zero[some] = self.scale.float(), self.zero.float()
        masks, out = _masks(bits, real, shape), torch.zeros(shape, device=bits.device)
        for b, mask, codes in zip(LEVELS[1:-1], masks, self.codes, strict=False):
            out[mask] = unpack(codes, b, 0, int(mask.sum())).float()
        out = torch.where(some & real, out * scale + zero, 0.0).to(dtype)
        out[masks[-1]] = self.whole.to(dtype)
        return out


def _masks(bits: Tensor, real: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """For each level but none ``[Hk, n, D]`` bool: the numbers that have it."""
    return [((bits == b) & real).expand(shape) for b in LEVELS[1:]]


class Chunk(NamedTuple):
    """Rows of one sample.

    Attributes:
        keys, values: of them.
        shape: ``Hk``, ``n``, ``D``, and ``D`` of values.
    """

    keys: Piece
    values: Piece
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, rows: Tensor, channels: Tensor) -> Chunk:
        """Of rows ``[Hk, n, D]``: bits ``rows`` ``[Hk, n]`` of values (0: empty), ``channels`` ``[Hk, D]`` of keys."""
        rows = rows.long().unsqueeze(-1)
        real = rows > 0
        keys = Piece.of(k, channels.long().unsqueeze(1), real, 1)
        return cls(keys, Piece.of(v, rows, real, 2), (*k.shape, v.shape[-1]))

    def restored(self, which: int, dtype: torch.dtype) -> Tensor:
        """``[Hk, n, D]``: keys or values."""
        heads, n, k_width, v_width = self.shape
        rows = self.values.bits((heads, n, 1))
        if which:
            return self.values.restored(rows, rows > 0, (heads, n, v_width), dtype)
        channels = self.keys.bits((heads, 1, k_width))
        return self.keys.restored(channels, rows > 0, (heads, n, k_width), dtype)


def _restored(chunks: tuple[tuple[Chunk, ...], ...], tail: Tensor, which: int, dtype: torch.dtype) -> Tensor:
    """``[B, Hk, K, D]``: keys or values of chunks of all samples, and those of the ``tail`` behind them."""
    parts = [torch.stack([one.restored(which, dtype) for one in chunk]) for chunk in chunks]
    return torch.cat([*parts, tail], 2) if parts else tail


class ZonesShelf(SlottedShelf):
    """Chunks in codes, and rows as they came behind them.

    Args:
        store: what it belongs to.
    """

    def __init__(self, store: Zones) -> None:
        super().__init__()
        self.store = store
        self._type = torch.float32
        self._chunks: tuple[tuple[Chunk, ...], ...] = ()  # in order, each of all samples
        self._tail: tuple[Grown, ...] = ()  # of keys and of values
        self._channels: Tensor | None = None  # [B, Hk, D] bits of keys, once there are codes
        self._new = 0

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._made(0) if self._tail else None

    @property
    def values(self) -> Tensor | None:
        return self._made(1) if self._tail else None

    def _made(self, which: int) -> Tensor:
        return _restored(self._chunks, self._tail[which].rows, which, self._type)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        keys, values = (side.rows for side in self._tail)
        return (keys, values) if self.complete else (keys[:, :, -self._new :], values[:, :, -self._new :])

    @property
    def complete(self) -> bool:
        return not self._chunks

    @property
    def width(self) -> int:
        return self._tail[0].count + sum(chunk[0].shape[1] for chunk in self._chunks) if self._tail else 0

    @property
    def mean_width(self) -> int:
        if self._slots is None:
            return self.width
        heads, known = self._slots.shape[0] * self._slots.shape[1], self._slots.shape[2]
        return self.width - known - (-int((self._slots != SENTINEL).sum()) // heads)

    @property
    def samples(self) -> int:
        return self._tail[0].buffer.shape[0]

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        return super().show() if self.complete else (self._shown(0), self._shown(1))

    def _shown(self, which: int) -> Made:
        tail = self._tail[which].rows
        return Made.of(tail, self.width, partial(_restored, self._chunks, tail, which, self._type), self._type)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._type, self._new = keys.dtype, keys.shape[2]
        both = (keys, values)
        if self._tail:
            self._tail = tuple(old.append(x, ROOM) for old, x in zip(self._tail, both, strict=True))
        else:
            self._tail = tuple(Grown.of(x.contiguous()) for x in both)

    def settle(self, site: CacheSite | None) -> None:
        said = None if site is None else site.rows.get(BITS)
        if said is not None:
            assert site is not None
            channels = site.notes[CHANNELS]
            # Prompts that are shorter than the budget are not rounded, and neither is what follows them.
            if bool((channels != LEVELS[-1]).any()):
                self._channels = channels
                self._encode(said.shape[2], said)
            return
        count = Window(self.store.block, self.store.block).due(self._tail[0].count) if self._tail else 0
        if self._channels is not None and count:
            self._encode(count, None)

    def _encode(self, count: int, bits: Tensor | None) -> None:
        """Round the first ``count`` rows of those in full precision; ``bits`` ``[B, Hk, n]`` of values, or None."""
        assert self._channels is not None  # they were said
        k, v = (side.rows[:, :, :count] for side in self._tail)
        bits = torch.full(k.shape[:3], self.store.later, device=k.device) if bits is None else bits
        made = tuple(Chunk.of(*one) for one in zip(k, v, bits, self._channels, strict=True))
        self._chunks = (*self._chunks, made)
        self._tail = tuple(Grown.of(side.rows[:, :, count:].clone()) for side in self._tail)

    def take(self, step: Reduction, slots: Tensor) -> None:
        *rows, kept = gather_cache(self._made(0), self._made(1), slots, step.representative)
        self._slots = without_empty(kept, step.mask).contiguous()
        self._tail = tuple(map(Grown.of, rows))
        self._chunks = ()

    def crop(self, count: int) -> None:
        left = self.width - count
        while self._tail[0].count < count:  # rows of a chunk come back as they were rounded
            last = self._chunks[-1:]
            self._tail = tuple(Grown.of(_restored(last, x.rows, i, self._type)) for i, x in enumerate(self._tail))
            self._chunks = self._chunks[:-1]
        self._tail = tuple(side.first(side.count - count) for side in self._tail)
        self._slots = None if self._slots is None else self._slots[:, :, :left]

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        keys, values = (side.rows[:, :, side.count - count :] for side in self._tail)
        self.crop(count)
        self._new -= count
        return keys, values

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        if self._chunks:
            self._chunks = tuple(tuple(chunk[i] for i in listed()) for chunk in self._chunks)
        self._tail = tuple(side.select(index) for side in self._tail)
        self._channels = None if self._channels is None else self._channels.index_select(0, index)
