"""OmniZip: what the encoder of sound listens to decides how much of the video of the same moment stays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest, ranked
from tokred.errors import NothingRemovedWarning
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.sound import SoundMethod, SoundSite
from tokred.vlm.tools.budget import largest_remainder
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.video import apart, gathered


@register("omnizip")
@dataclass(frozen=True)
class OmniZip(SoundMethod):
    """OmniZip, between towers and language model, on clips with sound.

    Of the sound those tokens stay that its encoder attends to most, and a few evenly spaced anchors, into which the
    nearest of the others merge that are most like what is seen. A window of time keeps the more of its video the more
    of its sound is attended to. Of every two frames of a window, the second keeps what changes most, and the rest
    merges into the first, which keeps dense and distinct tokens.

    Args:
        rho_a: share of the sound's tokens that leaves, in [0, 1).
        rho_v: share of the video's tokens that leaves, over all windows, in [0, 1).
        rho_min, rho_max: shares that leave of a window all of whose sound stays, and of one none of whose does, before
            they are scaled to ``rho_v``; alike: sound does not guide.
        anchors: share of the sound's tokens that are anchors, in [0, 1).
        merges: tokens of sound that an anchor takes at most.
        neighbours: points that density is measured with.
        temporal: what is left out of second frames is ``"merge"``d into the first ones, or ``"drop"``ped.

    Source: Tao et al., OmniZip, CVPR 2026 (arXiv 2511.14582).
    """

    summary: ClassVar[str] = "the sound that its encoder attends to says how much of each window's video stays"
    source: ClassVar[str] = "Tao et al., CVPR 2026 (arXiv 2511.14582)"
    example: ClassVar[Parameters] = {"rho_a": 0.3, "rho_v": 0.5, "neighbours": 2}
    nothing: ClassVar[Parameters | None] = {"rho_a": 0.0, "rho_v": 0.0}

    rho_a: float = 0.3
    rho_v: float = 0.6
    rho_min: float = 0.35
    rho_max: float = 0.75
    anchors: float = 0.05
    merges: int = 3
    neighbours: int = 5
    temporal: Literal["merge", "drop"] = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rho_a", "rho_v", "rho_min", "rho_max", "anchors"):
            check_ratio(getattr(self, name), name)
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min must be at most rho_max, got {self.rho_min} and {self.rho_max}")
        check_count(self.merges, "merges")
        check_count(self.neighbours, "neighbours", 1)
        check_choice(self.temporal, "temporal", ("merge", "drop"))

    def count(self, n: int) -> int:
        """At most so many, whatever of them is sound."""
        return min(n, math.ceil(n * (1 - min(self.rho_a, self.rho_v))) + 1)

    def acts(self, n: int, place: Place) -> bool:
        """Unless nothing is to leave."""
        return n > 1 and (self.rho_a > 0 or self.rho_v > 0)

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself."""
        assert isinstance(site, SoundSite)  # of its base
        sounds = bool(site.sound.any())
        if not sounds:
            warnings.warn(
                f"{self.name!r} was given a clip without sound: its windows keep equal shares of their video",
                NothingRemovedWarning,
                stacklevel=2,
            )
        heard = site.heard if sounds else torch.zeros(site.shape, device=site.device)
        return stacked([self.clip(site, *one) for one in zip(site.x.detach().float(), heard, strict=True)])

    def clip(self, site: SoundSite, x: Tensor, heard: Tensor) -> Reduction:
        """The reduction of one clip of tokens ``(N, C)``, whose sound receives ``heard`` ``(N,)``."""
        root = torch.full((len(x),), -1, device=x.device)
        windows = [(site.window == w).nonzero().squeeze(1) for w in range(int(site.window.max()) + 1)]
        sounds, videos = ([w[site.sound[w] == kind] for w in windows] for kind in (True, False))
        salient = self._sound(x, heard, root, sounds, videos)
        seen = [i for i, w in enumerate(videos) if len(w)]
        shares = [float(salient[sounds[i]].float().mean()) if len(sounds[i]) else None for i in seen]
        kept = self.budgets(shares, [len(videos[i]) for i in seen])
        for i, count in zip(seen, kept, strict=True):
            self._video(x, root, videos[i], site.moment[videos[i], 0], count)
        return gathered(root)

    # ------------------------------------------------------------------ what is heard

    def _sound(
        self, x: Tensor, heard: Tensor, root: Tensor, sounds: Sequence[Tensor], videos: Sequence[Tensor]
    ) -> Tensor:
        """``(N,)`` bool, the salient tokens; roots of all tokens of sound are set."""
        of = torch.cat(list(sounds))
        salient = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stay = math.floor((1 - self.rho_a) * len(of) + 0.5)
        some = min(stay, math.floor(self.anchors * len(of) + 0.5))
        best = of[highest(heard[of][None], stay - some)[0][0]]
        salient[best], root[best] = True, best
        others = [w[~salient[w]] for w in sounds]
        counts = largest_remainder([len(w) for w in others], some) if others else []
        for rest, seen, count in zip(others, videos, counts, strict=True):
            if count:
                self._anchors(x, root, rest, seen, count)
        return salient

    def _anchors(self, x: Tensor, root: Tensor, rest: Tensor, seen: Tensor, count: int) -> None:
        """``count`` of a window's other tokens of sound stay, and each takes some of its neighbours in."""
        u = len(rest)
        spread = torch.tensor([(2 * q + 1) * u // (2 * count) for q in range(count)], device=x.device)
        anchor = rest[spread]
        root[anchor] = anchor
        among = torch.ones(u, dtype=torch.bool, device=x.device)
        among[spread] = False
        free = among.nonzero().squeeze(1)
        if not len(free) or not self.merges:
            return
        like = torch.zeros(len(free), device=x.device)
        if len(seen):
            like = (directions(x[rest[free]]) @ directions(x[seen]).mT).amax(1)
        nearest = (free.unsqueeze(1) - spread).abs().argmin(1)
        order = ranked(like[None])[0]
        taken = torch.nn.functional.one_hot(nearest[order], count).cumsum(0).gather(1, nearest[order, None])[:, 0]
        goes = order[taken <= self.merges]
        root[rest[free[goes]]] = anchor[nearest[goes]]

    # ------------------------------------------------------------------ what is seen

    def budgets(self, shares: Sequence[float | None], tokens: Sequence[int]) -> list[int]:
        """Tokens that each window keeps of its video, at least one.

        Args:
            shares: of each window's sound that is salient; None: it has none, and counts as the mean of the others.
            tokens: of each window's video, at least one.
        """
        known = [s for s in shares if s is not None]
        mean = sum(known) / len(known) if known else 0.0
        wish = [self.rho_max - (self.rho_max - self.rho_min) * (mean if s is None else s) for s in shares]
        if not any(wish):
            wish = [1.0] * len(wish)
        exact = [n * (1 - share) for n, share in zip(tokens, self._scaled(wish, tokens), strict=True)]
        whole = [math.floor(round(e, 9)) for e in exact]
        total = max(math.floor(round((1 - self.rho_v) * sum(tokens), 9) + 0.5), len(tokens))
        order = sorted(range(len(tokens)), key=lambda i: (round(whole[i] - exact[i], 9), i))
        for i in [i for i in order if whole[i] < tokens[i]][: max(0, total - sum(whole))]:
            whole[i] += 1
        return whole

    def _scaled(self, wish: Sequence[float], tokens: Sequence[int]) -> list[float]:
        """Shares that leave, in proportion to the wishes, that come to ``rho_v`` over all; where that would leave a
        window without a token, all but one leave, and the others are scaled anew."""
        most = [1 - 1 / n for n in tokens]
        full: set[int] = set()
        while True:
            rest = self.rho_v * sum(tokens) - sum(most[i] * tokens[i] for i in full)
            open_ = [i for i in range(len(tokens)) if i not in full]
            weight = sum(wish[i] * tokens[i] for i in open_)
            factor = max(0.0, rest / weight) if weight else 0.0
            over = {i for i in open_ if factor * wish[i] > most[i]}
            if not over:
                return [most[i] if i in full else factor * wish[i] for i in range(len(tokens))]
            full |= over

    def _video(self, x: Tensor, root: Tensor, tokens: Tensor, frame: Tensor, count: int) -> None:
        """``count`` of a window's tokens of frames stay; roots of all of them are set."""
        frames = [tokens[frame == f] for f in torch.unique(frame).tolist()]
        quota = largest_remainder([1] * len(frames), count)
        into: list[tuple[Tensor, Tensor]] = []
        for before, mine, some in zip(frames[::2], frames[1::2], quota[1::2], strict=False):
            odd = apart(directions(x[mine]), directions(x[before]))
            stays = torch.zeros(len(mine), dtype=torch.bool, device=x.device)
            stays[ranked(odd[None])[0][:some]] = True
            root[mine[stays]] = mine[stays]
            into.append((mine[~stays], before[~stays]))
        values = x
        if self.temporal == "merge" and into:
            values = x.clone()
            for gone, where in into:
                values[where] = (x[where] + x[gone]) / 2
        for mine, some in zip(frames[::2], quota[::2], strict=True):
            if some:
                found = density_peaks(values[mine][None], some, min(self.neighbours, len(mine))).centre[0]
                root[mine[found]] = mine[found]
        if self.temporal == "merge":
            for gone, where in into:
                root[gone] = root[where]
