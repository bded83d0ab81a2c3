"""The stage ``experts``: its site, the base of its methods, and its report.

A router has chosen experts for every token of a layer, and methods may drop pairs of token and expert. No token leaves
the stream: an expert runs on fewer of them, and the residual takes the others around it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.method import Method
from tokred.core.reduction import Reduction
from tokred.core.report import OneReport
from tokred.core.site import Site, Stage


class Routing(NamedTuple):
    """Experts of every token.

    Attributes:
        ids: ``(T, k)`` int64, the expert of each pair.
        kept: ``(T, k)`` bool, False on pairs that are dropped: the expert does not see the token.
    """

    ids: Tensor
    kept: Tensor


class ExpertSite(Site):
    """One layer of experts.

    Args:
        logits: ``(T, E)`` what the router says of each token, ``T = B * N``, the tokens of a sample side by side.
        ids: ``(T, k)`` int64, the experts that the host chose for each.
        samples: ``B``.
        real: ``(T,)`` bool, False on padding; None: nothing is.
        layer, depth: which layer of experts this is, of how many.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        *,
        samples: int = 1,
        real: Tensor | None = None,
        layer: int = 0,
        depth: int = 1,
    ) -> None:
        if logits.ndim != 2 or ids.ndim != 2 or ids.shape[0] != logits.shape[0]:
            raise ValueError(f"logits are (T, E) and ids (T, k), got {tuple(logits.shape)} and {tuple(ids.shape)}")
        if samples < 1 or logits.shape[0] % samples:
            raise ValueError(f"samples must divide the {logits.shape[0]} tokens, got {samples}")
        if real is not None and real.shape != logits.shape[:1]:
            raise ValueError(f"real must be ({logits.shape[0]},), got {tuple(real.shape)}")
        super().__init__(layer=layer, depth=depth)
        self.logits, self.ids, self.samples, self.real = logits, ids, samples, real

    @property
    def scores(self) -> Tensor:
        """``(T, E)`` float32: the softmax of each token's logits, through which gradients pass."""
        return torch.softmax(self.logits.float(), dim=-1)

    @property
    def experts(self) -> int:
        """``E``."""
        return self.logits.shape[1]

    @property
    def per_token(self) -> int:
        """``k``, experts that the host chose for a token."""
        return self.ids.shape[1]


class ExpertMethod(Method):
    """Base of all methods of the stage ``experts``; subclasses are frozen dataclasses that answer :meth:`route`."""

    stage: ClassVar[Stage] = "experts"
    drops: ClassVar[bool] = True

    @property
    def reads(self) -> frozenset[str]:
        """Logits and choice of the router."""
        return frozenset({"router"})

    @abstractmethod
    def route(self, site: ExpertSite) -> Routing:
        """Decide which experts each token goes to."""

    @abstractmethod
    def spares(self, per_token: int, experts: int) -> bool:
        """True if no pair can ever be dropped where ``per_token`` of ``experts`` are chosen for a token."""

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """True: whether a pair leaves depends on the model's experts and on what the routers say."""
        return True

    def reduce(self, site: Site) -> Reduction:
        """The tokens that each expert runs on, an expert taken for a sample: ``(E, T)``, the others masked.

        Raises:
            TypeError: the site is another stage's.
        """
        if not isinstance(site, ExpertSite):
            raise TypeError(f"{self.name!r} needs a tokred.core.experts.ExpertSite, got {type(site).__name__}")
        ids, kept = self.route(site)
        sent = torch.zeros(site.logits.shape, dtype=torch.uint8, device=ids.device)
        sent = sent.scatter_add(1, ids, kept.to(torch.uint8)).transpose(0, 1)
        order = sent.argsort(dim=1, descending=True, stable=True)
        return Reduction.keep(order, sent.shape[1], mask=sent.gather(1, order) > 0)


class ExpertsReport(NamedTuple):
    """One layer of experts in the last forward.

    Attributes:
        layer: among those of experts.
        name: in the model.
        tokens: that came.
        pairs: of token and expert, as the router chose.
        kept: pairs that are left.
        load: the most tokens that one expert was to run on.
        load_kept: the most that one runs on.
        without: tokens for which no expert is left.
    """

    layer: int
    name: str
    tokens: int
    pairs: int
    kept: int
    load: int
    load_kept: int
    without: int


@dataclass(frozen=True)
class RoutingReport(OneReport):
    """The last forward of a model whose experts run on fewer tokens. Its rows count pairs of token and expert."""

    stage: ClassVar[Stage] = "experts"

    layers: tuple[ExpertsReport, ...]

    @property
    def pairs(self) -> int:
        """Pairs of token and expert that the routers chose, in all layers."""
        return sum(row.pairs for row in self.layers)

    @property
    def dropped(self) -> int:
        """Those of :attr:`pairs` that were dropped."""
        return self.pairs - sum(row.kept for row in self.layers)

    @property
    def table(self) -> list[str]:
        lines = [f"{'layer':>5} {'tokens':>8} {'pairs':>16} {'largest load':>16} {'without':>8}"]
        for row in self.layers:
            pairs, load = f"{row.pairs} -> {row.kept}", f"{row.load} -> {row.load_kept}"
            lines.append(f"{row.layer:>5} {row.tokens:>8} {pairs:>16} {load:>16} {row.without:>8}")
        return lines

    @property
    def summary(self) -> str:
        return f"dropped: {self.dropped} of {self.pairs} pairs ({self.dropped / max(self.pairs, 1):.1%})"

    @property
    def own_rows(self) -> list[dict[str, Any]]:
        return [
            self.row(layer=row.layer, name=row.name, role="pairs", tokens_in=row.pairs, tokens_out=row.kept)
            for row in self.layers
        ]

    @property
    def totals(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "dropped": self.dropped, "without": sum(row.without for row in self.layers)}
