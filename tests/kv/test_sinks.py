"""Sinks: a logit in every softmax that belongs to no key; scores and evicted rows know it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, prompt
from tokred.adapters.kv.attention import attend
from tokred.kv import CacheSite, Padding
from tokred.kv.repeat import Piece, Probe, Repeats
from tokred.methods.kv.h2o import ColumnSum
from tokred.methods.kv.keyformer import noisy_columns

B, H, GROUP, M, N, D = 2, 4, 2, 5, 9, 8


pytestmark = pytest.mark.usefixtures("no_grad")


def site(padded: bool = False) -> tuple[CacheSite, torch.Tensor]:
    """Random rows under strong sinks, and the attention ``[B, H, M, N]`` written out."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, *shape, generator=g) for shape in ((H, M, D), (H // GROUP, N, D), (H // GROUP, N, D)))
    sinks = torch.tensor([3.0, -1.0, 0.5, 2.0])
    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :2] = not padded
    seen = (torch.arange(N) <= torch.arange(N - M, N)[:, None]) & real[:, None, None]
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * D**-0.5).masked_fill(~seen, -torch.inf)
    both = torch.cat([logits, sinks.view(1, H, 1, 1).expand(B, H, M, 1)], -1)
    made = CacheSite(q=q, k=k, v=v, sinks=sinks, padding=Padding(real) if padded else None)
    return made, both.softmax(-1)[..., :-1]


@pytest.mark.parametrize("padded", [False, True])
def test_columns_and_statistics_are_those_of_the_softmax_with_the_sinks(padded):
    made, attention = site(padded)
    mean = attention.sum(2).view(B, -1, GROUP, N).mean(2)
    torch.testing.assert_close(made.columns(), mean)
    window = attention[:, :, -2:].sum(2).view(B, -1, GROUP, N).sum(2)
    torch.testing.assert_close(made.columns(2, group="sum"), window)
    found = made.statistics()
    torch.testing.assert_close(found.sum, attention.sum(2))
    torch.testing.assert_close(found.max, attention.amax(2))
    torch.testing.assert_close(found.sum_squares, attention.square().sum(2))
    assert attention.sum(-1).min() < 0.5, "the sinks take their part"


def test_without_noise_the_noisy_sum_is_the_plain_one():
    made, attention = site()
    found = noisy_columns(made, 1.0, lambda query, key: None)
    torch.testing.assert_close(found, attention.sum(2).view(B, -1, GROUP, N).sum(2))


def test_rows_that_are_repeated_are_judged_under_the_sinks():
    made, attention = site()
    probe = Probe(Repeats(chunk=N - M, sinks=0), N - M)
    nothing = torch.empty(0, dtype=torch.long)
    probe.piece = Piece((torch.arange(N - M),) * B, (nothing,) * B, (7,))
    probe.see(made)
    best = attention.amax(2).view(B, -1, GROUP, N).amax(2)[..., : N - M]
    torch.testing.assert_close(probe.best[0], best)


@pytest.mark.parametrize("count", [1, M])
def test_attention_over_rows_is_the_softmax_with_the_sinks(count):
    made, attention = site()
    mask = (torch.arange(N) <= torch.arange(N - count, N)[:, None])[None, None]
    found = attend(made.q[:, :, -count:], made.k, made.v, mask, None, None, None, 0.0, made.sinks)
    expected = attention[:, :, -count:] @ made.v.repeat_interleave(GROUP, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_policy_adds_up_what_the_models_own_attention_gave():
    model, ids, seen = build("gpt_oss"), prompt(20), []
    for layer in model.model.layers:
        layer.self_attn.sinks += 1
    given = model(ids, output_attentions=True).attentions[1]

    class Spy(ColumnSum):
        def observe(self, site):
            super().observe(site)
            seen.append(self(site))

    tokred.apply(model, "kv", score=Spy(), budget=9)
    model(ids, use_cache=True)
    found, expected = seen[0], given.sum(2).view(1, 2, 2, 20).sum(2)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_sinks_of_another_shape_are_refused():
    model = build("gpt_oss")
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(tokred.UnsupportedModelError, match="sinks that are not one logit a head"):
        tokred.apply(model, "snapkv")
