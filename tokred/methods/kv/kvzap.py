"""KVzap: a small network foretells what KVzip+ would find, and rows under a threshold go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice
from tokred.core.learned import Facts, InFloat32
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Threshold
from tokred.kv.parts import Budget, Score, When, check_count
from tokred.kv.preset import Preset
from tokred.kv.repeat import REPEATED, Repeats
from tokred.kv.site import CacheSite

FORETOLD = "foretold"
KINDS = ("mlp", "linear")
# The logarithm of a weight that half precision has rounded to nought would be minus infinity.
_LEAST = 1e-12


class Surrogate(InFloat32):
    """For every layer a network from what its attention is given to the logarithm of a score.

    Its weights are float32 whatever type the model has: a rounding of the input moves fewer rows across the threshold
    than one of the result.

    Args:
        depth: layers.
        width: channels ``C`` of the input.
        heads: key/value heads.
        hidden: channels between two linear maps; 0: one linear map.
    """

    def __init__(self, depth: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        made = []
        for _ in range(depth):
            two = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, heads)) if hidden else None
            made.append(nn.Linear(width, heads) if two is None else two)
        self.layers = nn.ModuleList(made)

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """``[B, Hk, M]`` float32, of ``x`` ``[B, M, C]``."""
        found: Tensor = self.layers[layer](x.float())
        return found.mT


@dataclass(frozen=True)
class Foretold(Score):
    """The logarithm of a row's KVzip+ score, foretold from what its attention was given, once and for good.

    While its module is in training the prompt is repeated as KVzip does, and the distance from what that finds is left
    as a loss.

    Args:
        network: "mlp" or "linear".
        hidden: channels inside, for "mlp".
        sinks: first tokens, which training leaves out.
        chunk: tokens that one forward repeats in training; a text within it is judged by attention to all of it.

    Source: Jegou and Jeblick, KVzap, arXiv 2601.07891; in float32, and targets of at least 1e-12 (ours).
    """

    name: ClassVar[str] = "foretold"
    reads: ClassVar[frozenset[str]] = frozenset({"hidden", "module"})
    accumulates: ClassVar[bool] = True
    numbers: ClassVar[int] = 1

    network: str = "mlp"
    hidden: int = 512
    sinks: int = 4
    chunk: int = 2048

    def __post_init__(self) -> None:
        check_choice(self.network, "network", KINDS)
        check_count(self.hidden, "hidden", 1)
        check_count(self.sinks, "sinks")
        check_count(self.chunk, "chunk", 1)

    @property
    def lessons(self) -> Repeats:
        return Repeats(self.chunk, self.sinks, plus=True)

    @property
    def needs(self) -> frozenset[str]:
        """Input and module; lessons are about attention, values and their projection."""
        return self.reads | {"q", "k", "v", "projection"}

    def module(self, facts: Facts) -> Surrogate:
        """A new network, the same for the same sizes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = self.hidden if self.network == "mlp" else 0
            return Surrogate(facts.depth, facts.width, facts.key_heads or facts.heads, hidden)

    def observe(self, site: CacheSite) -> None:
        """Score the rows of this forward."""
        with torch.no_grad():
            new = self._network(site)(site.layer, site.hidden)
        known = site.rows.get(FORETOLD)
        if known is None:
            site.rows[FORETOLD] = new
        else:
            site.rows[FORETOLD] = torch.cat([known[..., : known.shape[2] - new.shape[2]], new], 2)

    def __call__(self, site: CacheSite) -> Tensor:
        """The scores that rows were given when they came."""
        if site.learned.training and REPEATED in site.rows:
            site.learned.losses["distance"] = self._distance(site, site.rows[REPEATED])
        return site.rows[FORETOLD]

    def _distance(self, site: CacheSite, target: Tensor) -> Tensor:
        """Mean squared distance of what is foretold from the logarithm of ``target`` ``[B, Hk, K]``."""
        new = site.hidden.shape[1]
        target = target[..., -new:].detach().float()
        meant = target.isfinite()
        if site.real is not None:
            meant = meant & site.real[..., -new:]
        with torch.enable_grad():
            found: Tensor = self._network(site)(site.layer, site.hidden.detach())
            apart = (found - target.clamp(min=_LEAST).log()).masked_fill(~meant, 0.0)
            distance: Tensor = apart.square().sum() / meant.sum().clamp(min=1) / site.depth
            return distance

    def _network(self, site: CacheSite) -> nn.Module:
        """The module.

        Raises:
            ValueError: it is of another number of layers than the policy acts on.
        """
        found = site.learned.module
        assert isinstance(found, Surrogate)  # the host supplies what is read
        if len(found.layers) != site.depth:
            raise ValueError(
                f"the network has {len(found.layers)} layers, and the policy acts on {site.depth}: apply it "
                "without where="
            )
        return found


@register("kvzap")
@dataclass(frozen=True)
class KVzap(Preset):
    """Each row is scored when it comes, by a network that is trained once a model, and goes if that is too low.

    How many rows stay, the text decides. Without training the scores are noise: train first, or apply what
    ``tokred.load`` gives.

    Args:
        tau: threshold on the logarithm of the score.
        recent: newest tokens, which are not judged yet.
        sinks: first tokens, which never are.
        every: generated tokens between judgements, which changes only how soon rows go; 0: the prompt alone is judged.
        turns: also at the end of later turns, or of each chunk of a prompt.
        least, most: bounds of a head's rows, see :class:`tokred.kv.Threshold`.
        network: "mlp" or "linear".
        hidden: its channels inside, for "mlp".

    Source: Jegou and Jeblick, KVzap, arXiv 2601.07891, sections 3 and 4.
    """

    summary: ClassVar[str] = "rows whose foretold score passes a threshold"
    source: ClassVar[str] = "Jegou and Jeblick, 2026 (arXiv 2601.07891)"
    example: ClassVar[Parameters] = {"tau": 0.0, "recent": 4, "sinks": 1, "every": 2, "hidden": 8}
    nothing: ClassVar[Parameters | None] = {"tau": -math.inf}

    tau: float = -4.0
    recent: int = 128
    sinks: int = 4
    every: int = 32
    turns: bool = True
    least: int = 1
    most: int | str | None = None
    network: str = "mlp"
    hidden: int = 512

    def make_score(self) -> Score:
        return Foretold(self.network, self.hidden, self.sinks)

    def make_budget(self) -> Budget:
        return Threshold(self.tau, self.least, self.most)

    def make_when(self) -> When:
        return When(every=self.every, turns=self.turns)
