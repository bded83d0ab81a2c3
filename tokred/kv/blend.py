"""CacheBlend's arithmetic: keys that move to other positions, rows that deviate most, and what recomputed rows see.

Source: Yao et al., CacheBlend, EuroSys 2025 (arXiv 2405.16444).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_share

MEASURES = ("key", "value", "both", "foreseen")
_CHECKED = (1,)


@dataclass(frozen=True)
class Blend:
    """How much of joined chunks is computed again, and how it is chosen.

    Args:
        recompute: share of the stored tokens, of each check layer one; later ones are no larger.
        check_layers: layers before whose attention deviations are measured, ascending; layers before the first are
            computed for all tokens. Layer 0 is none: its keys depend on token and position alone.
        measure: deviation of the ``"key"``, the ``"value"`` or of ``"both"``; or what was ``"foreseen"`` when chunks
            were stored, by which tokens are chosen before the first layer (ours).
        fresh_at_check: in a check layer, recomputed tokens attend to what has been computed of all, and not to what
            the cache will hold.
    """

    recompute: float | Sequence[float] = 0.15
    check_layers: Sequence[int] = _CHECKED
    measure: str = "key"
    fresh_at_check: bool = False

    def __post_init__(self) -> None:
        check_choice(self.measure, "measure", MEASURES)
        layers, shares = tuple(self.check_layers), self.shares
        for layer in layers:
            check_count(layer, "check_layers", 1)
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"check_layers must be ascending, and at least one layer, got {layers}")
        for share in shares:
            check_share(share, "recompute", zero=True)
        if len(shares) != len(layers) or list(shares) != sorted(shares, reverse=True):
            raise ValueError(
                f"recompute must be one share, or one for each of the {len(layers)} check layers, none larger than the "
                f"one before; got {shares}"
            )
        if self.foreseen and (layers != _CHECKED or self.fresh_at_check):
            raise ValueError(
                "measure='foreseen' chooses before the first layer and checks none: leave check_layers and "
                "fresh_at_check as they are"
            )

    @property
    def foreseen(self) -> bool:
        """True if tokens are chosen by what their chunks know of them."""
        return self.measure == "foreseen"

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each check layer."""
        given = self.recompute
        return (given,) * len(tuple(self.check_layers)) if isinstance(given, int | float) else tuple(given)

    def check(self, depth: int) -> None:
        """Refuse layers that a model of ``depth`` layers does not have.

        Raises:
            ValueError: naming the layer.
        """
        last = tuple(self.check_layers)[-1]
        if last >= depth:
            raise ValueError(f"check_layers names layer {last}, and the model has {depth} layers")


def moved(keys: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """Keys that were rotated for some positions, rotated for others: ``R(new) R(old)^-1`` of each.

    Args:
        keys: ``[..., n, D]``, of which the first ``R`` channels are turned in halves.
        old, new: cosines and sines ``[n, R]`` of both positions, as the model makes them, factor included.

    Returns:
        Keys of the same type; computed in float32.
    """
    return turned(keys, between(old, new))


def between(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[n, R]`` float32 of the turn from one position to another; one and nought where they agree.

    Arguments as for :func:`moved`.
    """
    (c0, s0), (c1, s1) = ((c.float(), s.float()) for c, s in (old, new))
    square = c0.square() + s0.square()  # tables may have a factor, which keys have already
    return (c1 * c0 + s1 * s0) / square, (s1 * c0 - c1 * s0) / square


def turned(keys: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Keys ``[..., n, D]``, of their type, turned by what :func:`between` returns."""
    cos, sin = by
    turning = cos.shape[-1]
    x, half = keys[..., :turning].float(), turning // 2
    other = torch.cat([-x[..., half:], x[..., :half]], -1)
    found = (x * cos).addcmul_(other, sin).to(keys.dtype)
    return found if turning == keys.shape[-1] else torch.cat([found, keys[..., turning:]], -1)


def deviation(fresh: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
    """``[n]`` float32: squared difference of each token's rows ``[B, Hk, n, D]``, over samples, heads and channels.

    Args:
        fresh: keys, values or both, as they are now.
        stored: the same, as they were stored.
    """
    return sum((f.float() - s.float()).square().sum((0, 1, 3)) for f, s in zip(fresh, stored, strict=True))  # type: ignore[return-value]


def deep(depth: int) -> int:
    """The layer whose keys say, when a chunk is stored, what depends on the text before: two thirds of the way up.

    There deviations are those of what tokens mean; near the first layer, of tokens that few others stand before.
    """
    return min(depth - 1, max(1, 2 * depth // 3))


def smoothed(deviations: Tensor, width: int = 9) -> Tensor:
    """``[n]``: the mean of each token's neighbourhood, so that whole phrases are chosen, and no holes left in them.

    Args:
        deviations: ``[n]`` float32.
        width: tokens of a neighbourhood, an odd number; at the ends those that there are.
    """
    found = F.avg_pool1d(deviations[None, None], width, 1, width // 2, count_include_pad=False)
    return found[0, 0]


def chosen(deviations: Tensor, stored: Tensor, count: int) -> Tensor:
    """``[m]`` int64, ascending: the ``count`` stored tokens that deviate most, and all that are not stored.

    Args:
        deviations: ``[n]`` float32; of equal ones the lower position goes first.
        stored: ``[n]`` bool.
        count: of stored tokens.
    """
    some = deviations.masked_fill(~stored, -torch.inf).sort(descending=True, stable=True).indices[:count]
    take = ~stored
    take[some] = True
    return take.nonzero().view(-1)


def count_of(share: float, stored: int) -> int:
    """Stored tokens that are computed again, rounded down."""
    return int(round(share * stored, 9))


def visible(rows: Tensor, total: int, window: int | None = None) -> Tensor:
    """``[m, total]`` bool: the rows of the whole cache that recomputed ones see, by their true positions.

    Args:
        rows: ``[m]`` positions of recomputed tokens.
        total: rows of the cache.
        window: newest rows that a token sees, its own among them; None: all.
    """
    column = torch.arange(total, device=rows.device)
    seen = column <= rows[:, None]
    return seen if window is None else seen & (column > rows[:, None] - window)
