"""Observed attention: the mean attention that each row has received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite
from tokred.methods.kv.h2o import MASS, ColumnSum


@dataclass(frozen=True)
class Observed(ColumnSum):
    """The mean over the queries that can see a row, which takes away the advantage of the oldest.

    Source: NVIDIA/kvpress, ObservedAttentionPress.
    """

    name: ClassVar[str] = "observed"

    group: str = "mean"

    def __call__(self, site: CacheSite) -> Tensor:
        """The sum, divided by the number of queries from the row's own on."""
        length = torch.tensor(site.lengths, device=site.device).view(-1, 1, 1)
        return site.rows[MASS] / (length - site.token).clamp(min=1)


@register("observed_attention")
@dataclass(frozen=True)
class ObservedAttention(KVPreset):
    """Accumulated attention, divided by the number of queries that could see the row.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.

    Source: NVIDIA/kvpress, ObservedAttentionPress; a relative of H2O.
    """

    summary: ClassVar[str] = "mean attention received from the queries that see a row"
    source: ClassVar[str] = "NVIDIA/kvpress, after Zhang et al., NeurIPS 2023"

    def make_score(self) -> Score:
        return Observed()
