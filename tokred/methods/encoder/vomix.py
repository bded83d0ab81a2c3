"""VoMix: tokens vote for their most similar one, the most voted are mixed into the rest, and only the rest asks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_flags
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.core.soft import SoftReduction
from tokred.encoder.method import BlockMethod, Where
from tokred.encoder.metric import head_mean
from tokred.kernels.dispatch import without_autocast
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match, unit

# Votes are summed as integers, whose sum does not depend on the order, and compared to a millionth: similarities of a
# pair, computed from either side, can differ in their last bit.
_VOTE = 2.0**32
_MILLION = 1e6
# Finite, so that a softmax over padding alone has no NaN to clean up.
_NEVER = -1e30


@register("vomix")
@dataclass(frozen=True)
class VoMix(BlockMethod):
    """Vote and mix.

    Our reading of public summaries of the paper, whose text and code were not at hand: that tokens vote by similarity,
    that the share ``r`` of them is mixed softly into the others, and that queries are reduced while keys and values
    stay complete is theirs; weights of the votes, the temperature, the normalisation of the mix and what becomes of
    protected tokens (they neither vote nor receive) are ours.

    Args:
        r: share of the unprotected tokens that each block mixes away, in [0, 0.5].
        tau: temperature of the mix: towards 0 each goes to its most similar token, a large one spreads it evenly.
        vote: ``"weighted"`` by similarity, or ``"count"``.
        mix_residual: mix the tokens as well as the queries; False leaves the kept tokens as they are.
        track_size: weigh every token in the mix by how many it stands for (a fraction).
        prop_attn: add the log of the sizes to attention's logits; needs ``track_size``.

    Source: Peng et al., Vote&Mix, 2024 (arXiv 2408.17062); our reading.
    """

    summary: ClassVar[str] = "mix the tokens that most others resemble into the rest; only the rest asks (our reading)"
    source: ClassVar[str] = "Peng et al., 2024 (arXiv 2408.17062)"
    example: ClassVar[Parameters] = {"r": 0.2}
    nothing: ClassVar[Parameters | None] = {"r": 0}
    where: ClassVar[Where] = "queries"

    r: float = 0.1
    tau: float = 0.1
    vote: Literal["weighted", "count"] = "weighted"
    mix_residual: bool = True
    track_size: bool = False
    prop_attn: bool = False

    def __post_init__(self) -> None:
        check_flags(mix_residual=self.mix_residual, track_size=self.track_size)
        if isinstance(self.r, bool) or not isinstance(self.r, int | float) or not 0 <= self.r <= 0.5:
            raise ValueError(f"r is the share mixed away and must lie in [0, 0.5], got {self.r!r}")
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not number or not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be a positive number, got {self.tau!r}")
        check_choice(self.vote, "vote", ("weighted", "count"))
        if self.prop_attn and not self.track_size:
            raise ValueError("prop_attn needs track_size=True: without it sizes are not part of the mix")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, the keys, and an attention whose queries can be reduced alone."""
        return frozenset({"x", "k", "queries"})

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def tokens(self, n: int, place: Place) -> int:
        """``n`` less ``floor(T * r)`` of the ``T`` unprotected ones."""
        return n - kept(place.free(n), self.r)

    def reduce(self, site: Site) -> Reduction:
        """Vote, select the most voted, hand them out to the others by similarity."""
        b, n = site.shape
        free = slice(site.prefix, n - site.suffix)
        count = kept(n - site.prefix - site.suffix, self.r)
        if count == 0:
            return Reduction.identity((b,), n, site.device)
        real = None if site.mask is None else site.mask[:, free]
        with torch.no_grad():
            # Detached besides: torch.jit.trace does not write down where gradients are off.
            k = unit(head_mean(site.k.detach())[:, free])
            selected, retained = self._split(ranked(self.votes(k, real)), count, real)
            share = self.shares(k, selected, retained, real)
            lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
            representative = torch.cat([lead, retained + site.prefix, tail], 1)
            share = torch.nn.functional.pad(share, (0, 0, site.prefix, site.suffix))
        return SoftReduction.make(
            representative,
            selected + site.prefix,
            share,
            n,
            by_size=self.track_size,
            mode="mean" if self.mix_residual else "keep",
            mask=None if site.mask is None else site.mask.gather(1, representative),
        )

    def votes(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        """Votes for each token by the tokens that chose it, ``(B, T)`` float64 in units of a millionth.

        Args:
            k: ``(B, T, D)`` unit vectors.
            real: ``(B, T)`` bool, False on padding, which gets -inf; None: all are real.
        """
        b, t, _ = k.shape
        score, choice = best_match(k, k, metric="dot", a_mask=real, b_mask=real, exclude_self=True)
        votes = torch.ones_like(score) if self.vote == "count" else score
        votes = votes.masked_fill(score == -torch.inf, 0).double()
        given = (votes * _VOTE).round().long().flatten()
        ballot = (choice + torch.arange(b, device=k.device).unsqueeze(1) * t).flatten()
        total = torch.zeros_like(given).scatter_add(0, ballot, given).view(b, t)
        found = (total.double() / _VOTE * _MILLION).round()
        return found if real is None else found.masked_fill(~real, -torch.inf)

    def _split(self, order: Tensor, count: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(B, count)`` selected positions, most voted first, and the other ones in ascending order.

        Each sample selects its share of its own real tokens; padding, which stands last in the order, fills up.
        """
        if real is None:
            return order[:, :count], order[:, count:].sort(dim=1).values
        rest = order.shape[1] - count
        own = (real.sum(1, keepdim=True).double() * self.r).round(decimals=9).floor().long()
        column = torch.arange(count, device=order.device)
        selected = order.gather(1, torch.where(column < own, column, column + rest))
        return selected, order.gather(1, own + torch.arange(rest, device=order.device)).sort(dim=1).values

    def shares(self, k: Tensor, selected: Tensor, retained: Tensor, real: Tensor | None = None) -> Tensor:
        """``(B, M, R)``: the part of each selected token that each retained one gets; columns sum to one.

        Args:
            k: ``(B, T, D)`` unit vectors.
            selected: ``(B, R)`` positions.
            retained: ``(B, M)`` positions.
            real: ``(B, T)`` bool, False on padding, which neither gives nor gets.
        """
        with without_autocast(k):
            s = gather_rows(k, retained) @ gather_rows(k, selected).mT
        if real is not None:
            s = s.masked_fill(~real.gather(1, retained).unsqueeze(2), _NEVER)
        share = ((s - s.amax(1, keepdim=True)) / self.tau).softmax(1)
        return share if real is None else share * real.gather(1, selected).unsqueeze(1)
