"""NSNQuant: windows of rows are normalised, shifted, normalised again and rotated, and then look like noise, for which
one codebook fits all models."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_flags
from tokred.kernels.coded_rows import BOOK, CodedRows, coded_scores, coded_sums, looked_up
from tokred.kernels.packed_rows import bytes_of, pack, unpack
from tokred.kv.site import CacheSite
from tokred.kv.stores.codebooks import SUB, codebook
from tokred.kv.stores.codecs import AsTheyCome, Codec, Parts, affine, check_bits, group_for, why_no_gradient
from tokred.kv.stores.coded import Coded, CodedShelf, Form
from tokred.kv.stores.rotated import hadamard
from tokred.kv.stores.sides import Window
from tokred.kv.turning import turned

BITS = (1, 2, 16)
# Sub-vectors that are compared with a codebook at a time.
_AT_ONCE = 1 << 15
_LEAST = 1e-6


@dataclass(frozen=True)
class NSNQuant(Coded):
    """Rows are rounded ``window`` at a time, to the nearest entries of a codebook that was made of normal noise.

    A window's rows are brought to length one, their mean is taken off, and they are brought to length one again;
    lengths and mean are kept in few bits. What is left is rotated by Hadamard's matrix and looked up by eights. Keys
    are turned back to the window's first position before their mean is taken, so that channels which turn fast have
    one. Rows that are no whole window yet are in full precision. Steps restore a few rows at a time; queries are
    rotated and turned to meet what is held.

    Args:
        bits: of the codes, a number: 1, 2, or 16, which rounds nothing.
        window: rows that share a mean.
        side_bits: of lengths and mean: 4, or 16.
        o_group: channels of the mean that share a scale; where it does not divide a head, its largest divisor below.
        pre_rope: whether keys are turned back. Models whose rotation is not known need False.

    Source: Son et al., NSNQuant, NeurIPS 2025 (arXiv 2505.18231).
    """

    name: ClassVar[str] = "nsnquant"
    bits: int = 2
    window: int = 64
    side_bits: int = 4
    o_group: int = 32
    pre_rope: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits", BITS)
        check_bits(self.side_bits, "side_bits", (4, 16))
        check_count(self.window, "window", 2)
        check_count(self.o_group, "o_group", 2)
        check_flags(pre_rope=self.pre_rope)

    @property
    def turns(self) -> bool:
        """True if keys are turned back."""
        return self.pre_rope and self.bits != 16

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """The rotary embedding, where keys are turned back."""
        return frozenset({"k", "rope"} if self.turns else {"k"})

    def hint(self, lacking: frozenset[str]) -> str:
        return ": give pre_rope=False, and keys are not turned back" if self.turns and "rope" in lacking else ""

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        return self._form(keys.shape[-1], "key heads"), self._form(values.shape[-1], "value heads")

    def _form(self, width: int, what: str) -> Form:
        window = Window(0, self.window)
        if self.bits == 16:
            return Form(AsTheyCome(), window)
        if width % SUB:
            raise ValueError(f"{what} of {width} numbers cannot be looked up by eights: nsnquant needs a multiple of 8")
        group = group_for(width, self.o_group, what)
        return Form(LookedUp(self.bits, width, self.window, self.side_bits, group), window)

    def open(self) -> CodedShelf:
        return NSNShelf(self)


class NSNShelf(CodedShelf):
    """A log whose keys are turned back before they are encoded, by angles that the first site tells.

    Args:
        store: what it belongs to.
    """

    store: NSNQuant

    def settle(self, site: CacheSite | None) -> None:
        keys = self._sides[0]
        if self.store.turns and keys.due and isinstance(keys.codec, LookedUp) and keys.codec.angles is None:
            assert site is not None  # it reads the site, so that there is one
            self._sides = (
                keys._replace(codec=dataclasses.replace(keys.codec, angles=site.rope.turns()[0])),
                *self._sides[1:],
            )
        super().settle(site)


class Sized(NamedTuple):
    """Windows of rows ``[..., W, D]`` as lengths, a mean, and what is left; float32.

    Attributes:
        first: ``[..., W, 1]`` lengths, over the root of ``D``.
        mean: ``[..., 1, D]`` of the rows after they were divided by those.
        second: ``[..., W, 1]`` lengths, over the root of ``D``, of what is left without the mean.
        left: ``[..., W, D]``, of length root ``D`` each.
        sides: of ``first`` and of ``mean``, as they are stored.
    """

    first: Tensor
    mean: Tensor
    second: Tensor
    left: Tensor
    sides: tuple[Parts, Parts]


@dataclass(frozen=True)
class Side16:
    """Side information as float16."""

    def encode(self, x: Tensor) -> Parts:
        """``[..., n]`` float32 as it is stored."""
        return (x.clamp(max=torch.finfo(torch.float16).max).half(),)

    def decode(self, parts: Parts) -> Tensor:
        """``[..., n]`` float32."""
        return parts[0].float()

    def bits(self, count: int) -> int:
        """Bits of ``count`` numbers."""
        return 16 * count


@dataclass(frozen=True)
class Side4:
    """Side information in four bits, ``group`` numbers with a scale and a least one."""

    group: int

    def encode(self, x: Tensor) -> Parts:
        """``[..., n]`` float32 as it is stored."""
        scale, zero, codes = affine(x.unflatten(-1, (-1, self.group)), 4, -1)  # type: ignore[no-untyped-call]
        return pack(codes, 4, -1).flatten(-2), scale.squeeze(-1), zero.squeeze(-1)

    def decode(self, parts: Parts) -> Tensor:
        """``[..., n]`` float32."""
        codes, scale, zero = parts
        codes = unpack(codes.unflatten(-1, (scale.shape[-1], -1)), 4, -1, self.group)  # type: ignore[no-untyped-call]
        return (codes * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).flatten(-2)

    def bits(self, count: int) -> int:
        """Bits of ``count`` numbers."""
        return count // self.group * (8 * bytes_of(self.group, 4) + 32)


@dataclass(frozen=True, eq=False)
class LookedUp(Codec):
    """Windows of rows in a codebook.

    Args:
        bits: 1: the nearest of 256 entries; 2: signs, and the nearest of 256 entries to the sizes.
        width: ``D``.
        window: rows ``W`` of a unit.
        side_bits, group: of lengths and means, see :class:`NSNQuant`.
        angles: ``[D / 2]`` float32, by which a position turns keys; None: rows are not turned back.
        table: ``[n, 8]`` float32 other entries than tokred's.
    """

    bits: int
    width: int
    window: int
    side_bits: int = 4
    group: int = 32
    angles: Tensor | None = None
    table: Tensor | None = None

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.window

    @property
    def _sides(self) -> tuple[Side4 | Side16, Side4 | Side16]:
        return (Side16(), Side16()) if self.side_bits == 16 else (Side4(self.window), Side4(self.group))

    def sized(self, rows: Tensor, real: Tensor | None) -> Sized:
        """Windows ``[..., W, D]`` float32, normalised, shifted and normalised; ``real`` ``[..., W]`` as for a code."""
        root = self.width**0.5
        length = (torch.linalg.vector_norm(rows, dim=-1) / root).clamp(min=_LEAST)
        if real is not None:  # padding must widen nobody's range
            first = real.byte().argmax(-1, keepdim=True)
            length = torch.where(real, length, length.gather(-1, first))
        lengths, means = self._sides
        stored = lengths.encode(length)
        length = lengths.decode(stored).clamp(min=_LEAST).unsqueeze(-1)
        rows = rows / length
        if real is None:
            mean = rows.mean(-2)
        else:
            mean = torch.where(real[..., None], rows, 0.0).sum(-2) / real.sum(-1, keepdim=True).clamp(min=1)
        shift = means.encode(mean)
        mean = means.decode(shift).unsqueeze(-2)
        rows = rows - mean
        second = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) / root).clamp(min=_LEAST)
        return Sized(length, mean, second, rows / second, (stored, shift))

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        windows = rows.float().unflatten(2, (-1, self.window))  # type: ignore[no-untyped-call]
        real = None if real is None else real.unflatten(2, (-1, self.window))  # type: ignore[no-untyped-call]
        one = self.sized(self._turned(windows, back=True), real)
        z = spread(self._turned(one.left))
        codes = self._codes(z)
        found = self._looked_up(codes)
        along, size = (z * found).sum(-1, keepdim=True), z.square().sum(-1, keepdim=True)
        # A row that points away from its entry is not made longer.
        second = one.second * torch.where(along > 0, size / along.where(along > 0, 1.0), 1.0)
        return *codes, second.squeeze(-1).clamp(max=torch.finfo(torch.float16).max).half(), *one.sides[0], *one.sides[1]

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        codes, second, length, mean = self._read(parts)
        mean = self._turned(mean.unsqueeze(-2).expand(*mean.shape[:-1], self.window, self.width))
        rows = spread(self._looked_up(codes) * second.unsqueeze(-1)) + mean
        return (rows * length.unsqueeze(-1)).flatten(2, 3).to(dtype)

    def _read(self, parts: Parts) -> tuple[Parts, Tensor, Tensor, Tensor]:
        """Codes; lengths before and after the means ``[B, Hk, M, W]``, the later first; means ``[B, Hk, M, D]``."""
        codes, second, rest = parts[: self.bits], parts[self.bits], parts[self.bits + 1 :]
        lengths, means = self._sides
        half = len(rest) // 2
        return codes, second.float(), lengths.decode(rest[:half]).clamp(min=_LEAST), means.decode(rest[half:])

    def _held(self, parts: Parts) -> tuple[CodedRows, Tensor, Tensor]:
        """Rotated rows without their windows' means, as kernels take them; lengths ``[B, Hk, M, W]``; means
        ``[B, Hk, M, D]``."""
        codes, second, length, mean = self._read(parts)
        entries, *signs = (x.flatten(2, 3) for x in reversed(codes))
        marks = signs[0] if signs else entries[..., :0]
        factor = (second * length).flatten(2)
        return CodedRows(entries, marks, self._table(entries.device), factor, BOOK, self.width), length, mean

    def why_slow(self, query: Tensor) -> str | None:
        return why_no_gradient(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        rows, length, mean = self._held(parts)
        # What a mean is turned by meets the query: once for each place in a window, and not for every window.
        met = self._turned(query.unsqueeze(3).expand(*query.shape[:3], self.window, self.width), back=True)
        shared = torch.einsum("bhgwd,bhmd->bhgmw", met, mean) * length.unsqueeze(2)
        return coded_scores(spread(query), rows) + shared.flatten(3)

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        rows, length, mean = self._held(parts)
        by_window = weights.unflatten(-1, (-1, self.window)) * length.unsqueeze(2)  # type: ignore[no-untyped-call]
        shared = self._turned(torch.einsum("bhgmw,bhmd->bhgwd", by_window, mean)).sum(3)
        return spread(coded_sums(weights, rows)) + shared

    def row_bits(self, rows: Tensor) -> int:
        lengths, means = self._sides
        shared = lengths.bits(self.window) + means.bits(self.width)
        return self.bits * self.width + 16 - (-shared // self.window)

    def _codes(self, z: Tensor) -> Parts:
        """Bytes ``[..., D / 8]`` of rotated rows ``[..., D]``: entries, with two bits after the signs."""
        subs = z.unflatten(-1, (-1, SUB))  # type: ignore[no-untyped-call]
        table = self._table(z.device)
        flat = (subs.abs() if self.bits == 2 else subs).reshape(-1, SUB)
        half = -table.square().sum(1) / 2
        near = torch.cat([torch.addmm(half, part, table.T).argmax(1) for part in flat.split(_AT_ONCE)])
        entries = near.view(subs.shape[:-1]).to(torch.uint8)
        return (entries,) if self.bits == 1 else (pack((subs < 0).to(torch.uint8), 1, -1).squeeze(-1), entries)

    def _looked_up(self, codes: Parts) -> Tensor:
        """``[..., D]`` float32."""
        return looked_up(self._table(codes[0].device), codes[-1], codes[0] if self.bits == 2 else None)

    def _table(self, device: torch.device) -> Tensor:
        return codebook(self.bits, str(device)) if self.table is None else self.table

    def _turned(self, windows: Tensor, *, back: bool = False) -> Tensor:
        """Windows ``[B, Hk, M, W, D]``: rows turned by as many positions as each stands behind the first, or back."""
        if self.angles is None:
            return windows
        place = torch.arange(self.window, device=windows.device)[None]
        return turned(windows, place, self.angles.to(windows.device), back=back)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def hartley(order: int, device: str = "cpu") -> Tensor:
    """``[n, n]`` float32: Hartley's matrix over the root of its order ``n``; its own inverse."""
    step = torch.arange(order, device=device)
    angle = (step[:, None] * step % order) * (2 * torch.pi / order)
    return (angle.cos() + angle.sin()) * order**-0.5  # type: ignore[no-any-return]


def spread(x: Tensor) -> Tensor:
    """``[..., D]`` float32, rotated so that no channel is large alone; its own inverse.

    By Hadamard's matrix of the largest power of two in ``D``; where something is left of ``D``, also by Hartley's of
    that order.
    """
    width = x.shape[-1]
    two = width & -width
    odd = width // two
    if odd == 1:
        return x @ hadamard(width, str(x.device))
    parts: Tensor = hartley(odd, str(x.device)) @ (x.unflatten(-1, (odd, two)) @ hadamard(two, str(x.device)))  # type: ignore[no-untyped-call]
    return parts.flatten(-2)
