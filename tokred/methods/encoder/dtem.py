"""DTEM: ToMe's merging by an embedding of its own, which a relaxed merge teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokred.core.checks import check_count, check_flags, check_number
from tokred.core.learned import Facts, linear, norm
from tokred.core.matching import bipartite_soft_matching, mergeable, sides_of
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.relaxed import Relaxed, relaxed_top
from tokred.core.schedules import schedule
from tokred.core.site import Site
from tokred.encoder.method import Scheduled
from tokred.encoder.padding import reduce_each
from tokred.errors import UnsupportedModelError
from tokred.kernels.dispatch import without_autocast


@register("dtem")
@dataclass(frozen=True)
class DTEM(Scheduled):
    """Decoupled token embedding for merging: a small layer in every block says which tokens are alike.

    In evaluation tokens merge as with ToMe, compared by this embedding instead of the keys. In training no token
    leaves: the ``r`` best pairs are chosen softly, tokens of one side give parts of themselves to those of the other,
    and sizes follow, by which attention sees what is left of each. So the task's own loss teaches the embedding.
    Untrained, it compares tokens by a random projection.

    Args:
        r: tokens removed per block: an integer, a pair ``(r, inflect)``, or a list with one entry a block.
        dim: channels of the embedding.
        tau: temperature of the soft choice of pairs.
        detach: no gradient of the embedding reaches the model's tokens, which suits a model that stays as it is.
        vary: draw, in each block of each step, how many pairs are chosen, from none to ``r`` (ours), so that one
            training serves several amounts.

    Source: Lee and Hong, Learning to Merge Tokens via Decoupled Embedding, NeurIPS 2024; constants are ours.
    """

    summary: ClassVar[str] = "merge pairs as ToMe does, compared by an embedding that was trained for it"
    source: ClassVar[str] = "Lee and Hong, NeurIPS 2024 (arXiv 2412.10569)"
    by_mask: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    dim: int = 64
    tau: float = 0.1
    detach: bool = True
    vary: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.dim, "dim", 1)
        check_flags(detach=self.detach, vary=self.vary)
        if check_number(self.tau, "tau") <= 0:
            raise ValueError(f"tau must be a number above 0, got {self.tau!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the module."""
        return frozenset({"x", "module"})

    @property
    def proportional(self) -> bool:
        """Attention sees each token by its size: what is softly gone would be seen whole otherwise."""
        return True

    def module(self, facts: Facts) -> nn.Module:
        """An embedding for every block."""
        return Embeddings(facts.width, facts.depth, self.dim)

    def reduce(self, site: Site) -> Reduction:
        """Merge the pairs whose embeddings are most alike; softly in training."""
        module = self.its_module(site, Embeddings, "by which dtem compares tokens")
        r = schedule(self.r).at(site.layer, site.depth)
        if not module.training:
            if site.mask is not None:
                return reduce_each(self, site, always=True)
            with torch.no_grad():
                metric = module(site.layer, site.x, unit=False)  # lengths do not matter to the matching
            return bipartite_soft_matching(metric, r, prefix=site.prefix, suffix=site.suffix)
        if site.mask is not None:
            raise UnsupportedModelError("'dtem' cannot learn on batches with padding: give samples of one length")
        n = site.shape[1]
        r = min(r, mergeable(n, site.prefix, site.suffix))
        if self.vary:
            r = int(torch.randint(0, r + 1, ()))
        if r == 0:
            return Reduction.identity((site.shape[0],), n, site.device)
        unit = module(site.layer, site.x.detach() if self.detach else site.x)
        giving, taking = sides_of(n, site.prefix, site.suffix)
        with without_autocast(unit):
            part = relaxed_top(unit[:, giving] @ unit[:, taking].mT, r, self.tau)
            # A token cannot give more than itself.
            part = part / part.sum(2, keepdim=True).clamp_min(1.0)
        places = torch.arange(n, device=site.device)
        return Relaxed.make(places[giving], places[taking], part, n)


class Embeddings(nn.Module):
    """A norm and a layer for every block.

    Args:
        width: channels ``C`` of a token.
        blocks: how many.
        dim: channels ``D`` of the embedding.
    """

    def __init__(self, width: int, blocks: int, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(width, dim) for _ in range(blocks))

    def forward(self, block: int, x: Tensor, unit: bool = True) -> Tensor:
        """Embeddings ``(B, N, D)`` of tokens ``(B, N, C)``, of length one if ``unit``, float32 (float64 stays)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, layer = self.norms[block], self.layers[block]
        assert isinstance(first, nn.LayerNorm)  # module lists do not tell the types of what is in them
        assert isinstance(layer, nn.Linear)
        with without_autocast(x):
            y = linear(layer, norm(first, x))
            # Not a norm, whose gradient at nothing is none.
            return y * (y.square().sum(-1, keepdim=True) + 1e-12).rsqrt() if unit else y
