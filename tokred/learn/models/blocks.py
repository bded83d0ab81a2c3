"""Layers of the reference models: attention among tokens that know their places, SwiGLU, and a cache of such rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_count


class Rows(NamedTuple):
    """Keys and values of one layer, for tokens that need not be all of a text.

    Attributes:
        keys, values: ``(B, Hk, K, D)``, keys rotated.
        ids: ``(B, K)`` int64, the columns of the text that they stand in.
        real: ``(B, K)`` bool, False on padding.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    real: Tensor

    def behind(self, before: Rows | None) -> Rows:
        """These rows behind those that a cache had."""
        if before is None:
            return self
        keys, values = torch.cat([before.keys, self.keys], 2), torch.cat([before.values, self.values], 2)
        return Rows(keys, values, torch.cat([before.ids, self.ids], 1), torch.cat([before.real, self.real], 1))


@dataclass
class Cache:
    """Rows of every layer that runs, and what came so far. Layers may hold different numbers of rows.

    Attributes:
        rows: by layer.
        real: ``(B, K)`` bool, False on padding, of all tokens so far; None: nothing came.
    """

    rows: dict[int, Rows] = field(default_factory=dict)
    real: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far, padding counted."""
        return 0 if self.real is None else self.real.shape[1]

    def held(self, layer: int) -> int:
        """Rows of all samples together that a layer holds, without padding."""
        return int(self.rows[layer].real.sum()) if layer in self.rows else 0


class Tokens(NamedTuple):
    """Tokens that a layer runs on, some of a text.

    Attributes:
        ids: ``(B, M)`` int64, their columns in the text, ascending.
        places: ``(B, M)`` int64, their positions, which padding in front does not count in.
        real: ``(B, M)`` bool, False where a sample has fewer.
    """

    ids: Tensor
    places: Tensor
    real: Tensor

    def some(self, rows: Tensor, real: Tensor) -> Tokens:
        """Those at ``(B, M)`` rows."""
        return Tokens(self.ids.gather(1, rows), self.places.gather(1, rows), real)


@dataclass
class Answer:
    """The outcome of a reference model's forward.

    Attributes:
        logits: ``(B, N, V)``.
        losses: terms of the training loss, scalars by name, already weighed.
        depths: ``(B, N)`` int64, how many times the shared layers ran on each token; of Duo, how many layers ran big.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    depths: Tensor


def check_sizes(config: object, *others: str) -> None:
    """Refuse sizes of a configuration that no attention can have.

    Args:
        config: with ``width``, ``heads`` and ``key_heads``.
        others: names of more of its values that are counts.

    Raises:
        ValueError: naming one.
    """
    for name in ("vocabulary", "width", "heads", "key_heads", *others):
        check_count(getattr(config, name), name, 1)
    width, heads, key_heads = (getattr(config, name) for name in ("width", "heads", "key_heads"))
    if width % (2 * heads) or heads % key_heads:
        raise ValueError(
            f"heads must divide the width into even parts, and key_heads the heads, got width={width}, "
            f"heads={heads}, key_heads={key_heads}"
        )


def begin(ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tokens:
    """All tokens of ``ids``, behind those of a cache.

    Args:
        ids: ``(B, N)``.
        mask: ``(B, N)`` bool, False on padding; None: there is none.
        cache: notes them.

    Raises:
        ValueError: shapes do not fit.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids must be (B, N), got {tuple(ids.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise ValueError(f"mask must be {tuple(ids.shape)} like ids, got {tuple(real.shape)}")
    before = None if cache is None else cache.real
    if before is not None and before.shape[0] != ids.shape[0]:
        raise ValueError(f"the cache is of {before.shape[0]} samples, and ids has {ids.shape[0]}")
    whole = real if before is None else torch.cat([before, real], 1)
    if cache is not None:
        cache.real = whole
    first = whole.shape[1] - ids.shape[1]
    columns = torch.arange(first, whole.shape[1], device=ids.device).expand_as(ids)
    places = (whole.cumsum(1) - 1).clamp(min=0)[:, first:]
    return Tokens(columns, places, real)


def rotated(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """``(B, H, M, D)`` turned by the positions ``(B, M)``, halves of the channels as pairs."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = places.float()[:, None, :, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal attention over rows that know their columns.

    Args:
        width, heads, key_heads: of the model.
    """

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head = heads, key_heads, width // heads
        self.query = nn.Linear(width, heads * self.head, bias=False)
        self.key = nn.Linear(width, key_heads * self.head, bias=False)
        self.value = nn.Linear(width, key_heads * self.head, bias=False)
        self.out = nn.Linear(heads * self.head, width, bias=False)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head).transpose(1, 2)

    def rows(self, x: Tensor, tokens: Tokens) -> Rows:
        """Keys and values of ``(B, M, C)``."""
        keys = rotated(self._split(self.key(x), self.key_heads), tokens.places)
        return Rows(keys, self._split(self.value(x), self.key_heads), tokens.ids, tokens.real)

    def forward(self, x: Tensor, tokens: Tokens, rows: Rows) -> Tensor:
        """``(B, M, C)`` what each token sees of the rows that stand no later than it."""
        q = rotated(self._split(self.query(x), self.heads), tokens.places)
        groups = self.heads // self.key_heads
        k, v = rows.keys.repeat_interleave(groups, 1), rows.values.repeat_interleave(groups, 1)
        seen = (rows.ids[:, None, :] <= tokens.ids[:, :, None]) & rows.real[:, None, :]
        # a row of padding sees nothing; an equal share of everything keeps it finite, and nobody reads it
        seen = seen | ~seen.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1))
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """A gated MLP of two matrices in and one out."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention behind a norm and beside a residual, and the norm of what comes next, which a subclass has.

    Args:
        width, heads, key_heads: of the model.
    """

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, key_heads)

    def seen(
        self, x: Tensor, tokens: Tokens, at: int = 0, cache: Cache | None = None, shared: Rows | None = None
    ) -> tuple[Tensor, Rows]:
        """``(B, M, C)`` states behind the attention, and the rows that it attended to.

        Args:
            x: ``(B, M, C)``.
            tokens: which they are.
            at: number of this layer's rows in the cache.
            cache: has the rows which those of ``x`` go behind, and keeps both; None: there are none.
            shared: rows to attend to instead of any of ``x``'s own, which are not kept.
        """
        h = self.norm(x)
        rows = shared
        if rows is None:
            rows = self.attention.rows(h, tokens)
            if cache is not None:
                rows = cache.rows[at] = rows.behind(cache.rows.get(at))
        return x + self.attention(h, tokens, rows), rows


class Block(Layer):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, key_heads: int, inner: int) -> None:
        super().__init__(width, heads, key_heads)
        self.mlp = SwiGLU(width, inner)

    def forward(
        self, x: Tensor, tokens: Tokens, at: int = 0, cache: Cache | None = None, shared: Rows | None = None
    ) -> tuple[Tensor, Rows]:
        """``(B, M, C)`` states behind the block, and the rows that it attended to; see :meth:`Layer.seen`."""
        x, rows = self.seen(x, tokens, at, cache, shared)
        return x + self.mlp(self.norm_mlp(x)), rows


@torch.no_grad()
def written(
    forward: Callable[[Tensor, Tensor | None, Cache], Answer], ids: Tensor, steps: int, mask: Tensor | None
) -> Tensor:
    """``(B, N + steps)`` ids, the most probable word after the other, with a cache.

    Args:
        forward: of ids, mask and cache.
        ids: ``(B, N)`` int64.
        steps: words to write.
        mask: ``(B, N)`` bool, False on padding; None: there is none.
    """
    cache, out = Cache(), ids
    logits = forward(ids, mask, cache).logits
    for i in range(steps):
        word = logits[:, -1:].argmax(-1)
        out = torch.cat([out, word], 1)
        if i + 1 < steps:
            logits = forward(word, None, cache).logits
    return out


def started(model: nn.Module, width: float) -> None:
    """Normal weights of a standard deviation for all matrices, and no biases: at first no router leans to a side."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=width)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
