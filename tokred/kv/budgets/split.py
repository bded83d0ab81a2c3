"""Retrieval heads keep everything, streaming heads the first and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_share
from tokred.kv.parts import Budget, check_count
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Split(Budget):
    """A gate for every key/value head says whether it keeps everything.

    Heads whose gate is at or above the ``sparsity`` quantile of all gates do; the others keep sinks and newest tokens.
    Where heads of both kinds meet in a layer, its rows lie flat, unless the layout of the cache is a rectangle.

    Args:
        gates: for each compressed layer a gate for each key/value head, in [0, 1]; None: all heads retrieve.
        sparsity: share of the heads that stream.
        sinks, recent: what a streaming head keeps.

    Source: Xiao et al., DuoAttention, ICLR 2025 (arXiv 2410.10819).
    """

    name: ClassVar[str] = "split"
    headwise: ClassVar[bool] = True
    why_no_limit: ClassVar[str | None] = "its retrieval heads keep everything"

    gates: tuple[tuple[float, ...], ...] | None = None
    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        check_share(self.sparsity, "sparsity", zero=True)
        check_count(self.sinks, "sinks")
        check_count(self.recent, "recent", 1)
        if self.gates is not None:
            object.__setattr__(self, "gates", tuple(tuple(float(g) for g in row) for row in self.gates))

    @property
    def amount(self) -> float:  # type: ignore[override]
        """All rows, as long as there are no gates."""
        return 1.0

    @property
    def full(self) -> bool:
        """True if all heads retrieve."""
        return self.gates is None or self.sparsity == 0

    def check(self, depth: int) -> None:
        """One row of gates a layer."""
        if self.gates is not None and len(self.gates) != depth:
            raise ValueError(f"gates has {len(self.gates)} rows, but {depth} layers are compressed")

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """Rows of the largest head."""
        if any(self.retrieves(layer)):
            return n
        return min(n, self.sinks + self.recent)

    def retrieves(self, layer: int) -> tuple[bool, ...]:
        """For each head of a layer, whether it keeps everything."""
        if self.gates is None:
            return (True,)
        gates = torch.tensor([g for row in self.gates for g in row], dtype=torch.float64)
        border = float(torch.quantile(gates, self.sparsity))
        return tuple(g >= border for g in self.gates[layer])

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """All rows, or those of a streaming head."""
        full = self.retrieves(site.layer)
        if len(full) != site.heads:
            raise ValueError(f"gates has {len(full)} heads in layer {site.layer}, the cache has {site.heads}")
        if all(full):
            return site.lengths
        keep = torch.tensor(full, device=score.device)
        lengths = torch.tensor(site.lengths, device=score.device)[:, None]
        return torch.where(keep, lengths, lengths.clamp(max=self.sinks + self.recent))
