"""kth: of every k tokens one is a destination, the others merge. ToMe's fixed-ratio baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_blocks, check_blocks_exist, check_count
from tokred.core.matching import match_to
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import protected_rows
from tokred.core.site import Site
from tokred.encoder.method import Compared
from tokred.encoder.metric import Metric, read_metric
from tokred.encoder.padding import reduce_each


@register("kth")
@dataclass(frozen=True)
class KthMerge(Compared):
    """Cut the tokens into groups of ``k``; the last of each group receives, the others merge into the most similar one.

    Tokens beyond the last whole group are sources too (the authors' code loses them). Protected tokens stay (ours).

    Args:
        k: group length; 1 changes nothing.
        prop_attn: proportional attention, see :class:`tokred.ToMe`.
        metric: what is compared.
        blocks: blocks in which it acts, 0-based. None: only the first, since ``k`` in every block leaves nothing.

    Source: Bolya et al., Token Merging, ICLR 2023, released code (kth_bipartite_soft_matching).
    """

    summary: ClassVar[str] = "every k-th token receives, the others merge (ToMe's baseline)"
    source: ClassVar[str] = "Bolya et al., ICLR 2023, released code"
    example: ClassVar[Parameters] = {"k": 2}
    nothing: ClassVar[Parameters | None] = {"k": 1}

    k: int = 2
    prop_attn: bool = True
    metric: Metric = "k"
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "k", 1)
        object.__setattr__(self, "blocks", (0,) if self.blocks is None else check_blocks(self.blocks))

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """One token a whole group, and the protected ones."""
        free = place.free(n)
        if place.layer not in (self.blocks or ()) or free < self.k:
            return n
        return n - free + free // self.k

    def reduce(self, site: Site) -> Reduction:
        """Merge all but every k-th token."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        free = n - site.prefix - site.suffix
        if self.k == 1 or free < self.k:
            return Reduction.identity((b,), n, site.device)
        position = torch.arange(site.prefix, n - site.suffix, device=site.device)
        chosen = position[self.k - 1 :: self.k]
        rest = position[_not_every(free, self.k, site.device)]
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return match_to(read_metric(site, self.metric), rest.expand(b, -1), chosen.expand(b, -1), lead=lead, tail=tail)


def _not_every(n: int, k: int, device: torch.device) -> torch.Tensor:
    """Positions below ``n`` that are not ``k - 1`` modulo ``k``, built from static lengths (no boolean indexing)."""
    groups, left = divmod(n, k)
    whole = (torch.arange(groups, device=device)[:, None] * k + torch.arange(k - 1, device=device)).reshape(-1)
    return torch.cat([whole, torch.arange(n - left, n, device=device)])
