"""``Front``: the first rows of a cache, which move up behind the rows that have left: positions inside the cache.

Attention sinks stay while everything behind them goes, so that their distance from what comes grows without end, and
models read nonsense once it is more than they were trained for. Rotary embeddings know distances alone: keys of the
first rows are turned as if they stood right before the oldest of the others.

Source: Xiao et al., StreamingLLM, ICLR 2024 (arXiv 2309.17453), section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.kv.cache import TokCache, layers_of
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.rope import layer_type_of, one_turn, turned_channels
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.policy import CachePolicy
from tokred.kv.turning import turned

if TYPE_CHECKING:
    from tokred.adapters.kv.host import CacheHost

# Rows that may leave before the first ones move again, as a share of all: moving copies, and a step should not.
SLACK = 8


def why_no_front(host: CacheHost, policy: CachePolicy) -> str:
    """Why the first rows of a model's cache cannot move up; empty: they can."""
    store = policy.parts.store
    if "lead" not in store.can:
        return f"the store {store.name!r} cannot let its first rows stand elsewhere"
    if not policy.front:
        return f"{policy.name or 'the policy'!r} keeps no first rows: give sinks, or a prompt where it has them"
    if "rotation" in host.supplies and all(turned_channels(host.decoder, one) for _, one in host.blocks):
        return ""
    return f"not all keys of {host.family} are turned by the one position of their token, in two halves of channels"


def check_front(host: CacheHost, policy: CachePolicy) -> None:
    """Refuse positions inside the cache where the first rows cannot move.

    Raises:
        ValueError: with the reason.
    """
    why = why_no_front(host, policy) if policy.closes else ""
    if why:
        raise ValueError(f"positions='cache' moves the first rows of the cache: {why}")


class Front:
    """Moves the first rows of one model's caches.

    Args:
        host: of which :func:`why_no_front` says nothing.
        policy: of its caches.
    """

    def __init__(self, host: CacheHost, policy: CachePolicy) -> None:
        self.count = policy.front
        self._embedding: Any = words.ROTARY.need(host.decoder)
        self._kinds = {i: layer_type_of(self._embedding, host.attentions[i][1]) for i in host.compressed}
        self._angles: dict[tuple[str | None, torch.device], Tensor] = {}

    def follow(self, cache: TokCache) -> None:
        """Let the first rows stand right before the oldest of the others, where a token's slot tells its position.

        Each sample has a gap of its own, that of the head whose oldest row is the oldest. Nothing is done in layers
        from which few rows have left since they were last moved.
        """
        for i, layer in _ours(cache).items():
            if layer.compressed and layer.seen - layer.led >= max(1, layer.width // SLACK):
                first, least = self._ends(layer)
                gap = (least - first[:, 0, 0] - self.count).clamp(min=0)
                self._turn(i, layer, torch.where(least < 0, 0, gap))

    def oldest(self, cache: TokCache) -> int | None:
        """The smallest slot behind the first rows that some head of some layer holds a row of, in any sample; None
        where no row has left, or the first rows are not there. Waits for the device."""
        found = []
        for layer in _ours(cache).values():
            if not layer.compressed:
                return None
            found.append(self._ends(layer)[1].amin())
        # Brought together first, so that the host waits once and not for every layer.
        least = int(torch.stack([one.to(found[0].device) for one in found]).amin()) if found else -1
        return None if least < 0 else least

    def move(self, cache: TokCache, by: int) -> None:
        """Let the first rows stand ``by`` positions behind where their tokens were."""
        for i, layer in _ours(cache).items():
            self._turn(i, layer, torch.full((layer.shelf.samples,), by, device=layer.device))

    def _ends(self, layer: TokLayer) -> tuple[Tensor, Tensor]:
        """Slots ``[B, Hk, n]`` of a layer's first rows, and ``[B]`` the smallest behind them: -1 where heads have
        different first rows, or not all of them in a row, or none behind."""
        slots = layer.positions
        assert slots is not None  # rows have left
        first, others = slots[:, :, : self.count], slots[:, :, self.count :]
        if first.shape[2] < self.count or not others.shape[2]:
            return first, torch.full_like(slots[:, 0, 0], -1)
        line = first[:, :1, :1] + torch.arange(self.count, dtype=first.dtype, device=first.device)
        least = others.amin((1, 2))
        there = (first == line).flatten(1).all(1) & (least < SENTINEL)
        return first, torch.where(there, least, -1)

    def _turn(self, index: int, layer: TokLayer, by: Tensor) -> None:
        """Turn a layer's first rows by ``[B]`` positions from what they were at first, so that nothing adds up."""
        if layer.front is None:
            keys = layer.shelf.keys
            assert keys is not None  # rows have left, so that some are there
            layer.front = keys[:, :, : self.count].clone()
        first = layer.front
        steps = by.view(-1, 1).expand(-1, self.count)
        layer.shelf.lead(turned(first, steps, self._angle(self._kinds[index], first.device)).to(first.dtype))
        layer.led = layer.seen

    def _angle(self, kind: str | None, device: torch.device) -> Tensor:
        """``[R]`` float32 by which channels turn from one position to the next."""
        if (kind, device) not in self._angles:
            embedding = self._embedding
            own = next((b.device for b in embedding.buffers()), device) if isinstance(embedding, nn.Module) else device
            self._angles[kind, device] = one_turn(embedding, kind, own)[0].to(device)
        return self._angles[kind, device]


def _ours(cache: TokCache) -> dict[int, TokLayer]:
    return {i: layer for i, layer in enumerate(layers_of(cache)) if isinstance(layer, TokLayer)}
