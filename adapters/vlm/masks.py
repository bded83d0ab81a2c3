"""Masks of decoder layers that hold other columns than the first layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.adapters.vlm.pack import gather_mask
from tokred.adapters.vlm.track import own_sizes


class MaskMaker:
    """Makes the mask of a group of layers in one forward.

    Args:
        config: of the language model.
        rows: ``(B, q)`` which columns of this forward are left; None: all.
        columns: ``(B, k)`` which of layer 0's rows these layers hold; their newest ones are ``rows``.
        valid: ``(B, k)`` bool, False on filler and padding; None: all real.
        total: rows of layer 0 that ``columns`` are among.
    """

    def __init__(self, config: Any, rows: Tensor | None, columns: Tensor, valid: Tensor | None, total: int) -> None:
        self.config = config
        self.rows = rows
        self.columns = columns
        self.valid = valid
        self.total = total
        self._made: dict[Any, Any] = {}

    def __call__(self, mask: Any, x: Tensor, cache: Any, layer: int, sliding: bool) -> Any:
        """The mask for ``layer``, whose stock mask is ``mask`` and whose input ``x`` has ``q`` tokens."""
        key = (id(mask), sliding)
        if key not in self._made:
            # The mask is held so that its id stays its own.
            self._made[key] = (mask, self._make(mask, x, cache, layer, sliding))
        return self._made[key][1]

    def _make(self, mask: Any, x: Tensor, cache: Any, layer: int, sliding: bool) -> Any:
        if mask is None and self.valid is None:
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return self.valid  # flash attention reads padding alone
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == self.total:
            return self._gathered(mask, x)
        return self._built(x, cache, layer, sliding)

    def _gathered(self, mask: Tensor, x: Tensor) -> Tensor:
        b, q = x.shape[:2]
        rows = self.rows
        if rows is None:
            rows = torch.arange(q, device=x.device).expand(b, -1)
        valid = self.valid
        if valid is None:
            valid = torch.ones_like(self.columns, dtype=torch.bool)
        return gather_mask(mask, rows, self.columns, valid)

    def _built(self, x: Tensor, cache: Any, layer: int, sliding: bool) -> Any:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        make = create_sliding_window_causal_mask if sliding else create_causal_mask
        with own_sizes():
            return make(
                config=self.config,
                inputs_embeds=x,
                attention_mask=self.valid,
                past_key_values=cache,
                layer_idx=layer,
            )
