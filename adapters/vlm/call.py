"""What is known of a forward before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokred.adapters.vlm.sites import Modality


@dataclass
class Call:
    """What is known before the language model runs.

    Attributes:
        modalities: placeholders and their features; empty for text alone.
        mask: ``(B, all)`` the caller's padding mask, or None.
        end: tokens of the prompt where drafts follow, counted from the cache's begin; None: all.
        physical: that of the rows that layer 0 holds, where it was needed outside the language model.
        outputs: what feature getters gave inside the forward, by modality.
    """

    modalities: list[Modality] = field(default_factory=list)
    mask: Tensor | None = None
    end: int | None = None
    physical: Tensor | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
