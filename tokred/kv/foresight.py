"""``Foresight``: small networks on what some layers' attention is given, which foretell the logits of later layers.

Each has queries and keys of its own for every later layer and query head; their products are what it foretells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.learned import Facts
from tokred.kv.turning import turned

_DROPOUT = 0.1
# Of its own rotation, whatever the model's is: positions are told apart, and nothing has to be asked of a host.
_BASE = 10000.0

Past = tuple[Tensor, Tensor]


def inner_width(width: int, heads: int, factor: float) -> int:
    """Channels of the small attention: of the multiples of ``2 * heads``, that which makes ``width`` smaller by a
    factor nearest to ``factor``; of two the smaller one."""
    step = 2 * heads
    below = max(1, math.floor(width / (factor * step)))
    return min((below * step, (below + 1) * step), key=lambda inner: (abs(width / inner - factor), inner))


def producers(depth: int, every: int) -> dict[int, tuple[int, ...]]:
    """Layers that have a network, each with the later ones that it foretells; the others of ``depth`` have none.

    Args:
        depth: layers.
        every: layers from one network to the next; 0: there is one.
    """
    step = every or max(depth, 1)
    found = {first: tuple(range(first + 1, min(first + step, depth))) for first in range(0, depth, step)}
    return {first: later for first, later in found.items() if later}


class Foretold(NamedTuple):
    """Queries and keys whose products are foretold logits, of ``n`` layers.

    Attributes:
        queries: ``[B, n, H, M, d]`` float32; None where nobody asked for them.
        keys: ``[B, n, H, M, d]`` float32.
        past: keys and values ``[B, H, M, m / H]`` of the small attention, which later tokens attend to.
    """

    queries: Tensor | None
    keys: Tensor
    past: Past


class Network(nn.Module):
    """One network, for the layers behind that whose input it reads.

    Args:
        width: channels ``C`` of the input.
        heads: query heads ``H`` of a layer.
        layers: how many are foretold.
        inner: channels ``m`` of the small attention.
        size: channels ``d`` of a foretold query or key.
        hidden: channels inside of what makes them.
    """

    def __init__(self, width: int, heads: int, layers: int, *, inner: int, size: int, hidden: int) -> None:
        super().__init__()
        self.width, self.heads, self.layers, self.size = width, heads, layers, size
        self.narrow = nn.Linear(width, inner, bias=False)
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(inner)
        self.up, self.down = nn.Linear(inner, 2 * inner), nn.Linear(2 * inner, width)
        self.dropout = nn.Dropout(_DROPOUT)
        self.queries, self.keys = (
            nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, layers * heads * size, bias=False)
            )
            for _ in range(2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, positions: Tensor, past: Past | None = None, real: Tensor | None = None, *, ask: bool = True
    ) -> Foretold:
        """Foretell from ``x`` ``[B, M, C]``.

        Args:
            x: of the newest tokens.
            positions: ``[B or 1, M]`` int64, how many tokens stand before each.
            past: of :attr:`Foretold.past`, of all tokens before.
            real: ``[B, K]`` bool of all ``K`` tokens so far, False on padding; None: all are real.
            ask: whether queries are wanted too.

        Raises:
            ValueError: the input is of another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"the network takes {self.width} channels, and the attention is given {x.shape[-1]}")
        x = x.float()
        narrow = self.narrow(x)
        q, k, v = (made(narrow).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for made in (self.q, self.k, self.v))
        q, k = (turned(t, positions, _angle(t.shape[-1], x.device)) for t in (q, k))
        new = k, v
        if past is not None:
            k, v = (torch.cat([old, t], 2) for old, t in zip(past, (k, v), strict=True))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(q.shape[2], k.shape[2], real, x.device))
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        rich = x + self.dropout(self.down(F.gelu(self.up(mixed))))
        asked = self._of_layers(self.queries(rich), positions) if ask else None
        return Foretold(asked, self._of_layers(self.keys(rich), positions), new)

    def _of_layers(self, made: Tensor, positions: Tensor) -> Tensor:
        """``[B, n, H, M, d]`` turned to their positions, of ``[B, M, n * H * d]``."""
        parts = made.view(*made.shape[:2], self.layers * self.heads, self.size).transpose(1, 2)
        found = turned(parts, positions, _angle(self.size, made.device))
        return found.view(len(found), self.layers, self.heads, *found.shape[2:])


class Foresight(nn.Module):
    """Networks of a model, by the layer whose input they read.

    They stay in float32 whatever type the model has: of two rows whose foretold logits are near, which is larger must
    not depend on it.

    Args:
        facts: of the model.
        every: layers from one network to the next; 0: there is one.
        factor: by which the small attention is narrower than the model.
        size, hidden: as :class:`Network` has them.
    """

    def __init__(self, facts: Facts, *, every: int, factor: float, size: int, hidden: int) -> None:
        super().__init__()
        inner = inner_width(facts.width, facts.heads, factor)
        self.later = producers(facts.depth, every)
        self.networks = nn.ModuleDict(
            {
                str(first): Network(facts.width, facts.heads, len(later), inner=inner, size=size, hidden=hidden)
                for first, later in self.later.items()
            }
        )

    @property
    def count(self) -> int:
        """Layers that are foretold, by all networks."""
        return sum(map(len, self.later.values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Goes where the model goes, and stays in float32.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]


def _angle(size: int, device: torch.device) -> Tensor:
    """``[size / 2]`` by which pairs of channels turn from one position to the next."""
    half = size // 2
    return _BASE ** -(torch.arange(half, dtype=torch.float64, device=device) / half)


def _seen(new: int, total: int, real: Tensor | None, device: torch.device) -> Tensor | None:
    """``[B or 1, 1, M, K]`` bool, which tokens each of the newest ``new`` sees; None: all."""
    if new == 1 and real is None:
        return None
    at = torch.arange(total, device=device)
    own = at[total - new :, None]
    seen = (at <= own)[None, None]
    if real is None:
        return seen
    # Padding sees itself: a softmax over nothing is NaN.
    return (seen & real[:, None, None]) | (at == own)


class _Distance(torch.autograd.Function):
    """Sum of squared differences of two lots of products over causal pairs, tile by tile; see :func:`distance`."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, own_keys: Tensor, q: Tensor, k: Tensor, real: Tensor | None, tile: int
    ) -> Tensor:
        ctx.save_for_backward(own, own_keys, q, k)
        ctx.real, ctx.tile = real, tile
        total = torch.zeros((), dtype=torch.float64, device=own.device)
        for _, _, apart in _tiles(own, own_keys, q, k, real, tile):
            total += apart.square().sum(dtype=torch.float64)
        return total.to(own.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        own, own_keys, q, k = ctx.saved_tensors
        d_own, d_keys = torch.zeros_like(own), torch.zeros_like(own_keys)
        for rows, stop, apart in _tiles(own, own_keys, q, k, ctx.real, ctx.tile):
            d_own[:, :, rows] = apart @ own_keys[:, :, :stop]
            d_keys[:, :, :stop] += apart.mT @ own[:, :, rows]
        return 2 * grads[0] * d_own, 2 * grads[0] * d_keys, None, None, None, None


def _tiles(own: Tensor, own_keys: Tensor, q: Tensor, k: Tensor, real: Tensor | None, tile: int) -> Any:
    """Yields rows of queries, how many keys they see, and ``[B, H, rows, keys]`` differences, zero ahead of them."""
    m, n, groups = own.shape[2], own_keys.shape[2], q.shape[1] // k.shape[1]
    for start in range(0, m, tile):
        rows = slice(start, min(start + tile, m))
        stop = n - m + rows.stop
        asked = q[:, :, rows].reshape(*k.shape[:2], groups, -1, q.shape[3])
        part = asked @ k[:, :, None, :stop].mT
        apart = own[:, :, rows] @ own_keys[:, :, :stop].mT - part.flatten(1, 2)
        at = torch.arange(stop, device=own.device)
        hidden = (at > at[n - m + start :, None])[None, None]
        if real is not None:
            hidden = hidden | ~(real[:, None, None, :stop] & real[:, None, n - m + start : stop, None])
        yield rows, stop, apart.masked_fill(hidden, 0.0)


def distance(
    own: Tensor, own_keys: Tensor, q: Tensor, k: Tensor, real: Tensor | None = None, *, tile: int = 256
) -> Tensor:
    """Mean squared difference of foretold logits from true ones, over heads and causal pairs; a scalar in float32.

    No matrix of all pairs is ever held: the pass back makes the tiles anew. Gradients reach ``own`` and ``own_keys``.

    Args:
        own, own_keys: ``[B, H, M, d]`` and ``[B, H, N, d]``, whose products are foretold logits.
        q: ``[B, H, M, D]`` queries of the newest ``M`` of ``N`` tokens, times the scale of the attention.
        k: ``[B, Hk, N, D]`` keys.
        real: ``[B, N]`` bool, False on padding, whose pairs do not count; None: all count.
        tile: queries at a time.
    """
    m, n = own.shape[2], own_keys.shape[2]
    total: Tensor = _Distance.apply(own, own_keys, q.float(), k.float(), real, tile)
    if real is None:
        return total / (own.shape[0] * own.shape[1] * (m * (m + 1) // 2 + m * (n - m)))
    before = real.long().cumsum(1)[:, n - m :]
    pairs = (before * real[:, n - m :]).sum() * own.shape[1]
    return total / pairs.clamp(min=1)
