"""Scoring and compressing takes memory that grows with the prompt, and not with its square."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.kv import memory as kv_memory

SHORT = 768
# Pieces that a prompt of this length has several of.
PIECES = {"kvzip": {"chunk": 128}, "lagkv": {"lag": 16}, "rpc": {"period": 128}}
# The normal equations of its least squares are a square of the rows that stay; its page says so.
SQUARE = "attention_matching"


@pytest.mark.parametrize("name", [name for name in kv_memory.policies() if name != SQUARE])
def test_extra_memory_grows_with_the_length(name):
    once, twice = (kv_memory.measure(name, n, **PIECES.get(name, {})) for n in (SHORT, 2 * SHORT))
    assert 0 < twice["extra_bytes"] <= 2.3 * once["extra_bytes"]
    assert twice["tokens"] == 2 * once["tokens"]


def test_the_measure_sees_a_matrix():
    """A score that makes the matrix of attention would be found out."""
    import torch

    import tokred

    model = kv_memory.build(1)
    found = []

    class Matrix(tokred.kv.Score):
        reads = frozenset({"q", "k"})

        def __call__(self, site):
            k = site.k.repeat_interleave(site.q.shape[1] // site.heads, 1)
            return (site.q @ k.mT).softmax(-1).sum(2).unflatten(1, (site.heads, -1)).mean(2)

    for n in (SHORT, 2 * SHORT):
        ids = torch.zeros(1, n, dtype=torch.long)
        policy = tokred.KVPolicy(score=Matrix(), budget=0.5)
        peaks = []
        for _ in range(3):  # the profiler loses events now and then
            profile = torch.autograd.profiler.profile(profile_memory=True)
            with tokred.applied(model, policy), torch.inference_mode(), kv_memory.marked(), profile:
                model(ids)
            peaks.append(kv_memory.peak(profile.kineto_results.events()))
        found.append(max(peaks))
    assert found[1] > 3 * found[0] > 3 * kv_memory.HEADS * SHORT**2 * 4
