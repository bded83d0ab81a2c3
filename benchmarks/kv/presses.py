"""Presses of NVIDIA/kvpress and the policies that they are compared with, on what the attention of a layer had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from tokred import kv
from tokred.adapters.kv.rope import LayerRope

SINKS = 4


class Layer(NamedTuple):
    """What one layer's attention had.

    Attributes:
        module: the attention.
        hidden: ``[1, N, C]`` its input.
        q, k, v: ``[1, H or Hk, N, D]`` after rotation.
        tables: cosines and sines ``[1, N, D]``.
        index, depth: which layer, of how many.
    """

    module: Any
    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    tables: tuple[Tensor, Tensor]
    index: int
    depth: int

    def site(self) -> kv.CacheSite:
        """As tokred sees it."""
        projection = self.module.o_proj
        rope = LayerRope(self.module.rotary_emb, None, self.tables)
        return kv.CacheSite(
            q=self.q, k=self.k, v=self.v, scale=self.module.scaling, projection=lambda: projection.weight, rope=rope,
            layer=self.index, depth=self.depth,
        )  # fmt: skip

    def attention(self) -> Tensor:
        """``[1, H, N, N]``, which the eager kernel would have left behind."""
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        logits = self.q @ k.mT * self.module.scaling
        n = logits.shape[-1]
        return logits.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)

    def press(self, press: Any, attention: Tensor | None = None) -> Tensor:
        """A press's scores."""
        return press.score(  # type: ignore[no-any-return]
            self.module, self.hidden, self.k, self.v, attention, {"position_embeddings": self.tables}
        )


class Pair(NamedTuple):
    """A press and the policy that it is compared with.

    Attributes:
        policy: of tokred.
        press: makes the press.
        theirs, ours: scores of a layer.
        compare: entries that mean the same in both, given both scores; None: all.
        note: where they differ by design.
    """

    policy: Any
    press: Callable[[float], Any]
    theirs: Callable[[Layer, Any], Tensor]
    ours: Callable[[Layer, Any], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor] | None = None
    note: str = ""


def _plain(layer: Layer, press: Any) -> Tensor:
    return layer.press(press)


def _scores(layer: Layer, policy: Any) -> Tensor:
    """With those of guarded rows above all others, as presses do it."""
    return policy.scores(layer.site())  # type: ignore[no-any-return]


def _raw(layer: Layer, policy: Any) -> Tensor:
    """The score alone."""
    return policy.parts.score(layer.site())  # type: ignore[no-any-return]


def _refined(layer: Layer, policy: Any) -> Tensor:
    """The score once it is known how many rows are kept; the sure ones are infinite."""
    site = layer.site()
    rows = policy.at_least(site, policy.parts.budget.rows(site))
    score, guard = policy.parts.score(site), policy.guarded(site, rows)
    return policy.parts.score.refine(site, score, guard, rows)  # type: ignore[no-any-return]


def _observed(layer: Layer, policy: Any) -> Tensor:
    site = layer.site()
    policy.parts.score.observe(site)
    return policy.parts.score(site)  # type: ignore[no-any-return]


def pairs(budget: float) -> dict[str, Pair]:
    """By tokred's name."""
    import kvpress as p

    made = tokred.make
    both_finite = lambda a, b: (a < 1e30) & b.isfinite()  # noqa: E731
    return {
        "snapkv": Pair(made("snapkv", budget=budget), p.SnapKVPress, _plain, _scores),
        "tova": Pair(made("tova", budget=budget), p.TOVAPress, _plain, _scores),
        "knorm": Pair(
            made("knorm", budget=budget), p.KnormPress, _plain, _raw,
            note="of equal scores tokred keeps the older row, the press any",
        ),
        "keydiff": Pair(made("keydiff", budget=budget), p.KeyDiffPress, _plain, _raw),
        "expected_attention": Pair(
            made("expected_attention", budget=budget), p.ExpectedAttentionPress, _plain, _scores
        ),
        "lagkv": Pair(
            made("lagkv", budget=budget, cross_scoring=True), lambda r: p.LagKVPress(r, cross_scoring=True), _plain,
            _raw, note="raw scores, which cross_scoring keeps; ranks follow from them",
        ),
        "lagkv (ranks)": Pair(
            made("lagkv", budget=budget), p.LagKVPress, _plain, _raw,
            note="ranks / lag: where raw scores agree to the last digits but one, neighbours in rank may change places",
        ),
        "observed_attention": Pair(
            made("observed_attention", budget=budget), p.ObservedAttentionPress,
            lambda layer, press: layer.press(press, layer.attention()), _observed,
            note="the press needs the N x N attention, which is made in its time; tokred sums without making it",
        ),
        "criticalkv": Pair(
            made("criticalkv", budget=budget), lambda r: p.CriticalKVPress(p.SnapKVPress(r)), _plain, _refined,
            compare=both_finite, note="rows of the second stage; those of the first are infinite in both",
        ),
        "pyramidkv": Pair(
            made("pyramidkv", budget=budget), p.PyramidKVPress, _plain, _scores,
            note="the same scores as snapkv; rows by layer are compared in rows_differ",
        ),
        "adakv": Pair(
            made("adakv", budget=budget), lambda r: p.AdaKVPress(p.SnapKVPress(r)),
            lambda layer, press: layer.press(press.press), _scores,
            note="the press masks what it evicts, so its cache stays dense",
        ),
        "streaming_llm": Pair(
            made("streaming_llm", budget=budget), lambda r: p.StreamingLLMPress(r, n_sink=SINKS), _plain, _scores,
            compare=lambda a, b: torch.zeros_like(a, dtype=torch.bool),
            note="one or zero against the number of the token: only the rows that are kept can be compared",
        ),
    }  # fmt: skip
