"""Rotated formats: a rotation spreads large channels over all, so that the numbers of one row can share a scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.kernels.coded_rows import LEVELS as LEVELS_OF
from tokred.kernels.coded_rows import CodedRows, coded_scores, coded_sums, restore_coded
from tokred.kernels.packed_rows import bytes_of, pack, why_not_packed
from tokred.kv.stores.codecs import Affine, AsTheyCome, Codec, Parts, check_bits, group_for, why_no_gradient
from tokred.kv.stores.coded import Coded, Form
from tokred.kv.stores.sides import Window

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class Oscar(Coded):
    """Keys and values are rotated, clipped, and rounded within each token; queries are rotated to meet the codes.

    The oldest tokens, which receive much attention, and the newest are in full precision. The rotation is that of
    Hadamard, which needs no calibration; the paper's is one of each model, which follows the queries.

    Args:
        bits: of a number: 1 to 8, or 16, which rounds nothing.
        group: channels that share a scale; a head that is smaller has one.
        clip_k, clip_v: share of the numbers of a row that are left as they are; those beyond the next are brought down
            to its size. 0: no clipping.
        sinks, recent: first and newest tokens in full precision.
        block: tokens that are rounded at a time.

    Source: Zhou et al., OSCAR, arXiv 2605.17757, section 3, with Hadamard's rotation.
    """

    name: ClassVar[str] = "oscar"

    bits: int = 2
    group: int = 128
    clip_k: float = 0.96
    clip_v: float = 0.92
    sinks: int = 64
    recent: int = 256
    block: int = 64

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits", BITS)
        check_count(self.group, "group", 2)
        for name in ("clip_k", "clip_v"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        check_count(self.sinks, "sinks")
        check_count(self.recent, "recent")
        check_count(self.block, "block", 1)

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        return (
            self._form(keys.shape[-1], self.clip_k, "key heads"),
            self._form(values.shape[-1], self.clip_v, "value heads"),
        )

    def _form(self, width: int, clip: float, what: str) -> Form:
        codec: Codec = AsTheyCome()
        if self.bits != 16:
            check_width(width, what, self.name)
            codec = Rotated(Affine(self.bits, group_for(width, self.group, what)), clip)
        return Form(codec, Window(self.recent, self.block, self.sinks))


@dataclass(frozen=True)
class Turbo(Coded):
    """Keys as a length and a direction, whose rotated numbers are rounded to the levels that suit normal ones best;
    values between the least and the largest number of the token. Every token is rounded at once, and none stays.

    Args:
        bits: of keys and values: 2, 3 or 4, or 16, which rounds nothing.
        v_bits: of values, where they differ: 1 to 8, or 16; None: ``bits``.
        norm_correction: whether rounded directions are brought to length one.

    Source: Zandieh et al., TurboQuant, ICLR 2026 (arXiv 2504.19874), without its residual, as vLLM ships it.
    """

    name: ClassVar[str] = "turbo"

    bits: int = 3
    v_bits: int | None = None
    norm_correction: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits", (*LEVELS, 16))
        if self.v_bits is not None:
            check_bits(self.v_bits, "v_bits", BITS)

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        if self.bits != 16:
            check_width(keys.shape[-1], "key heads", self.name)
        v_bits = self.bits if self.v_bits is None else self.v_bits
        key: Codec = AsTheyCome() if self.bits == 16 else Directions(self.bits, keys.shape[-1], self.norm_correction)
        value: Codec = AsTheyCome() if v_bits == 16 else Spans(v_bits, values.shape[-1])
        return Form(key, Window(0, 1)), Form(value, Window(0, 1))


# Constants are not made in inference mode, whoever asks first: what is, no gradient can be kept through.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def hadamard(width: int, device: str = "cpu") -> Tensor:
    """``[D, D]`` float32: Sylvester's matrix over the root of ``D``, a power of two; its own inverse."""
    made = torch.ones(1, 1)
    while made.shape[0] < width:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made * width**-0.5).to(device)  # type: ignore[no-any-return]


def check_width(width: int, what: str, store: str) -> None:
    """Refuse heads that Hadamard's rotation does not fit.

    Raises:
        ValueError: the width is no power of two.
    """
    if width & (width - 1):
        raise ValueError(f"{what} of {width} numbers cannot be rotated: {store} needs a power of two; 'kivi' does not")


def turned(x: Tensor) -> Tensor:
    """``[..., D]`` float32, rotated, or rotated back."""
    return x.float() @ hadamard(x.shape[-1], str(x.device))


@dataclass(frozen=True)
class Rotated(Codec):
    """Rows that are rotated, and clipped, before another codec has them.

    Args:
        inner: it.
        clip: share of a row's numbers, by size, that stay as they are; 0: all.
    """

    inner: Affine
    clip: float = 0.0

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        rows = turned(rows)
        if self.clip:
            width = rows.shape[-1]
            most = rows.abs().sort(-1).values[..., min(int(self.clip * width), width - 1)].unsqueeze(-1)
            rows = torch.minimum(torch.maximum(rows, -most), most)
        return self.inner.encode(rows, real)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return turned(self.inner.decode(parts, torch.float32)).to(dtype)

    def row_bits(self, rows: Tensor) -> int:
        return self.inner.row_bits(rows)

    def why_slow(self, query: Tensor) -> str | None:
        return self.inner.why_slow(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return self.inner.scores(turned(query), parts)

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        return turned(self.inner.sums(weights, parts))


# Levels above 0 that round a normal number with the least square error, in units of its deviation.
LEVELS = {
    2: (0.452572, 1.509559),
    3: (0.244984, 0.755645, 1.34318, 2.15035),
    4: (0.128428, 0.388138, 0.65688, 0.942448, 1.256258, 1.617882, 2.068447, 2.730922),
}


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def levels_of(bits: int, width: int, device: str = "cpu") -> Tensor:
    """``[2 ** bits]`` float32, rising: levels of the numbers of rows of length one."""
    above = torch.tensor(LEVELS[bits])
    return (torch.cat([-above.flip(0), above]) * width**-0.5).to(device)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Directions(Codec):
    """The length of a row in float16, and for each number of its rotated direction one of ``2 ** bits`` levels.

    Args:
        bits: of :data:`LEVELS`.
        width: of a row.
        correct: whether the rounded direction is brought to length one.
    """

    bits: int
    width: int
    correct: bool = True

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        rows = rows.float()
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        levels = levels_of(self.bits, self.width, str(rows.device))
        # Half-way goes up.
        codes = torch.bucketize(turned(rows / (length + 1e-8)), (levels[1:] + levels[:-1]) / 2, right=True)
        return pack(codes.to(torch.uint8), self.bits, -1), length.clamp(max=torch.finfo(torch.float16).max).half()

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return turned(restore_coded(self.coded(parts))).to(dtype)

    def row_bits(self, rows: Tensor) -> int:
        return 8 * bytes_of(self.width, self.bits) + 16

    def coded(self, parts: Parts) -> CodedRows:
        """The parts, as kernels take them: rotated rows."""
        codes, length = parts
        table = levels_of(self.bits, self.width, str(codes.device))
        return CodedRows(
            codes, codes[..., :0], table, length.float().squeeze(-1), LEVELS_OF, self.width, self.bits, self.correct
        )

    def why_slow(self, query: Tensor) -> str | None:
        return why_no_gradient(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return coded_scores(turned(query), self.coded(parts))

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        return turned(coded_sums(weights, self.coded(parts)))


@dataclass(frozen=True)
class Spans(Affine):
    """Numbers of one token between its least and its largest; some tokens at a time where nothing is compiled."""

    def why_slow(self, query: Tensor) -> str | None:
        return why_no_gradient(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return super().scores(query, parts) if self._compiled(query) else Codec.scores(self, query, parts)

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        return super().sums(weights, parts) if self._compiled(weights) else Codec.sums(self, weights, parts)

    def _compiled(self, x: Tensor) -> bool:
        return why_not_packed(x[..., : self.group], self.bits, self.group) is None


def spectral_rotation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's rotation for rows that are met by queries of a covariance.

    Args:
        covariance: ``[D, D]``, of queries for keys; ``D`` a power of two.

    Returns:
        The rotation ``[D, D]`` and the eigenvalues ``[D]``, rising; both float64. Eigenvectors are turned so that
        their first number above half of their largest is positive.
    """
    width = covariance.shape[0]
    check_width(width, "a covariance", "a rotation")
    values, vectors = torch.linalg.eigh(covariance.double())
    large = vectors.abs() > vectors.abs().amax(0) / 2
    first = large.byte().argmax(0)
    vectors = vectors * vectors.gather(0, first[None]).sign()
    bits = width.bit_length() - 1
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(width)]
    order = values.argsort(descending=True, stable=True)
    places = torch.empty(width, dtype=torch.long)
    places[torch.tensor(reverse)] = order
    return vectors @ hadamard(width).double()[:, places], values
