"""Caches of latents (MLA): a row is one latent and one rotated key, of which keys and values of all heads are made.

A query that is carried into the space of the latents has the same product with a row there as it has with the key that
is made of the row. So every head shares one key, and whatever scores rows by queries and keys goes on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.adapters.linear import weight_of
from tokred.kernels.dispatch import without_autocast
from tokred.kv.described import Made, Priced, like
from tokred.kv.site import CacheSite


class LatentSite(CacheSite):
    """One layer of a cache of latents: queries ``[B, H, M, R + E]``, keys ``[B, 1, K, R + E]``, of ``R`` numbers of the
    latent and ``E`` that are rotated; values ``[B, 1, K, R]`` are latents."""

    def price(self, store: Priced, *, uneven: bool = False, shapes: tuple[Tensor, ...] = ()) -> None:
        """Count rows at what a store takes for them: latents in the place of keys, rotated ones in that of values."""
        keys, latents = self._like
        rotated = like(latents, (*latents.shape[:3], keys.shape[3] - latents.shape[3]))
        super().price(store, uneven=uneven, shapes=shapes or (latents, rotated))


def makes_latents(attention: nn.Module) -> bool:
    """True for an attention that keeps latents and says how keys and values are made of them."""
    return members.EXPAND.on(attention) and words.UP.on(attention) and words.LATENTS.on(attention)


def expanded(attention: nn.Module, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, K, D]`` and values ``[B, H, K, Dv]`` of all heads.

    Args:
        attention: the module that reads them.
        latents: ``[B, 1, K, R]``.
        rotated: ``[B, 1, K, E]``.
    """
    keys, values = members.EXPAND.need(attention)(latents, rotated)
    return keys, values


def carried(attention: nn.Module, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries ``[B, H, M, D]`` in the space of the rows, ``[B, H, M, R + E]``, and of their type ``dtype``."""
    query = query.to(dtype)  # under autocast it may be another
    rank, plain = int(words.LATENTS.need(attention)), int(words.PLAIN_WIDTH.need(attention))
    heads = query.shape[1]
    up = weight_of(words.UP.need(attention), rank, query).to(query.dtype).view(heads, -1, rank)[:, :plain]  # [H, D, R]
    with without_autocast(query):
        return torch.cat([query[..., :plain] @ up, query[..., plain:]], -1)


def read(latents: Tensor | Made, rotated: Tensor | Made) -> tuple[Made, Tensor | Made]:
    """Rows as a :class:`LatentSite` has them: keys that are put together when they are asked for, and latents."""
    both = [x.like if isinstance(x, Made) else x for x in (latents, rotated)]
    shape = (*both[0].shape[:3], sum(x.shape[3] for x in both))
    return Made(like(both[0], shape), lambda: torch.cat([_made(latents), _made(rotated)], -1)), latents


def _made(rows: Tensor | Made) -> Tensor:
    make: Callable[[], Tensor] | Any = rows.make if isinstance(rows, Made) else lambda: rows
    found: Tensor = make()
    return found
