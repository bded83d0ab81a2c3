"""SpAtten: tokens and heads are pruned by what they have gathered so far, and never return."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share, is_count
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept_ceil, whole
from tokred.core.selection import highest, protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where

RECEIVED, ANSWERED = "spatten_received", "spatten_answered"
LEAST = 0.01  # the smallest share of tokens that a layer keeps


@register("spatten")
@dataclass(frozen=True)
class SpAtten(BlockMethod):
    """Cascade token and head pruning.

    A token's importance is the attention that it has received in all layers so far, summed over heads and queries; a
    head's is the sum of the absolute values that it has given. After a layer the most important stay: a share of the
    tokens that the model started with, and a number of heads. What has gone takes no part in later layers.

    Protected tokens count among those that stay and are never pruned (ours). The authors give no schedule for heads:
    here it falls with the tokens' (ours). A head that is left out adds nothing, but is computed all the same, so head
    pruning saves no time here.

    Args:
        keep: share of the tokens that stay after the last layer, in (0, 1].
        first: layers that prune nothing. None: ``max(3, ceil(0.15 L))``.
        heads: heads that stay at the end: a number, a share in (0, 1], or a list with a number for every block. None:
            all.

    Source: Wang et al., SpAtten, HPCA 2021, section III; the schedule of tokens is that of the code of LTP.
    """

    summary: ClassVar[str] = "keep what has been attended to most over all layers so far, tokens and heads"
    source: ClassVar[str] = "Wang et al., HPCA 2021 (arXiv 2012.09852)"
    example: ClassVar[Parameters] = {"keep": 0.5, "first": 0}
    nothing: ClassVar[Parameters | None] = {"keep": 1.0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"
    uneven: ClassVar[bool] = True
    by_mask: ClassVar[bool] = True

    keep: float = 0.5
    first: int | None = None
    heads: float | int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_share(self.keep, "keep (the share of tokens that stays)")
        if self.first is not None:
            check_count(self.first, "first")
        if isinstance(self.heads, list | tuple):
            object.__setattr__(self, "heads", tuple(self.heads))
        _check_heads(self.heads)

    @property
    def reads(self) -> frozenset[str]:
        """Tokens, attention received, what is carried from layer to layer; with heads also what each gives."""
        found = {"x", "attention", "carried"}
        return frozenset(found if self.heads is None else found | {"heads"})

    def check(self, depth: int) -> None:
        """A list of heads has one entry a block, which never grows."""
        if isinstance(self.heads, tuple) and len(self.heads) != depth:
            raise ValueError(f"heads has {len(self.heads)} entries, but the model has {depth} blocks")

    def share(self, layer: int, depth: int) -> float:
        """Share of the first tokens that stay after a layer."""
        return keep_share(self.keep, self.first, layer, depth)

    def heads_left(self, heads: int, layer: int, depth: int) -> int:
        """Heads of ``heads`` that stay after a layer."""
        if self.heads is None:
            return heads
        if isinstance(self.heads, tuple):
            return int(min(heads, *self.heads[: layer + 1]))
        number: float = self.heads  # type: ignore[assignment]
        final = number if isinstance(number, float) else min(1.0, number / heads)
        return max(1, kept_ceil(heads, keep_share(final, self.first, layer, depth)))

    def tokens(self, n: int, place: Place) -> int:
        """At most so many; exact until something has gone, since ``n`` does not say from how many it came."""
        before = 1.0 if place.layer == 0 else self.share(place.layer - 1, place.depth)
        first = math.floor(round(n / before, 9))
        return min(n, _count(first, self.share(place.layer, place.depth), place.protected))

    def acts(self, n: int, place: Place) -> bool:
        """True in every layer if any prunes, since all add to the importance."""
        return self.keep < 1 or self.heads not in (None, 1.0)

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """True where a share falls below one: every layer adds to the importance, but not every layer prunes."""
        if isinstance(self.heads, tuple):
            return True
        final = self.keep if self.heads in (None, 1.0) else LEAST
        return any(keep_share(final, self.first, i, depth) < 1 for i in (range(depth) if layers is None else layers))

    def reduce(self, site: Site) -> Reduction:
        """Add this layer's attention to what was received before; keep the highest."""
        b, n = site.shape
        with torch.no_grad():
            # Heads that go in this layer have still attended in it: the order of the two prunings is fixed.
            received = self._received(site)
            self._prune_heads(site)
            site.rows[RECEIVED] = received
            share = self.share(site.layer, site.depth)
            protected = site.prefix + site.suffix
            most = min(n, _count(site.length, share, protected))
            if share == 1 or (most == n and site.mask is None):
                return Reduction.identity((b,), n, site.device)
            free = received[:, site.prefix : n - site.suffix]
            lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
            if site.mask is None and site.totals is None:
                rows, _ = highest(free, most - protected)
                return Reduction.keep(torch.cat([lead, rows + site.prefix, tail], 1), n)
            totals = torch.full((b,), site.length, device=free.device) if site.totals is None else site.totals
            real = free.new_ones(free.shape, dtype=torch.bool)
            real = real if site.mask is None else site.mask[:, site.prefix : n - site.suffix]
            count = (totals.double() * share).round(decimals=9).ceil().long().unsqueeze(1) - protected
            count = torch.minimum(count.clamp(min=0 if protected else 1), real.sum(1, keepdim=True))
            rows, alive = highest(free.masked_fill(~real, -torch.inf), most - protected, count)
            assert alive is not None  # a count was given
            kept = torch.cat([lead, rows + site.prefix, tail], 1)
            mask = torch.cat([alive.new_ones(b, site.prefix), alive, alive.new_ones(b, site.suffix)], 1)
        return Reduction.keep(kept, n, mask=mask)

    def _received(self, site: Site) -> Tensor:
        """``(B, N)`` float32: attention from the surviving heads, this layer's and that of the layers before."""
        before, alive = site.rows.get(RECEIVED), site.alive
        weight = None if alive is None else alive.float().unsqueeze(-1).expand(-1, -1, site.shape[1])
        found = site.column_scores(weight).sum(1)
        return found if before is None else before + found

    def _prune_heads(self, site: Site) -> None:
        """Add what this layer's heads have given, and leave out those that gave least."""
        if self.heads is None:
            return
        answers = site.answers.detach().float().abs().sum(-1)  # [B, H, N]
        if site.mask is not None:
            answers = answers * site.mask.unsqueeze(1)
        given = answers.sum(-1)
        before, alive = site.notes.get(ANSWERED), site.alive
        given = given if before is None else before + given
        site.notes[ANSWERED] = given
        heads = whole(given.shape[1])
        left = self.heads_left(heads, site.layer, site.depth)
        if left < heads:
            score = given if alive is None else given.masked_fill(~alive, -torch.inf)
            site.alive = torch.zeros_like(given, dtype=torch.bool).scatter(1, ranked(score)[:, :left], 1)


def keep_share(final: float, first: int | None, layer: int, depth: int) -> float:
    """Share that stays after ``layer``: one in the first layers, then falling linearly to ``final`` in the last.

    Args:
        final: share after the last layer.
        first: layers that keep everything; None: ``max(3, ceil(0.15 * depth))``.
        layer, depth: which layer, of how many.

    Source: released code of LTP (kssteven418/LTP), with reference to SpAtten.
    """
    start = max(3, kept_ceil(depth, 0.15)) if first is None else first
    if layer < start or final == 1:
        return 1.0
    return max(LEAST, 1 + (final - 1) / (depth - start) * (layer - start + 1))


def _count(n: int, share: float, protected: int) -> int:
    """Tokens that stay of ``n``, protected ones among them; where none is protected, at least one."""
    return min(n, max(kept_ceil(n, share), protected, 1))


def _check_heads(heads: object) -> None:
    if heads is None:
        return
    if isinstance(heads, float):
        check_share(heads, "heads (as a share)")
        return
    listed = heads if isinstance(heads, tuple) else (heads,)
    if not listed or not all(is_count(h, 1) for h in listed):
        raise ValueError(f"heads must be None, a share (a float) in (0, 1], or numbers of at least 1, got {heads!r}")


# ---------------------------------------------------------------- the rest of the paper, which no stage of blocks uses


def local_values(weights: Tensor, share: float) -> Tensor:
    """Attention weights of which each query's largest stay and the others are zero; nothing is rescaled (ours).

    Local value pruning saves reads in hardware; in tensor code it is an approximation to measure, and no saving.

    Args:
        weights: ``(..., M, N)`` after softmax.
        share: of the keys, ``ceil(share * N)`` stay; ties to the lower key.

    Source: Wang et al., SpAtten, HPCA 2021, section III-C.
    """
    chosen = ranked(weights)[..., : kept_ceil(weights.shape[-1], share)]
    return torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))


def codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes of ``bits`` bits along the last dimension, and the scale that turns them back.

    Source: Wang et al., SpAtten, HPCA 2021, section III-D.
    """
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    return (x / scale).round().int(), scale


def leading_bits(code: Tensor, scale: Tensor, dropped: int) -> Tensor:
    """The values that codes stand for while their last ``dropped`` bits have not been fetched."""
    return ((code >> dropped) << dropped) * scale


def is_flat(weights: Tensor, threshold: float = 0.05) -> Tensor:
    """``(..., M)`` bool: queries without a weight of at least ``threshold``, whose last bits have to be fetched."""
    return weights.amax(-1) < threshold
