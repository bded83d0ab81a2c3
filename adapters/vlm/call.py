"""What is known of a forward before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokred.adapters.vlm.features import Record
from tokred.adapters.vlm.sites import Modality


@dataclass
class Call:
    """What is known before the language model runs.

    Attributes:
        modalities: placeholders and their features; empty for text alone.
        mask: ``(B, all)`` the caller's padding mask, or None.
        end: tokens of the prompt where drafts follow, counted from the cache's begin; None: all.
        physical: that of the rows that layer 0 holds, where it was needed outside the language model.
        records: of the features that getters gave inside the forward, by modality.
        towers: whether the vision tower ran inside the forward, by a getter or without.
        entered: whether the hook before the language model has run.
    """

    modalities: list[Modality] = field(default_factory=list)
    mask: Tensor | None = None
    end: int | None = None
    physical: Tensor | None = None
    records: dict[str, Record | None] = field(default_factory=dict)
    towers: bool = False
    entered: bool = False

    def add(self, visual: Tensor, record: Record | None) -> None:
        """Note the placeholders ``(B, L)`` of one modality."""
        self.modalities.append(Modality(visual, tuple(visual.sum(1).tolist()), record))

    def move(self, device: torch.device) -> None:
        """Everything to where the tokens are."""
        self.modalities = [one._replace(visual=one.visual.to(device)) for one in self.modalities]
        self.mask = None if self.mask is None else self.mask.to(device)
        self.physical = None if self.physical is None else self.physical.to(device)
