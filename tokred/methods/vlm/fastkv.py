"""FastKV: later layers run on the prompt's critical tokens alone, and every layer's cache is compressed besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept
from tokred.kv.parts import Budget, check_count
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.pooling import check_pool, pooled_columns
from tokred.kv.site import Place as CachePlace
from tokred.methods.kv.snapkv import Window
from tokred.vlm.in_llm import LayerMethod, LayerSite

Mode = Literal["constant", "proportional"]
Pooling = Literal["max", "avg"]


@register("fastkv")
@dataclass(frozen=True)
class FastKV(CachePolicy):
    """Token-selective propagation at one layer, and a window's scores for the cache of every layer.

    Acts at two stages: applied, it becomes a method of the stage ``layer`` and a policy of the stage ``cache``
    (:attr:`members`). Decoding is left alone; positions stay what they were. After a prompt only the tokens that were
    propagated have a last hidden state, so that logits come for these alone.

    Args:
        window: newest tokens of the prompt that choose, and that stay everywhere.
        pool: width of the pooling, odd.
        pooling: "max" or "avg".
        mode: "constant": ``cap`` and ``tsp_len`` count; "proportional": ``retain`` and ``tsp_rate``.
        cap: tokens that every layer and head stores.
        retain: share of the prompt that every layer stores; later layers store as many.
        tsp_len: tokens that go on after ``tsp_layer``.
        tsp_rate: share of the prompt that goes on.
        tsp_layer: the last layer that runs on the whole prompt, 0-based; None: ``round(0.47 * depth)`` (ours, see
            :func:`tokred.choose_tsp_layer`; 15 of 32 layers as published); -1: the cache alone is compressed.

    Source: Jo et al., FastKV, arXiv 2502.01068, third version, sections 3 and 4, and its released code.
    """

    summary: ClassVar[str] = "later layers run on the prompt's critical tokens; every layer's cache compressed besides"
    source: ClassVar[str] = "Jo et al., 2025 (arXiv 2502.01068)"
    example: ClassVar[Parameters] = {"window": 4, "cap": 12, "tsp_len": 20, "tsp_layer": 1}
    nothing: ClassVar[Parameters | None] = None

    window: int = 8
    pool: int = 7
    pooling: Pooling = "max"
    mode: Mode = "constant"
    cap: int = 512
    retain: float = 0.1
    tsp_len: int = 2048
    tsp_rate: float = 0.2
    tsp_layer: int | None = None

    def __post_init__(self) -> None:
        check_count(self.window, "window", 1)
        check_pool(self.pool, self.pooling)
        check_choice(self.pooling, "pooling", ("max", "avg"))
        check_choice(self.mode, "mode", ("constant", "proportional"))
        for name in ("retain", "tsp_rate"):
            check_share(getattr(self, name), name)
        for name in ("cap", "tsp_len"):
            check_count(getattr(self, name), name, 1)
            if getattr(self, name) <= self.window:
                raise ValueError(f"{name} must hold more than the window's {self.window}, got {getattr(self, name)}")
        layer = self.tsp_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < -1):
            raise ValueError(f"tsp_layer must be a layer's number, -1 (off) or None, got {layer!r}")

    @property
    def members(self) -> tuple[Any, ...]:
        """The propagation, unless it is off, and the policy."""
        cache = FastKVCache(self)
        return (cache,) if self.tsp_layer == -1 else (FastKVPropagation(self), cache)

    @property
    def parts(self) -> Parts:
        """Parts of the policy for caches."""
        return Parts(Window(self.window, self.pool, self.pooling, "sum"), Stored(self))

    def propagated(self, n: int) -> int:
        """Tokens of a prompt of ``n`` that go on after ``tsp_layer``."""
        count = self.tsp_len if self.mode == "constant" else max(kept(n, self.tsp_rate), self.window + 1)
        return min(n, count)

    def stored(self, n: int, *, late: bool) -> int:
        """Tokens that a layer stores of the ``n`` that it ran on; ``late``: after the propagation."""
        if self.mode == "constant":
            return min(n, self.cap)
        share = min(1.0, self.retain / self.tsp_rate) if late else self.retain
        return min(n, max(kept(n, share), self.window + 1))

    def last_whole(self, depth: int) -> int:
        """The last of ``depth`` layers that runs on the whole prompt."""
        if self.tsp_layer is None:
            return min(round(0.47 * depth), depth - 2)
        return depth if self.tsp_layer == -1 else self.tsp_layer


@dataclass(frozen=True)
class Stored(Budget):
    """Rows that FastKV stores in early and late layers."""

    method: FastKV
    amount: float | int | str = 1

    @property
    def full(self) -> bool:
        """True if every row is kept."""
        return self.method.mode == "proportional" and self.method.retain == 1

    @property
    def shares(self) -> bool:
        return self.method.mode == "proportional"

    @property
    def tokens(self) -> int | None:
        """The cap, where there is one."""
        return self.method.cap if self.method.mode == "constant" else None

    def mean(self, n: int, place: CachePlace | None, depth: int) -> int:
        return self.method.stored(n, late=False)

    def share(self, n: int, place: CachePlace | None, layer: int, depth: int) -> int:
        """Rows that one layer stores of the ``n`` tokens that came to it."""
        return self.method.stored(n, late=layer > self.method.last_whole(depth))


@dataclass(frozen=True)
class FastKVCache(CachePolicy):
    """FastKV's policy for caches; made by :class:`FastKV`."""

    name: ClassVar[str] = "fastkv"

    method: FastKV

    @property
    def parts(self) -> Parts:
        """The window's scores and the rows of each layer."""
        return self.method.parts


@dataclass(frozen=True)
class FastKVPropagation(LayerMethod):
    """FastKV's propagation between two layers; made by :class:`FastKV`."""

    name: ClassVar[str] = "fastkv"
    visual: ClassVar[bool] = False

    method: FastKV

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and rows of the attention of the layer before."""
        return frozenset({"x", "rows_before"})

    def check(self, depth: int) -> None:
        """There must be a layer after the propagation.

        Raises:
            ValueError: there is none.
        """
        layer = self.method.last_whole(depth)
        if not 0 <= layer < depth - 1:
            raise ValueError(
                f"tsp_layer is {layer}, but of the model's {depth} layers only 0 to {depth - 2} have one after them"
            )

    def tokens(self, n: int, place: Place) -> int:
        """The propagated tokens, at the layer after ``tsp_layer``; all of them elsewhere."""
        return self.method.propagated(n) if place.layer == self.method.last_whole(place.depth) + 1 else n

    def choose(self, site: LayerSite) -> Reduction:
        """One list for all heads: the best by pooled attention of the window, and the window."""
        method = self.method
        count = site.end
        drafts = torch.arange(site.shape[1], device=site.device) >= count
        newest = (site.newest < method.window) | drafts
        scores = site.row_scores(min(method.window, count), of="before", heads="none")
        real = torch.ones_like(newest) if site.mask is None else site.mask
        totals = propagation_scores(scores.masked_fill((newest | ~real).unsqueeze(1), 0.0), method.pool, method.pooling)
        later = site.shape[1] - count
        most = tuple(max(0, method.propagated(n - later) - method.window) for n in site.real)
        chosen = site.best(totals, real & ~newest, most)
        lost = tuple(site.shape[1] - min(n, m + method.window + later) for n, m in zip(site.real, most, strict=True))
        return site.keep_columns(chosen | (newest & real), lost)


def propagation_scores(received: Tensor, pool: int, pooling: str) -> Tensor:
    """``(B, N)``: attention ``(B, H, N)`` of the window, pooled head by head, summed over all heads."""
    return pooled_columns(received, pool, pooling).sum(1)
