"""ToFu: ToMe's matching; prune the sources in early blocks, merge them in late ones, keeping the length of vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_flags
from tokred.core.matching import bipartite_soft_matching
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import schedule
from tokred.core.site import Site
from tokred.encoder.method import Compared, Scheduled
from tokred.encoder.metric import Metric, read_metric
from tokred.encoder.padding import reduce_each


@register("tofu")
@dataclass(frozen=True)
class ToFu(Compared, Scheduled):
    """Token Fusion.

    An average of inputs is only safe where the layer that takes it is close to linear, and early MLPs are not. So early
    blocks drop the sources of the ``r`` most similar pairs and leave their destinations as they are; later ones merge,
    giving the mean the length of the longest member, which a plain mean shortens. Dropped sources keep their place in
    the map: at full length they take the features of their destination.

    There is no code by the authors; what a formula leaves open follows :class:`tokred.ToMe`, whose matching it is.

    Args:
        r: tokens removed per block: an integer, a pair ``(r, inflect)``, or a list with one entry a block. Capped at
            half of the unprotected tokens of a block.
        switch: the first block that merges, 0-based; 0 merges everywhere, the depth of the model prunes everywhere.
            None: half of the depth (6 of 12).
        mode: how late blocks merge: ``"mlerp"`` (the direction of the mean, the length of the longest member) or
            ``"mean"``.
        by_size: sizes weigh the members of a mean (ours); the authors' is the plain mean.
        inherit: a destination takes over the size of the sources that are pruned for it (ours), so that sizes add up
            to the original tokens; of use with ``prop_attn`` or ``by_size``, which read them.
        prop_attn: proportional attention (ours; off, since the method as published keeps no sizes).
        metric: what is compared.

    Source: Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024, section 3.
    """

    summary: ClassVar[str] = "prune early, merge late with the length of vectors kept, on ToMe's matching"
    source: ClassVar[str] = "Kim et al., WACV 2024 (arXiv 2312.01026)"

    switch: int | None = None
    mode: Literal["mlerp", "mean"] = "mlerp"
    by_size: bool = False
    inherit: bool = False
    prop_attn: bool = False
    metric: Metric = "k"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(by_size=self.by_size, inherit=self.inherit)
        whole = isinstance(self.switch, int) and not isinstance(self.switch, bool)
        if self.switch is not None and not (whole and self.switch >= 0):
            raise ValueError(f"switch must be a non-negative integer or None, got {self.switch!r}")
        check_choice(self.mode, "mode", ("mlerp", "mean"))

    def check(self, depth: int) -> None:
        """A list may not be longer than the model is deep, nor the switch lie behind its end."""
        schedule(self.r).check(depth)
        if self.switch is not None and self.switch > depth:
            raise ValueError(f"switch is {self.switch}, but the model has {depth} blocks")

    def reduce(self, site: Site) -> Reduction:
        """ToMe's pairs; what becomes of the sources depends on the depth."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        plan = bipartite_soft_matching(
            read_metric(site, self.metric),
            schedule(self.r).at(site.layer, site.depth),
            prefix=site.prefix,
            suffix=site.suffix,
        )
        if plan.trivial:
            return plan
        switch = site.depth // 2 if self.switch is None else self.switch
        if site.layer < switch:
            plan = replace(plan, mode="keep", inherit=self.inherit)
        else:
            plan = replace(plan, mode=self.mode, by_size=self.by_size)
        return plan


def linearity(function: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, points: int = 16) -> Tensor:
    """Straightness of a function's way between two inputs: distance of the outputs over the length of the path.

    ``|f(x1) - f(x2)| / sum_i |f(t[i + 1]) - f(t[i])|`` over points ``t`` evenly from ``x1`` to ``x2``. One where the
    function is linear between them (also where it is constant), less the more the path bends. Averaging the inputs of a
    layer, such as the MLP of a block with its norm, is safe where it is near one.

    Args:
        function: maps rows to rows, such as ``lambda x: block.mlp(block.norm2(x))``.
        first, second: ``(..., C)``, pairs of inputs, any float type.
        points: on the path, both ends included; at least 3 (two would always give one).

    Returns:
        ``(...)`` float32, one per pair.

    Raises:
        ValueError: the inputs differ in shape, or there are fewer than 3 points.

    Source: Kim et al., Token Fusion, WACV 2024, section 3.
    """
    if first.shape != second.shape:
        raise ValueError(f"first and second must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    if points < 3:
        raise ValueError(f"points must be at least 3, got {points}")
    with torch.no_grad():
        start = before = function(first).float()
        path = torch.zeros(start.shape[:-1], device=start.device)
        for i in range(1, points):
            after = function(torch.lerp(first, second, i / (points - 1))).float()
            path = path + (after - before).norm(dim=-1)
            before = after
        straight = (before - start).norm(dim=-1)
        # Rounding may make a straight path longer or shorter than its ends are apart, never more than it is.
        return torch.where(path > 0, straight / path.clamp_min(torch.finfo(path.dtype).tiny), 1.0).clamp(max=1)


def choose_switch(linearities: Sequence[float], threshold: float) -> int:
    """The first block whose mean linearity lies above a threshold: where merging becomes safe (ours).

    Args:
        linearities: one mean of :func:`linearity` per block, first to last.
        threshold: in [0, 1].

    Returns:
        What to give as ``switch``; the number of blocks where none lies above.

    Raises:
        ValueError: ``threshold`` lies outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold!r}")
    return next((i for i, value in enumerate(linearities) if value > threshold), len(linearities))
