"""LLaVA-PruMerge and PruMerge+: as many tokens as attention has outliers, each absorbing its nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.checks import check_choice, check_count, is_count
from tokred.core.method import Parameters
from tokred.core.overlap import OverlapReduction
from tokred.core.place import Place
from tokred.core.ragged import pack
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.errors import MissingInputError
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import unit
from tokred.vlm.before_llm import ProjectorMethod, Space, VisualSite
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.scores import outliers

# Entries of a block of similarities.
_BLOCK = 1 << 22


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(ProjectorMethod):
    """LLaVA-PruMerge, without its training.

    Tokens that the class token attends to more than the upper whisker of a box plot (third quartile plus ``whisker``
    times the quartiles' distance) are centres. To each centre the ``k_c`` tokens with the most similar keys are added,
    weighted by the class token's attention; a token can be added to several. One more token is the sum of all that are
    no centres, weighted likewise.

    Args:
        budget: None: as many centres as there are outliers, at least one, and the left-over token; or how many tokens
            are left of each image, that one included, an integer from 2 or a share in (0, 1].
        k_c: neighbours of a centre, at most all others.
        whisker: see above.
        heads: ``"single"``: attention of the tower's last layer as if it had one head, as the authors compute it;
            ``"mean"``: the mean over its heads.
        normalise: divide each sum by the sum of its weights, the centre's own attention included (ours).
        order: ``"raster"``: slots in the order of the image (ours, for hosts that keep positions); ``"attention"``:
            centres by falling attention, then those of the uniform grid as they stand, as the authors have it. The
            left-over token is the last.
        min_tokens, max_tokens: bounds on the number of centres that ``budget=None`` finds; None: no upper one (ours).
        plus: a uniform grid of tokens joins the centres, with a stride of a third of the mean distance of centres. With
            a ``budget`` a quarter are centres by attention, the others evenly spaced (ours).
        space: ``"tower"``: features are merged before the projector, as published, where the host can run it on merged
            ones; ``"x"``: behind it.

    Source: Shang et al., LLaVA-PruMerge, ICCV 2025, section 3, and its released code.
    """

    summary: ClassVar[str] = "as many image tokens as attention has outliers, each absorbing its nearest neighbours"
    source: ClassVar[str] = "Shang et al., ICCV 2025 (arXiv 2403.15388)"
    example: ClassVar[Parameters] = {"k_c": 3}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget | None = None
    k_c: int = 32
    whisker: float = 1.5
    heads: Literal["single", "mean"] = "single"
    normalise: bool = False
    order: Literal["raster", "attention"] = "raster"
    min_tokens: int = 1
    max_tokens: int | None = None
    plus: bool = False
    space: Space = "tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            as_budget(self.budget)
            if self.budget == 1 and is_count(self.budget):
                raise ValueError("budget must be at least 2, a centre and the left-over token, got 1")
        check_count(self.k_c, "k_c", 1)
        check_count(self.min_tokens, "min_tokens", 1)
        if self.max_tokens is not None:
            check_count(self.max_tokens, "max_tokens", self.min_tokens)
        if isinstance(self.whisker, bool) or not isinstance(self.whisker, int | float) or not self.whisker > 0:
            raise ValueError(f"whisker must be positive, got {self.whisker!r}")
        check_choice(self.heads, "heads", ("single", "mean"))
        check_choice(self.order, "order", ("raster", "attention"))
        check_choice(self.space, "space", ("tower", "x"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and the class token's attention and the keys of the tower's last layer."""
        tower = {"tower"} if self.space == "tower" else set[str]()
        return frozenset({"x", "class_attention", "tower_layers"} | tower)

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (-1,)

    def count(self, n: int) -> int:
        """The budget; all of them where the image says how many."""
        return n if self.budget is None else max(min(2, n), count_of(self.budget, n))

    def with_budget(self, n: int) -> PruMerge:
        """With a centre and the left-over token at least."""
        return replace(self, budget=max(2, n))

    def acts(self, n: int, place: Place) -> bool:
        """Unless the budget holds all tokens, or there are no two of them."""
        free = place.free(n)
        return free > 2 and (self.budget is None or self.count(free) < free)

    def choose(self, site: VisualSite) -> Reduction:
        """Find the centres, and what each of them absorbs."""
        if site.prefix == 0:
            raise MissingInputError("PruMerge reads 'class_attention', and the vision tower has no class token")
        q, k = site.tower_heads(-1)
        if self.heads == "single":
            q, k = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (q, k))
        attention = site.of_tokens(Attention(q, k).columns(rows=slice(0, 1)).mean(1))
        keys = site.layer_heads(-1)[1].transpose(1, 2).flatten(2)[:, site.prefix :]
        return self.absorb(attention, keys)

    # ------------------------------------------------------------------ which

    def centres(self, attention: Tensor) -> Tensor:
        """``(B, N)`` bool, the tokens that become slots, the left-over one aside."""
        chosen = self.by_attention(attention)
        return self._with_grid(chosen) if self.plus else chosen

    def by_attention(self, attention: Tensor) -> Tensor:
        """``(B, N)`` bool, the centres that attention chooses."""
        b, n = attention.shape
        place = torch.arange(n, device=attention.device)
        if self.budget is None:
            count = outliers(attention, self.whisker).clamp(self.min_tokens, self.max_tokens).clamp_max(n - 1)
        else:
            count = torch.full((b,), self._by_attention(n), device=attention.device)
        return torch.zeros_like(attention, dtype=torch.bool).scatter(1, ranked(attention), place < count.unsqueeze(1))

    def _with_grid(self, chosen: Tensor) -> Tensor:
        n, count = chosen.shape[1], chosen.sum(1)
        place = torch.arange(n, device=chosen.device)
        if self.budget is None:
            stride = (n // count // 3).clamp_min(1).unsqueeze(1)
            return chosen | ((place % stride == 0) & (place < n - 1))
        others = chosen.to(torch.uint8).argsort(dim=1, stable=True)
        most = self._by_attention(n)
        more = self.count(n) - 1 - most
        even = torch.arange(more, device=place.device) * (n - most) // max(1, more)
        return chosen.scatter(1, others[:, even], True)

    def _by_attention(self, n: int) -> int:
        """Centres that attention chooses, of a budget."""
        total = self.count(n) - 1
        return max(1, round(total / 4)) if self.plus else total

    def absorb(self, attention: Tensor, keys: Tensor) -> Reduction:
        """The reduction, from the class token's attention and the keys of all tokens.

        Args:
            attention: ``(B, N)`` float32.
            keys: ``(B, N, D)``.
        """
        b, n = attention.shape
        chosen = self.centres(attention)
        place = torch.arange(n, device=keys.device).expand(b, -1)
        order = place
        if self.order == "attention":  # tokens of the uniform grid follow the centres, in their own order
            order = ranked(attention.masked_fill(~self.by_attention(attention), -torch.inf))
        rest = attention.masked_fill(chosen, 0)
        # Of the left-over tokens the last one stands for all, so that it comes late in the order of the image, too.
        last = place.masked_fill(chosen, -1).amax(1, keepdim=True).clamp_min(0)
        stays = torch.cat([chosen.gather(1, order), ~chosen.all(1, keepdim=True)], 1)
        sure = (self.count(n),) * 2 if self.budget is not None else None
        rows, mask = pack(torch.cat([order, last], 1), stays, sure)
        ends = chosen.sum(1)
        member, share = self._members(rows, attention, keys)
        slot = torch.arange(rows.shape[1], device=rows.device)
        share = torch.where((slot < ends.unsqueeze(1)).unsqueeze(-1), share, 0)
        if self.normalise:
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
            rest = rest / rest.sum(1, keepdim=True).clamp_min(1e-12)
        first = ends.unsqueeze(1).expand(-1, n)
        into = torch.where(share[:, :, 1:] > 0, slot.view(1, -1, 1), n).flatten(1)
        first = first.scatter_reduce(1, member[:, :, 1:].flatten(1), into, "amin")
        target = first.masked_fill(chosen.scatter(1, last, True), -1)
        return OverlapReduction(
            rows, place.contiguous(), target, n, mask=mask, mode="sum", by_size=False,
            member=member, share=share, rest=rest, rest_slot=ends,
        )  # fmt: skip

    def _members(self, rows: Tensor, attention: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, M, 1 + k_c)`` the members of each slot, its centre first, and what each counts for."""
        near = nearest(keys, rows, self.k_c)
        weight = attention.gather(1, near.flatten(1)).view(near.shape)
        own = attention.gather(1, rows) if self.normalise else torch.ones_like(rows, dtype=weight.dtype)
        return torch.cat([rows.unsqueeze(-1), near], -1), torch.cat([own.unsqueeze(-1), weight], -1)


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+: :class:`PruMerge` with ``plus=True``: about four times as many tokens.

    Args:
        plus: as every parameter, see :class:`PruMerge`.

    Source: Shang et al., LLaVA-PruMerge, ICCV 2025, section 3.3.
    """

    summary: ClassVar[str] = "PruMerge with a uniform grid of tokens beside the outliers"
    example: ClassVar[Parameters] = {"budget": 6, "k_c": 3}

    plus: bool = True


def nearest(keys: Tensor, rows: Tensor, k: int) -> Tensor:
    """The ``k`` other tokens with the largest cosine, for some tokens.

    Args:
        keys: ``(B, N, D)``.
        rows: ``(B, M)`` int64.
        k: how many, capped at ``N - 1``.

    Returns:
        ``(B, M, k)`` int64, the most similar one first, ties to the lower index.
    """
    b, n, _ = keys.shape
    keys = unit(keys)
    step = max(1, _BLOCK // (b * n))
    found = []
    for i in range(0, rows.shape[1], step):
        part = rows[:, i : i + step]
        near = (gather_rows(keys, part) @ keys.mT).scatter(2, part.unsqueeze(-1), -torch.inf)
        found.append(ranked(near)[:, :, : min(k, n - 1)])
    return torch.cat(found, 1)
