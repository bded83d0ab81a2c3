"""``Turns``: keys of stored rows move to other positions, by the tables of the model's own rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.kv.host import CacheHost
from tokred.adapters.kv.reuse.layers import devices
from tokred.adapters.kv.rope import layer_type_of, tables, turned_channels
from tokred.errors import UnsupportedModelError
from tokred.kv.blend import between, turned


class Turns:
    """Moves keys of any layer between two lists of positions below ``total``.

    Args:
        host: of the model.
        total: positions that the tables are of.
    """

    def __init__(self, host: CacheHost, total: int) -> None:
        self.embedding, self.total = words.ROTARY.part(host.decoder), total
        attentions = [attention for _, attention in host.attentions.values()]
        known = isinstance(self.embedding, nn.Module)
        self.kinds = [layer_type_of(self.embedding, attention) if known else None for attention in attentions]
        self.devices = devices(host)
        self._turns: dict[Any, Any] = {}

    def moved(self, layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Keys ``[B, Hk, n, D]`` of a layer, turned from positions ``old`` ``[n]`` int64 to ``new``.

        The turns are remembered for the layers that are alike: give the same positions every time.
        """
        if torch.equal(old, new):
            return keys
        key = kind, device = self.kinds[layer], self.devices[layer]
        if key not in self._turns:
            own = next((b.device for b in self.embedding.buffers()), device)
            cos, sin = tables(self.embedding, kind, torch.arange(self.total, device=own))
            (c0, s0), (c1, s1) = ((cos[at.to(own)], sin[at.to(own)]) for at in (old, new))
            self._turns[key] = tuple(t.to(device) for t in between((c0, s0), (c1, s1)))
        return turned(keys, self._turns[key])


def check_turns(host: CacheHost) -> None:
    """Refuse a model whose keys cannot be moved.

    Raises:
        UnsupportedModelError: naming the first such layer.
    """
    for where, attention in host.attentions.values():
        width = int(words.HEAD_WIDTH.part(attention) or 0)
        turned = turned_channels(host.decoder, attention) if "rotation" in host.supplies else 0
        if not 0 < turned <= width:
            raise refusal(host, f"keys of {where} cannot be moved to other positions by turning channels in halves")


def refusal(host: CacheHost, why: str) -> UnsupportedModelError:
    """An error that says why chunks of a model cannot be joined."""
    return UnsupportedModelError(f"chunks of {host.family} cannot be joined: {why}")
