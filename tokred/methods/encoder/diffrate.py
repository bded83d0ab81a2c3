"""DiffRate: how many tokens each block prunes and merges is learned; what is left of that is a list of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.attention import Attention
from tokred.core.checks import check_count, check_flags, check_number, check_share, is_count
from tokred.core.learned import Facts
from tokred.core.matching import match_to
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.relaxed import Absorbed
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.encoder.padding import reduce_each
from tokred.errors import UnsupportedModelError
from tokred.kernels.dispatch import without_autocast


@register("diffrate")
@dataclass(frozen=True)
class DiffRate(BlockMethod):
    """Differentiable compression rate: patches are ranked by class attention; the last go, the next ones merge.

    In each block the patches that the class token looks at least are pruned, then those that it looks at next to least
    merge into the most similar of the others. How many are left behind both is given as numbers of patches, or learned
    (``learn=True``): each number is then the mean of all that it could be, by weights that the task's loss and a loss
    on the work (``cost``) teach. In training all tokens stay, and attention looks past those that are gone.

    Args:
        prune: patches left behind the pruning of each block, from the first on; blocks behind the list prune none.
        merge: patches left behind the merging of each block, likewise.
        learn: learn both.
        patches: of an image, where they are learned.
        granularity: steps between the numbers that a count can be; 1 tries every number.
        target: share of the dense blocks' work that is to be done, where counts are learned.
        penalty: weight of the squared distance to it (ours).
        mlp: how many times as wide as the tokens the MLPs are, by which the work is reckoned.

    Source: Chen et al., DiffRate, ICCV 2023, section 3.
    """

    summary: ClassVar[str] = "prune, then merge, the patches of the lowest class attention; how many is learned"
    source: ClassVar[str] = "Chen et al., ICCV 2023 (arXiv 2305.17997)"
    usual: ClassVar[Parameters] = {"merge": ...}
    example: ClassVar[Parameters] = {"prune": (20,), "merge": (16, 12)}
    nothing: ClassVar[Parameters | None] = {"prune": (), "merge": ()}
    drops: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    prune: Sequence[int] | None = None
    merge: Sequence[int] | None = None
    learn: bool = False
    patches: int | None = None
    granularity: int = 1
    target: float = 0.5
    penalty: float = 10.0
    mlp: float = 4.0

    def __post_init__(self) -> None:
        check_flags(learn=self.learn)
        for name in ("prune", "merge"):
            given: object = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, list | tuple) or not all(is_count(k, 1) for k in given):
                raise ValueError(f"{name} must be a list of numbers of patches, each at least 1, got {given!r}")
            if self.learn:
                raise ValueError(f"{name} is what learn=True learns: leave it out, got {given!r}")
            object.__setattr__(self, name, tuple(given))
        check_count(self.granularity, "granularity", 1)
        check_share(self.target, "target")
        if check_number(self.penalty, "penalty") < 0:
            raise ValueError(f"penalty must be a number of at least 0, got {self.penalty!r}")
        if check_number(self.mlp, "mlp") <= 0:
            raise ValueError(f"mlp must be a number above 0, got {self.mlp!r}")
        if self.patches is not None:
            check_count(self.patches, "patches", 1)
        if self.learn != (self.patches is not None):
            raise ValueError(f"learn={self.learn} {'needs' if self.learn else 'has no'} patches, got {self.patches!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the class token's attention; where counts are learned, the module and weighed keys, too."""
        found = {"x", "class_attention"}
        return frozenset(found | {"attention", "module", "gates"} if self.learn else found)

    def check(self, depth: int) -> None:
        """Neither list may be longer than the model is deep."""
        for name in ("prune", "merge"):
            given = getattr(self, name)
            if given is not None and len(given) > depth:
                raise ValueError(f"{name} has {len(given)} entries, but the model has {depth} blocks")

    def left(self, free: int, layer: int) -> tuple[int, int]:
        """Of ``free`` patches, how many are left in a block behind the pruning, and how many behind the merging."""
        kept = free
        found = []
        for given in (self.prune, self.merge):
            kept = min(kept, given[layer]) if given is not None and layer < len(given) else kept
            found.append(kept)
        return found[0], found[1]

    def tokens(self, n: int, place: Place) -> int:
        """Those of the lists; at most all of them where the counts are learned."""
        return n if self.learn else n - place.free(n) + self.left(place.free(n), place.layer)[1]

    def acts(self, n: int, place: Place) -> bool:
        return place.free(n) > 1 and (self.learn or self.tokens(n, place) != n)

    def module(self, facts: Facts) -> nn.Module | None:
        """Weights of all numbers that each count can be; None where the counts are given."""
        if not self.learn or self.patches is None:
            return None
        return Rates(facts.depth, self.patches, self.granularity, facts.width)

    def reduce(self, site: Site) -> Reduction:
        """Rank the patches, leave out the last, merge the next; softly while the counts are learned."""
        n = site.shape[1]
        free = n - site.prefix - site.suffix
        if not self.learn:
            if site.mask is not None:
                return reduce_each(self, site, always=True)
            return self._hard(site, *self.left(free, site.layer))
        module = self.its_module(site, Rates, "which diffrate with learn=True counts by")
        if module.training:
            if site.mask is not None:
                raise UnsupportedModelError("'diffrate' cannot learn on batches with padding: give images of one size")
            return self._soft(site, module)
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        first, second = module.kept()[site.layer]
        return self._hard(site, min(free, first), min(free, first, second))

    @torch.no_grad()
    def _hard(self, site: Site, pruned: int, merged: int) -> Reduction:
        """Tokens really leave: ``pruned`` patches are left of the first step, ``merged`` of the second."""
        b, n = site.shape
        if merged == n - site.prefix - site.suffix:
            return Reduction.identity((b,), n, site.device)
        score = site.class_attention[:, site.prefix : n - site.suffix]
        order = ranked(score)[:, :pruned] + site.prefix
        stays, goes = order[:, :merged].sort(1).values, order[:, merged:].sort(1).values
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        plan = match_to(site.x, goes, stays, lead=lead, tail=tail)
        # The class token stands for no patch, and neither does a patch for those that were pruned: no sizes.
        return replace(plan, by_size=False)

    def _soft(self, site: Site, module: Rates) -> Reduction:
        """All tokens stay: gates that say which are gone, and features of those that merge in those that stay."""
        b, n = site.shape
        free = slice(site.prefix, n - site.suffix)
        before = site.learned.gate
        if n - site.prefix - site.suffix != self.patches:
            raise ValueError(
                f"diffrate learns counts of patches={self.patches}, but this input has {n - site.prefix - site.suffix}"
            )
        if before is None:
            share = module.work(site.prefix + site.suffix, self.mlp)
            site.learned.losses["cost"] = self.penalty * (share - self.target).square()
        alive = site.x.new_ones(b, n, dtype=torch.bool) if before is None else before.detach() > 0.5
        with torch.no_grad():
            score = _class_attention(site, alive)[:, free].masked_fill(~alive[:, free], -torch.inf)
            order = ranked(score)
            rank = order.argsort(1)  # the place of each patch in that order
        pruned, merged = (module.gate(which, site.layer, rank) for which in (0, 1))
        gate = pruned * merged
        with torch.no_grad():
            stays = (gate > 0.5) & alive[:, free]
            goes = (pruned > 0.5) & alive[:, free] & ~stays
            into = torch.arange(n, device=site.device).repeat(b, 1)
            into[:, free] = torch.where(goes, _most_similar(site.x[:, free], stays) + site.prefix, into[:, free])
        return Absorbed.make(into, F.pad(gate, (site.prefix, site.suffix), value=1.0))


def _class_attention(site: Site, alive: Tensor) -> Tensor:
    """``(B, N)`` float32: the class token's attention among tokens that are there, mean over heads."""
    whole = site.attention
    seen = alive if whole.mask is None else alive & whole.mask
    own = Attention(whole.q, whole.k, bias=whole.bias, scale=whole.scale, mask=seen, softcap=whole.softcap)
    return own.columns(rows=slice(0, 1)).mean(1)


def _most_similar(x: Tensor, among: Tensor) -> Tensor:
    """``(B, N)`` int64: for each token ``(B, N, C)`` the most similar of those that ``among`` ``(B, N)`` marks."""
    with without_autocast(x):
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return (unit @ unit.mT).masked_fill(~among[:, None], -torch.inf).argmax(-1)


class Rates(nn.Module):
    """Two counts for every block, what the pruning leaves and what the merging leaves, each the mean of all that it
    could be.

    Args:
        blocks: how many.
        patches: of an image, the highest count.
        granularity: steps down from there to the others.
        width: channels ``C`` of a token, by which the work is reckoned.

    Source: Chen et al., DiffRate, ICCV 2023, section 3.2.
    """

    candidates: Tensor

    def __init__(self, blocks: int, patches: int, granularity: int, width: int) -> None:
        super().__init__()
        self.patches, self.width = patches, width
        found = torch.arange(patches, 0, -granularity, dtype=torch.float32)
        self.register_buffer("candidates", found)
        self.logits = nn.Parameter(torch.zeros(2, blocks, len(found)))

    def probabilities(self) -> Tensor:
        """``(2, blocks, K)`` float32: the weight of each candidate."""
        return self.logits.float().softmax(-1)

    def counts(self) -> Tensor:
        """``(2, blocks)`` float32: patches left behind pruning and merging, whole numbers with the gradient of the
        means; not yet held to what is there."""
        mean = (self.probabilities() * self.candidates.float()).sum(-1)
        # Sums of many weights end a little above a whole number at times, which must not count as the next.
        return (mean.detach() - 1e-4).ceil() + (mean - mean.detach())

    @torch.no_grad()
    def kept(self) -> list[tuple[int, int]]:
        """For each block the patches that are left behind pruning and behind merging; waits for the device."""
        least = self.counts().T.reshape(-1).cummin(0).values.view(-1, 2)
        return [(int(first), int(second)) for first, second in least.tolist()]

    def lists(self) -> dict[str, list[int]]:
        """The counts as parameters of ``DiffRate``, which needs no module then."""
        kept = self.kept()
        return {"prune": [first for first, _ in kept], "merge": [second for _, second in kept]}

    def gate(self, which: int, block: int, rank: Tensor) -> Tensor:
        """Gates of tokens, 1 for those that stay and 0 for the others, with the gradient of the probability
        that the count lies above their rank.

        Args:
            which: 0 for pruning, 1 for merging.
            block: of the model.
            rank: ``(B, N)`` int64, from 0.

        Returns:
            ``(B, N)`` float32.
        """
        p = self.probabilities()[which, block]
        at = torch.arange(self.patches, device=p.device)
        above = (p * (self.candidates > at[:, None])).sum(-1)
        hard = (at < self.counts()[which, block].detach()).to(above.dtype)
        gates = hard + (above - above.detach())  # in this order, which leaves 0 and 1 exact
        return gates[rank]

    def work(self, protected: int, mlp: float = 4.0) -> Tensor:
        """The share of the dense blocks' multiply-adds that these counts leave, a scalar, with their gradient.

        A block of width ``C`` takes ``4 n C^2 + 2 n^2 C`` for the attention of ``n`` tokens and ``2 mlp m C^2`` for the
        MLP on the ``m`` that are left.

        Args:
            protected: tokens beside the patches.
            mlp: how many times as wide as the tokens the MLP is.
        """
        left = self.counts().T.reshape(-1)
        whole = left.new_full((1,), float(self.patches))
        left = torch.cat([whole, left]).cummin(0).values + protected
        enters, leaves = left[:-1:2], left[2::2]
        full = whole + protected
        c = self.width
        done = 4 * enters * c + 2 * enters.square() + 2 * mlp * leaves * c
        dense = 4 * full * c + 2 * full.square() + 2 * mlp * full * c
        return done.mean() / dense.squeeze(0)
