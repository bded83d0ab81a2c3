"""FrameFusion: tokens that are like those of the frame before are merged before the first layers, layer by layer; then
the last token's attention keeps as many as the cost that was asked for allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_number, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, cells_of
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_layer
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.video import apart, gathered

# State of each token's clip, by the names that it has in ``site.rows``.
_STATE, _WHOLE, _AHEAD = "framefusion", "framefusion_whole", "framefusion_ahead"
# What comes next: merging, then keeping what is attended to, then nothing.
MERGE, KEEP, DONE = 0, 1, 2


class Merged(NamedTuple):
    """One round of merging.

    Attributes:
        root: ``(n,)`` int64, the token that each one goes into, itself for those that stay.
        state: what comes next.
    """

    root: Tensor
    state: int


def excess(cost: float, depth: int, ran: int, used: float, left: float) -> float:
    """The share of the tokens that has to leave now, so that all layers together cost what was asked for.

    Args:
        cost: share of the token-layers of a run in which nothing leaves.
        depth: layers of the model.
        ran: those that have run.
        used: what they cost, in layers on all tokens.
        left: share of all tokens that is still there.
    """
    return min(1.0, max(0.0, 1 - (depth * cost - used) / ((depth - ran) * left)))


def fuse(x: Tensor, moment: Tensor, share: float, threshold: float, stop: float) -> Merged:
    """Merge tokens of one clip into the one before them at their place of the frame, where the two are alike.

    Args:
        x: ``(n, C)`` float32.
        moment: ``(n, 2)`` int64, frame and place of each.
        share: that has to leave at most; once it is reached, the most similar ones go and nothing follows.
        threshold: least cosine of tokens that merge.
        stop: where a smaller share merges, it was the last round.
    """
    n = len(x)
    frames = moment[:, 0].max() + 1
    order = (moment[:, 1] * frames + moment[:, 0]).argsort()
    u, place = directions(x[order]), moment[order, 1]
    similar = torch.full((n,), -torch.inf, device=x.device)
    similar[order[1:]] = torch.where(place[1:] == place[:-1], 1 - apart(u[1:], u[:-1]), -torch.inf)
    goes = similar >= threshold
    found = int(goes.sum())
    if found / n < share:
        state = KEEP if found / n < stop else MERGE
    else:
        state = DONE
        goes = torch.zeros_like(goes).scatter(0, highest(similar[None], int(round(share * n, 9)))[0][0], True)
    # Runs of tokens that go end up in the one before the run, which stays.
    at = torch.arange(n, device=x.device)
    head = torch.where(goes[order], -1, at).cummax(0).values
    root = torch.empty_like(order)
    root[order] = order[head]
    return Merged(root, state)


def _check(cost: float, threshold: float, stop: float) -> None:
    check_share(cost, "cost")
    check_number(threshold, "threshold")
    check_share(stop, "stop", zero=True)


@register("framefusion")
@dataclass(frozen=True)
class FrameFusion(ClipMethod):
    """FrameFusion's first round, between vision tower and language model.

    Every token of a clip that is similar enough to the one before it at the same place merges into it; a run of such
    tokens becomes the mean of all, where the first of them stood.

    The rounds that follow, inside the language model, are those of :class:`tokred.FrameFusionLayer`, which takes the
    same settings and is applied with this one.

    Args:
        cost: share of the clip's token-layers that is aimed at, in (0, 1]: where more than ``1 - cost`` of the tokens
            could merge, the most similar ones do; 1: nothing merges.
        threshold: least cosine of tokens that merge; the authors have 0.6 for LLaVA-Video, 0.5 for Qwen2-VL and
            InternVL.
        stop: where less than this share merges, merging ends, in [0, 1].

    Source: Fu et al., FrameFusion, ICCV 2025 (arXiv 2501.01986), and its released code.
    """

    summary: ClassVar[str] = "merge tokens of a video that are like those of the frame before"
    source: ClassVar[str] = "Fu et al., ICCV 2025 (arXiv 2501.01986)"
    example: ClassVar[Parameters] = {"cost": 0.5, "threshold": 0.0}
    nothing: ClassVar[Parameters | None] = {"cost": 1.0}

    cost: float = 0.3
    threshold: float = 0.6
    stop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.cost, self.threshold, self.stop)

    @property
    def reads(self) -> frozenset[str]:
        """Frames of tokens, and that what is decided about a clip travels with them."""
        return frozenset({"x", "frames", "carried"})

    def kept(self, frames: int, cells: int) -> int:
        """All: how many merge depends on the clip alone, and may be none."""
        return frames * cells

    def count(self, n: int) -> int:
        """The same."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """Unless the cost is that of a run in which nothing leaves."""
        return n > 1 and self.cost < 1

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself; what comes next is written down for each of its tokens."""
        b, n = site.shape
        place, cells = torch.arange(n, device=site.device), cells_of(site)
        moment = torch.stack([place // cells, place % cells], 1)
        share = excess(self.cost, 1, 0, 0.0, 1.0)
        found = [fuse(x, moment, share, self.threshold, self.stop) for x in site.x.detach().float()]
        states = torch.tensor([one.state for one in found], device=site.device)
        site.rows[_STATE] = states[:, None].expand(b, n)
        site.rows[_WHOLE] = torch.full((b, n), float(n), dtype=torch.float64, device=site.device)
        site.rows[_AHEAD] = torch.zeros(b, n, dtype=torch.float64, device=site.device)
        return stacked([gathered(one.root) for one in found])


@register("framefusion_layer")
@dataclass(frozen=True)
class FrameFusionLayer(LayerMethod):
    """FrameFusion inside the language model: rounds of merging before successive layers, then one of keeping.

    Before each layer, tokens of a clip that are similar enough to the one before them at the same place merge, as in
    :class:`tokred.FrameFusion`, until few do; before the layer after that, the tokens stay that the prompt's last token
    attended to, as many as the cost allows. An image is a clip of one frame, in which nothing merges.

    Args:
        layer: first layer before which tokens may leave, at least 1.
        cost: share of the token-layers of a run in which nothing leaves, in (0, 1]; 1: nothing does.
        threshold: least cosine of hidden states that merge.
        stop: where less than this share merges, merging ends, in [0, 1].

    Source: Fu et al., FrameFusion, ICCV 2025 (arXiv 2501.01986), and its released code.
    """

    summary: ClassVar[str] = "merge like tokens of successive frames layer by layer, then keep what is attended to"
    source: ClassVar[str] = "Fu et al., ICCV 2025 (arXiv 2501.01986)"
    example: ClassVar[Parameters] = {"cost": 0.7}
    nothing: ClassVar[Parameters | None] = {"cost": 1.0}

    layer: int = 1
    cost: float = 0.3
    threshold: float = 0.6
    stop: float = 0.1

    def __post_init__(self) -> None:
        check_layer(self.layer)
        _check(self.cost, self.threshold, self.stop)

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, a row of the attention of the layer before, and the state of each clip."""
        return frozenset({"x", "rows_before", "carried"})

    def check(self, depth: int) -> None:
        """The layers that run before tokens can leave must not cost more than all may.

        Raises:
            ValueError: they do; with the least cost that can be met.
        """
        least = self.layer + 1
        if depth <= least:
            raise ValueError(f"layer is {self.layer}, and a round of keeping comes later: the model has {depth} layers")
        if depth * self.cost <= least:
            raise ValueError(
                f"cost is {self.cost:g} of {depth} layers, which {least} layers on all tokens use up before any is "
                f"pruned: take more than {least / depth:.3g}, or a deeper model"
            )

    def tokens(self, n: int, place: Place) -> int:
        """As if nothing merged: all runs come to the same cost."""
        if self.cost < 1 and place.layer == self.layer + 1 < place.depth:
            return _kept(n, excess(self.cost, place.depth, place.layer, float(place.layer), 1.0))
        return n

    def acts(self, n: int, place: Place) -> bool:
        """From the first layer on, as long as some clip has a round before it."""
        return n > 0 and self.cost < 1 and place.layer >= self.layer

    def choose(self, site: LayerSite) -> Reduction:
        """Each picture by itself, whatever round it has come to."""
        b, n = site.shape
        rows = self._state(site)
        state = rows[_STATE].masked_fill(~site.visual, DONE)
        if bool((state == DONE).all()):
            return Reduction.identity((b,), n, site.device)
        root = torch.arange(n, device=site.device).repeat(b, 1)
        scores = site.row_scores(1, of="before") if bool((state == KEEP).any()) else None
        for i in range(b):
            for image in site.image[i][state[i] != DONE].unique().tolist():
                at = (site.visual[i] & (site.image[i] == image)).nonzero().squeeze(1)
                # All tokens of a picture carry the same.
                now, whole, ahead = (float(rows[name][i, at[0]]) for name in (_STATE, _WHOLE, _AHEAD))
                used = ahead + site.layer * len(at) / whole
                share = excess(self.cost, site.depth, site.layer, used, len(at) / whole)
                if int(now) == KEEP:
                    assert scores is not None
                    stays = highest(scores[i, at][None], _kept(len(at), share))[0][0]
                    root[i, at] = -1
                    root[i, at[stays]] = at[stays]
                    rows[_STATE][i, at] = DONE
                    continue
                found = fuse(site.x[i, at].float(), site.moment[i, at], share, self.threshold, self.stop)
                root[i, at] = at[found.root]
                left = int((found.root == torch.arange(len(at), device=at.device)).sum())
                rows[_STATE][i, at] = found.state
                rows[_AHEAD][i, at] = used - site.layer * left / whole
        site.rows.update(rows)
        return _merged(site, root)

    def _state(self, site: LayerSite) -> dict[str, Tensor]:
        """A copy of what is known of each token's picture; pictures that no round has seen begin here."""
        shape, new = site.visual.shape, site.visual
        found = {
            _STATE: torch.full(shape, MERGE, device=site.device),
            _WHOLE: torch.zeros(shape, dtype=torch.float64, device=site.device),
            _AHEAD: torch.zeros(shape, dtype=torch.float64, device=site.device),
        }
        if _STATE in site.rows:
            found = {name: site.rows[name].clone() for name in found}
            new = new & (found[_STATE] < 0)
        if bool(new.any()):
            for i in range(len(new)):
                for image in site.image[i][new[i]].unique().tolist():
                    mine = new[i] & (site.image[i] == image)
                    found[_STATE][i, mine] = MERGE
                    found[_WHOLE][i, mine] = float(mine.sum())
                    found[_AHEAD][i, mine] = 0.0
        return found


def _kept(n: int, share: float) -> int:
    """How many of ``n`` tokens stay where a share of them leaves, at least one."""
    return max(1, round(round(n * (1 - share), 9))) if n else 0


def _merged(site: LayerSite, root: Tensor) -> Reduction:
    """The reduction by which each column goes into another, or leaves where its root ``(B, L)`` is -1."""
    place = torch.arange(root.shape[1], device=root.device).expand_as(root)
    stays = root == place
    plan = site.keep_columns(stays)
    goes = (root >= 0) & ~stays
    if plan.trivial or not bool(goes.any()):
        return plan
    target = torch.where(goes, plan.index.gather(1, root.clamp(min=0)), -1)
    return replace(plan, source=place, target=target, mode="mean", by_size=False)
