"""SAINT: drop tokens that have many near-copies, as many as the similarity graph of each image says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_blocks, check_blocks_exist, check_choice, check_count, check_flags, check_number
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import bounds, pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.encoder.metric import head_mean
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match, similarity_count, similarity_sum, unit


class Redundancy(NamedTuple):
    """The redundancy of each source token.

    Attributes:
        score: ``(B, A)`` float32, -inf on padding.
        degree: ``(B, A)`` int64, destinations that are at least ``tau`` similar.
    """

    score: Tensor
    degree: Tensor


@register("saint")
@dataclass(frozen=True)
class SAINT(BlockMethod):
    """Similarity-aware token pruning, for vision transformers.

    ``form="graph"``: unprotected tokens at even places are sources, those at odd places destinations; a source and a
    destination are joined where their keys (mean over heads) are at least ``tau`` similar. The number of sources with
    ``K`` edges or more is the number of tokens that are dropped, those with the highest redundancy score first. Sources
    that stay come out in descending order of their score, destinations behind them.

    ``form="full"``: in one block, down to ``M`` tokens. Of all patches the most similar to all others are dropped, a
    ``q``-th part at a time, and the sums are taken anew over those that are left.

    Args:
        tau: similarity from which on two tokens are joined: a number for all blocks, or a list with one entry a block,
            where None, like a missing entry, prunes nothing.
        K: edges that make a token redundant.
        gamma: how much the mean strength of a token's edges counts beside their number.
        blocks: blocks that reduce, 0-based. None: the first half of them; with ``form="full"`` the one at 19 / 24 of
            the depth. Goes with a single ``tau``, since a list of them says it already.
        form: see above.
        count: ``"image"`` drops from each image what its own graph says (ours); ``"batch"`` the same number from all,
            the mean over the batch rounded down, as the authors do: an image's result then depends on its batch-mates.
        max_r: drop at most so many tokens per block and image (ours).
        min_tokens: keep at least so many unprotected tokens of each image (ours).
        M: tokens that the full form leaves, protected ones included; one patch stays in any case (ours).
        q: divisor of the full form.
        nearest: where the full length is asked for again, a dropped token takes the place of the kept one whose key is
            most similar, instead of its own features from before (ours; costs one more comparison of all keys).

    Source: Jeddi et al., Similarity-Aware Token Pruning: Your VLM but Faster, 2025, and its released code.
    """

    summary: ClassVar[str] = "drop tokens with many near-copies, as many as each image has"
    source: ClassVar[str] = "Jeddi et al., 2025 (arXiv 2503.11549)"
    example: ClassVar[Parameters] = {"tau": 0.35, "K": 3}
    nothing: ClassVar[Parameters | None] = {"tau": 1.5}
    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True

    tau: float | Sequence[float | None] = 0.75
    K: int = 5
    gamma: float = 10.0
    blocks: tuple[int, ...] | None = None
    form: Literal["graph", "full"] = "graph"
    count: Literal["image", "batch"] = "image"
    max_r: int | None = None
    min_tokens: int = 0
    M: int = 376
    q: int = 16
    nearest: bool = False

    def __post_init__(self) -> None:
        check_flags(nearest=self.nearest)
        if isinstance(self.tau, list | tuple):
            listed = tuple(None if t is None else check_number(t, f"tau[{i}]") for i, t in enumerate(self.tau))
            object.__setattr__(self, "tau", listed)
            if self.blocks is not None:
                raise ValueError("blocks goes with a single tau; a list of tau says which blocks prune")
        else:
            check_number(self.tau, "tau")
        if not check_number(self.gamma, "gamma") > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma!r}")
        for name, low in (("K", 1), ("M", 1), ("q", 1), ("min_tokens", 0), ("max_r", 0)):
            value = getattr(self, name)
            if not (name == "max_r" and value is None):
                check_count(value, name, low)
        check_choice(self.form, "form", ("graph", "full"))
        check_choice(self.count, "count", ("image", "batch"))
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and their keys."""
        return frozenset({"x", "k"})

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)
        if isinstance(self.tau, tuple) and len(self.tau) > depth:
            raise ValueError(f"tau has {len(self.tau)} entries, but the model has {depth} blocks")

    def tokens(self, n: int, place: Place) -> int:
        """``M`` in the full form; else at most ``n``: how many go depends on the image."""
        if self.form == "graph" or not self._listed(place.layer, place.depth):
            return n
        return place.protected + min(place.free(n), self._target(place.prefix, place.suffix))

    def acts(self, n: int, place: Place) -> bool:
        """True in the listed blocks, where there are sources and destinations, and a cosine can reach the threshold."""
        if self.form == "full":
            return super().acts(n, place)
        tau = self._tau(place.layer) if self._listed(place.layer, place.depth) else None
        return tau is not None and tau <= 1 and self.max_r != 0 and place.free(n) > max(1, self.min_tokens)

    def reduce(self, site: Site) -> Reduction:
        """Drop the most redundant tokens."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        keys = head_mean(site.k)[:, site.prefix : n - site.suffix].detach()
        real = None if site.mask is None else site.mask[:, site.prefix : n - site.suffix]
        if self.form == "full":
            return self._full(keys, real, site)
        tau = self._tau(site.layer)
        if tau is None or free < 2:
            return Reduction.identity((b,), n, site.device)
        score, degree = self.redundancy(keys, tau, real)
        r = self.number_dropped(degree, free, real)
        low, high = bounds(r, degree.shape[1])
        if high == 0:
            return Reduction.identity((b,), n, site.device)
        order = ranked(score)
        place = torch.arange(free, device=keys.device)
        kept = place[1::2].expand(b, -1)
        rows = torch.cat([order * 2, kept], 1)
        stays = torch.cat([place[: order.shape[1]] >= r.unsqueeze(1), torch.ones_like(kept, dtype=torch.bool)], 1)
        # An image that loses nothing keeps its order, as it would on its own.
        rows = torch.where(r.unsqueeze(1) > 0, rows, place)
        if real is not None:
            stays = stays & real.gather(1, rows)
        rows, mask = pack(rows, stays, (free - high, free - low) if real is None else None)
        return self._keep(rows, mask, keys, real, site)

    def redundancy(self, keys: Tensor, tau: float, real: Tensor | None = None) -> Redundancy:
        """Degree and redundancy score of the sources (the even places).

        A source with edges scores its degree times ``exp(gamma * (mean of its edges - tau))``, which is at least 1; one
        without any scores its mean similarity to all destinations, which is at most 1.

        Args:
            keys: ``(B, T, D)`` of the unprotected tokens.
            tau: similarity from which on there is an edge.
            real: ``(B, T)`` bool, False on padding; None: all are real.
        """
        a, b = keys[:, ::2], keys[:, 1::2]
        a_real, b_real = (None, None) if real is None else (real[:, ::2], real[:, 1::2])
        with torch.no_grad():
            degree = similarity_count(a, b, tau, a_mask=a_real, b_mask=b_real)
            above = similarity_sum(a, b, function="relu", margin=tau, a_mask=a_real, b_mask=b_real).float()
            edges = degree.clamp_min(1)
            joined = edges * torch.exp(self.gamma * (above / edges))
            partners = b.shape[1] if b_real is None else b_real.sum(1, keepdim=True).clamp_min(1)
            alone = degree_sums(a, b, b_real) / partners
            score = torch.where(degree > 0, joined, alone)
            return Redundancy(score if a_real is None else score.masked_fill(~a_real, -torch.inf), degree)

    def number_dropped(self, degree: Tensor, free: int, real: Tensor | None) -> Tensor:
        """How many tokens each image loses, ``(B,)`` int64, by the degrees of its sources.

        Args:
            degree: ``(B, A)`` as :meth:`redundancy` returns it.
            free: unprotected tokens.
            real: ``(B, free)`` bool, False on padding; None: all are real.
        """
        r = (degree >= self.K).sum(1)
        if self.count == "batch":
            r = (r.sum() // r.shape[0]).expand_as(r)
        room = torch.full_like(r, free) if real is None else real.sum(1)
        r = torch.minimum(r, room - self.min_tokens).clamp_min(0)
        return r if self.max_r is None else r.clamp_max(self.max_r)

    def _full(self, keys: Tensor, real: Tensor | None, site: Site) -> Reduction:
        (b, free, _), n = keys.shape, site.shape[1]
        target = self._target(site.prefix, site.suffix)
        if free <= target:
            return Reduction.identity((b,), n, site.device)
        alive = torch.ones(b, free, dtype=torch.bool, device=keys.device) if real is None else real
        place = torch.arange(free, device=keys.device)
        most = free
        while most > target:
            most -= min(most - target, max(1, most // self.q))
            count = alive.sum(1, keepdim=True)
            drop = torch.minimum(count - target, (count // self.q).clamp_min(1))
            order = ranked(degree_sums(keys, keys, alive).masked_fill(~alive, -torch.inf))
            alive = alive & ~torch.zeros_like(alive).scatter(1, order, place < drop)
        known = (target, target) if real is None else None
        rows, mask = pack(place.expand(b, -1), alive, known)
        return self._keep(rows, mask, keys, real, site)

    def _keep(self, rows: Tensor, mask: Tensor | None, keys: Tensor, real: Tensor | None, site: Site) -> Reduction:
        """The reduction to some of the unprotected tokens."""
        n = site.shape[1]
        representative, kept = with_protected(rows + site.prefix, mask, n, site.prefix, site.suffix)
        if not self.nearest:
            return Reduction.keep(representative, n, kept)
        stays = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
        dropped = ~torch.zeros_like(keys[..., 0], dtype=torch.bool).scatter(1, rows, stays)
        dropped = dropped if real is None else dropped & real
        match = best_match(keys, gather_rows(keys, rows), a_mask=dropped, b_mask=mask).index
        source = torch.arange(site.prefix, n - site.suffix, device=rows.device).expand_as(dropped)
        target = torch.where(dropped, match + site.prefix, -1)
        return Reduction(representative, source, target, n, mask=kept, mode="keep", inherit=False)

    def _target(self, prefix: int, suffix: int) -> int:
        return max(1, self.M - prefix - suffix)

    def _tau(self, layer: int) -> float | None:
        if isinstance(self.tau, Sequence):
            return self.tau[layer] if layer < len(self.tau) else None
        return self.tau

    def _listed(self, layer: int, depth: int) -> bool:
        if self.form == "graph" and isinstance(self.tau, Sequence):
            return self._tau(layer) is not None
        if self.blocks is not None:
            return layer in self.blocks
        return layer == depth * 19 // 24 if self.form == "full" else layer < (depth + 1) // 2


def degree_sums(a: Tensor, b: Tensor, real: Tensor | None = None) -> Tensor:
    """The sum of each row's cosines with all rows of ``b``: one product with the sum of those rows.

    Args:
        a: ``(B, Na, D)``.
        b: ``(B, Nb, D)``.
        real: ``(B, Nb)`` bool, which rows of ``b`` count; None: all.

    Returns:
        ``(B, Na)`` float32.
    """
    rows = unit(b) if real is None else unit(b) * real.unsqueeze(-1)
    total = rows.sum(1, keepdim=True)
    return similarity_sum(unit(a), total, function="identity", metric="dot").float()
