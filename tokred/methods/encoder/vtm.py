"""VTM: choose targets evenly, by region, by motion or by a learned saliency, and merge the other tokens into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tokred.core.checks import check_blocks, check_blocks_exist, check_choice, check_count, check_flags, check_integer
from tokred.core.learned import Facts
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import is_listed, kept
from tokred.core.selection import hash_uniform, largest, ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.encoder.metric import METRICS, Metric, read_metric
from tokred.errors import MissingInputError
from tokred.kernels.dispatch import without_autocast
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match

Variant = Literal["naive", "centre", "boundary", "motion", "learned"]
Helps = Literal["gradient", "added"]


@register("vtm")
@dataclass(frozen=True)
class VTM(BlockMethod):
    """Video token merging.

    A share of the tokens are targets. Of the others, those that are most similar to a target merge into it; tokens stay
    in the order of the sequence, so that time does too. An image is a clip of one frame.

    Args:
        variant: who is a target. ``"naive"``: every ``gamma``-th token of the clip, the first one included.
            ``"centre"``: every ``gamma / 2``-th token of the middle half (in height and width) of each frame, and every
            ``3 gamma / 2``-th of the rest, which puts half of all targets in the middle. ``"boundary"``: the two
            factors exchanged, so that the rest is sampled more densely; there are then 5 / 3 as many targets (our
            reading). ``"motion"``: the tokens that move most, one for each ``gamma``. ``"learned"``: those whose keys
            have the largest product with a vector of the block; while it learns they are drawn. Untrained, the choice
            is a random one.
        gamma: one target for so many tokens.
        R: how many of the others merge: a share of them as a float, a number as an integer, or None for all.
        size_weighted: weigh the mean by the sizes of the tokens; the plain mean was better.
        sampling: draw the targets of ``"motion"`` with probabilities that are the softmax of the magnitudes, without
            replacement, instead of taking the largest (the paper draws). Draws depend on ``seed``, the block and the
            step alone and are the same for every sample. With ``"learned"``: in evaluation, too.
        seed: of the draws.
        metric: what is compared.
        blocks: blocks that reduce, 0-based. None: at a quarter, half and three quarters of the depth (3, 6, 9 of 12;
            ours: the paper's head has three blocks, all of which merge).
        moves: what tells how much a token moves: ``"features"``, the difference of its embedding to the one at its
            place in the frame before; ``"pixels"``, the mean difference of the clip's own pixels, where a host makes
            tokens of blocks of them.
        helps: what the auxiliary attention of ``"learned"`` does in training, in which each key is seen the more the
            more salient it is: ``"gradient"``: it teaches the saliency, and tokens are what they are in evaluation
            (ours); ``"added"``: it is added to the merged tokens, which in evaluation then are others (the paper).

    Source: Lee et al., Video Token Merging for Long-form Video Understanding, NeurIPS 2024, section 3. No code was
    released: counting from 0, rounding the factors, the order of the output, deterministic targets, and an auxiliary
    attention that begins anew in each block are our reading.
    """

    summary: ClassVar[str] = "merge a clip's tokens into targets spread evenly, by region, by motion or as it learned"
    source: ClassVar[str] = "Lee et al., NeurIPS 2024 (arXiv 2410.23782)"
    example: ClassVar[Parameters] = {"gamma": 2, "blocks": (1,)}
    nothing: ClassVar[Parameters | None] = {"R": 0}
    # By region, once tokens have moved: how many of those that are left lie in the middle differs between samples.
    uneven: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    variant: Variant = "naive"
    gamma: int = 4
    R: float | int | None = 0.8
    size_weighted: bool = False
    sampling: bool = False
    seed: int = 0
    metric: Metric = "k"
    blocks: tuple[int, ...] | None = None
    moves: Literal["features", "pixels"] = "features"
    helps: Helps = "gradient"

    def __post_init__(self) -> None:
        check_flags(size_weighted=self.size_weighted)
        check_integer(self.seed, "seed")
        check_choice(self.variant, "variant", get_args(Variant))
        check_choice(self.helps, "helps", get_args(Helps))
        check_choice(self.metric, "metric", METRICS)
        check_choice(self.moves, "moves", ("features", "pixels"))
        check_count(self.gamma, "gamma", 2)
        number = isinstance(self.R, int | float) and not isinstance(self.R, bool)
        if self.R is not None and not (number and (self.R >= 0 if isinstance(self.R, int) else 0 <= self.R <= 1)):
            raise ValueError(f"R must be a share in [0, 1], an integer of at least 0, or None for all, got {self.R!r}")
        if self.sampling and self.variant not in ("motion", "learned"):
            raise ValueError(f"sampling goes with variant='motion' or 'learned'; {self.variant!r} draws nothing")
        if self.helps != "gradient" and self.variant != "learned":
            raise ValueError(f"helps={self.helps!r} goes with variant='learned'; {self.variant!r} learns nothing")
        if self.moves == "pixels" and self.variant != "motion":
            raise ValueError(f"moves='pixels' goes with variant='motion'; {self.variant!r} asks for no motion")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, what is compared, and what the variant asks for."""
        moves = "motion" if self.moves == "features" else "frame_motion"
        learned = {"k", "v", "attention", "module"}
        more = {"centre": {"grid"}, "boundary": {"grid"}, "motion": {moves}, "learned": learned}
        return frozenset({"x", self.metric} | more.get(self.variant, set()))

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """Targets and sources that stay; by region at most so many, as the frame's shape decides."""
        free = place.free(n)
        if free < 2 or not is_listed(self.blocks, place.layer, place.depth):
            return n
        targets = -(-free // self.gamma)
        if self.variant in ("centre", "boundary"):
            targets = min(free, -(-free // min(self.factors)) + 1)
        return n - self._merged(free - targets)

    def acts(self, n: int, place: Place) -> bool:
        """True in the listed blocks, where something can merge."""
        if self.variant not in ("centre", "boundary"):
            return super().acts(n, place)
        return is_listed(self.blocks, place.layer, place.depth) and self._merged(max(0, place.free(n) - 1)) > 0

    def places(self, depth: int) -> tuple[int, ...]:
        """The blocks that reduce."""
        return tuple(i for i in range(depth) if is_listed(self.blocks, i, depth))

    def module(self, facts: Facts) -> nn.Module | None:
        """A vector for every block that reduces; None where targets are not learned."""
        if self.variant != "learned":
            return None
        return Saliency(facts.width // facts.heads, len(self.places(facts.depth)))

    @property
    def factors(self) -> tuple[int, int]:
        """One target for so many tokens in the middle of a frame, and in the rest of it."""
        dense, sparse = (self.gamma + 1) // 2, (3 * self.gamma + 1) // 2
        return (sparse, dense) if self.variant == "boundary" else (dense, sparse)

    def reduce(self, site: Site) -> Reduction:
        """Split into targets and sources, match, merge the best."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        same = Reduction.identity((b,), n, site.device)
        if free < 2 or self._merged(free) == 0:
            return same
        inner = slice(site.prefix, n - site.suffix)
        real = None if site.mask is None else site.mask[:, inner]
        metric = read_metric(site, self.metric)[:, inner]
        salient = self._salient(site, inner, metric) if self.variant == "learned" else None
        metric = metric.detach()
        with torch.no_grad():
            chosen, count = self._targets(site, free, real, salient)
            chosen = chosen.expand(b, -1)
            others = ~chosen if real is None else ~chosen & real
            left = None if count is None else free - count
            r = None if left is None else self._merged(left)
            if r == 0:
                return same
            place = torch.arange(free, device=chosen.device).expand(b, -1)
            targets, target_mask = pack(place, chosen, _twice(count))
            sources, source_mask = pack(place, others, _twice(left))
            if sources.shape[1] == 0:
                return same
            found = best_match(
                gather_rows(metric, sources), gather_rows(metric, targets), a_mask=source_mask, b_mask=target_mask
            )
            order = ranked(found.score)[:, :r]
            merged = sources.gather(1, order)
            goes = torch.ones_like(merged, dtype=torch.bool)
            if r is None:
                goes = place[:, : goes.shape[1]] < self._merged_each(others)
            stays = ~torch.zeros_like(chosen).scatter(1, merged, goes)
            stays = stays if real is None else stays & real
            slot = stays.cumsum(1) - 1 + site.prefix
            into = slot.gather(1, targets.gather(1, found.index.gather(1, order)))
            rows, mask = pack(place + site.prefix, stays, None if r is None else _twice(free - r))
        representative, mask = with_protected(rows, mask, n, site.prefix, site.suffix)
        into, merged, even = torch.where(goes, into, -1), merged + site.prefix, r is not None
        step = Reduction(representative, merged, into, n, mask=mask, by_size=self.size_weighted, complete=even)
        if salient is None or not site.learned.training:
            return step
        return self._helped(site, step, salient)

    def _salient(self, site: Site, inner: slice, metric: Tensor) -> Tensor:
        """``(B, T)`` float32: the saliency of the unprotected tokens, in (-1, 1); ``metric``: what is compared."""
        module = self.its_module(site, Saliency, "by which vtm with variant='learned' decides")
        keys = metric if self.metric == "k" else read_metric(site, "k")[:, inner]
        said: Tensor = module(self.places(site.depth).index(site.layer), keys)
        return said

    def _helped(self, site: Site, step: Reduction, salient: Tensor) -> Reduction:
        """The step, with what the auxiliary attention gives the merged tokens."""
        own, n = site.attention, site.shape[1]
        bias = torch.nn.functional.pad(salient, (site.prefix, site.suffix))
        extra = auxiliary(own.q, own.k, site.v, bias, scale=own.scale, mask=site.mask)
        if extra.shape[-1] != site.x.shape[-1]:
            raise MissingInputError(
                f"variant='learned' cannot learn here: values of {extra.shape[-1]} numbers make no tokens of "
                f"{site.x.shape[-1]}"
            )
        free = torch.zeros(n, 1, dtype=extra.dtype, device=extra.device)
        free[site.prefix : n - site.suffix] = 1
        extra = step.merge(extra * free, site.sizes)
        extra = extra if self.helps == "added" else extra - extra.detach()
        return Helped(
            step.representative, step.source, step.target, n, mask=step.mask, by_size=step.by_size,
            complete=step.complete, extra=extra,
        )  # fmt: skip

    def _targets(
        self, site: Site, free: int, real: Tensor | None, salient: Tensor | None = None
    ) -> tuple[Tensor, int | None]:
        """``(B or 1, T)`` bool: which unprotected tokens are targets; how many, where that is the same for all."""
        place = torch.arange(free, device=site.device).unsqueeze(0)
        count = -(-free // self.gamma)
        if self.variant == "naive":
            chosen = place % self.gamma == 0
            return (chosen, count) if real is None else (chosen & real, None)
        if self.variant in ("motion", "learned"):
            weight = site.motion[:, site.prefix : site.prefix + free] if salient is None else salient
            weight = weight.detach().float()
            if salient is not None and site.learned.training:
                # Other draws in every step, which follow torch's generator as all else in a training does.
                weight = weight - torch.rand_like(weight).clamp_min(1e-30).log().neg().clamp_min(1e-30).log()
            elif self.sampling:
                weight = weight + gumbel(free, self.seed, site.layer, site.step, weight.device)
            if real is None:
                return largest(weight, count), count
            each = (real.sum(1, keepdim=True) + self.gamma - 1) // self.gamma
            return largest(weight.masked_fill(~real, -torch.inf), each), None
        middle, in_middle = _middle(site, free)
        inside = middle if real is None else middle & real
        outside = ~middle if real is None else ~middle & real
        number = torch.where(middle, inside.cumsum(1), outside.cumsum(1)) - 1
        near, far = self.factors
        chosen = (number % torch.where(middle, near, far) == 0) & (inside | outside)
        if in_middle is None or real is not None:
            return chosen, None
        return chosen, -(-in_middle // near) - (-(free - in_middle) // far)

    def _merged(self, sources: int) -> int:
        """How many of so many sources merge."""
        if self.R is None:
            return sources
        return kept(sources, self.R) if isinstance(self.R, float) else min(self.R, sources)

    def _merged_each(self, others: Tensor) -> Tensor:
        """The same for every sample, ``(B, 1)``, from ``(B, T)`` which tokens are sources."""
        count = others.sum(1, keepdim=True)
        if self.R is None:
            return count
        if isinstance(self.R, float):
            return (count.double() * self.R + 5e-10).floor().long()  # as ``kept`` rounds
        return count.clamp_max(self.R)


@dataclass(frozen=True, eq=False)
class Helped(Reduction):
    """A merge, and what is added to its slots while a method learns.

    Attributes:
        extra: ``(B, M, C)``; None: nothing.
    """

    extra: Tensor | None = None

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """``(B, M, C)``: the slots of tokens ``(B, N, C)``, and what is added."""
        out = super().merge(x, size, mode, slot_size=slot_size)
        return out if self.extra is None else out + self.extra.to(out.dtype)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slot_size = self.sizes(size)
        return self.merge(x, size, slot_size=slot_size), slot_size


class Saliency(nn.Module):
    """A vector for each block, whose product with a token's key says how much the task needs the token.

    Args:
        width: numbers of a key, of one head.
        blocks: how many.

    Source: Lee et al., Video Token Merging, NeurIPS 2024, section 3.4.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(blocks, width))
        nn.init.trunc_normal_(self.vectors, std=width**-0.5)

    def forward(self, block: int, keys: Tensor) -> Tensor:
        """``(B, N)`` float32 (float64 stays) in (-1, 1), of keys ``(B, N, D)``, the mean of the heads'."""
        if keys.shape[-1] != self.vectors.shape[1]:
            raise MissingInputError(
                f"variant='learned' cannot run here: keys have {keys.shape[-1]} numbers a head, not "
                f"{self.vectors.shape[1]}, the width by the heads"
            )
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        with without_autocast(keys):
            said: Tensor = (keys @ self.vectors[block].to(keys.dtype)).tanh()
            return said


def auxiliary(
    q: Tensor, k: Tensor, v: Tensor, salient: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention that sees salient keys more: ``softmax((q k + s) * scale) v``, in float32 (float64 stays).

    Args:
        q: ``(B, H, N, D)``.
        k, v: ``(B, Hk, N, D)``; each of the ``Hk`` heads serves ``H / Hk`` queries.
        salient: ``(B, N)`` the saliency ``s`` of each key, differentiable.
        scale: None: ``D ** -0.5``.
        mask: ``(B, N)`` bool, False on padding.

    Returns:
        ``(B, N, H * D)``.
    """
    dtype, count = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    if count > 1:
        k, v = k.repeat_interleave(count, 1), v.repeat_interleave(count, 1)
    with without_autocast(q):
        logits = q.to(dtype) @ k.to(dtype).mT + salient.to(dtype)[:, None, None, :]
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        return (logits.softmax(-1) @ v.to(dtype)).transpose(1, 2).flatten(2)


def gumbel(n: int, seed: int, layer: int, step: int = 0, device: torch.device | str | None = None) -> Tensor:
    """``(n,)`` float64 Gumbel noise that depends only on the arguments and the position.

    The ``k`` largest of log probabilities plus this noise are ``k`` draws without replacement.
    """
    uniform = hash_uniform(n, seed, layer, step, device) + 2.0**-33  # never 0 or 1
    return -torch.log(-torch.log(uniform))


def _middle(site: Site, free: int) -> tuple[Tensor, int | None]:
    """``(B or 1, T)`` bool: which tokens stood in the middle half of their frame; how many, before any has moved."""
    h, w = site.grid
    if not site.moved and (free % (h * w) or (site.frames or free // (h * w)) * h * w != free):
        clip = "frames" if site.frames is None else f"{site.frames} frames"
        raise MissingInputError(f"{free} tokens are not {clip} of a {h} x {w} grid")
    if site.moved:
        place = site.positions[:, site.prefix : site.prefix + free] - site.prefix
    else:
        place = torch.arange(free, device=site.device).unsqueeze(0)
    row, column = place % (h * w) // w, place % w
    top, left = (h - h // 2) // 2, (w - w // 2) // 2
    middle = (row >= top) & (row < top + h // 2) & (column >= left) & (column < left + w // 2)
    return middle, None if site.moved else free // (h * w) * (h // 2) * (w // 2)


def _twice(count: int | None) -> tuple[int, int] | None:
    return None if count is None else (count, count)
