"""Tokens that can be worked out by hand: keys are unit vectors at given angles; and what every method obeys."""

from __future__ import annotations

import math

import torch

import tokred
from tests.encoder.tiny_timm import build, images


def keys(*samples: list[float]) -> torch.Tensor:
    """``(B, 1, N, 2)`` float32 unit vectors at angles in degrees, a list a sample."""
    a = torch.tensor(samples, dtype=torch.float64) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], -1).unsqueeze(1).float()


def column(n: int, first: float = 0) -> torch.Tensor:
    """``(1, n, 1)`` the numbers from ``first``."""
    return torch.arange(n, dtype=torch.float32).view(1, -1, 1) + first


def real_rows(reduction: tokred.Reduction, sample: int) -> list[int]:
    """The tokens that stand for the real slots of one sample."""
    rows = reduction.representative[sample]
    return (rows if reduction.mask is None else rows[reduction.mask[sample]]).tolist()


def real_groups(reduction: tokred.Reduction, sample: int) -> list[list[int]]:
    """The groups of one sample, without padded slots."""
    groups = reduction.groups()[sample]
    return groups if reduction.mask is None else [g for g, ok in zip(groups, reduction.mask[sample], strict=True) if ok]


def check_on_a_model(family: str, method: tokred.Method, nothing: tokred.Method) -> tokred.Reduction:
    """Runs, loses tokens, does not look at batch-mates; with nothing to remove the output is bit-equal.

    Returns:
        What became of the tokens of the batch.
    """
    model, x = build(family), images()
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, nothing)
        assert torch.equal(model(x), y)
        tokred.apply(model, method)
        reduced = model(x)
        assert torch.isfinite(reduced).all()
        trace = tokred.trace(model)
        tokens = [row.tokens_out for row in tokred.report(model).layers]
        assert tokens[-1] < trace.length
        assert all(a <= b for a, b in zip(tokens, tokred.flops(model, method, x.shape).tokens, strict=True))
        for i in range(len(x)):
            torch.testing.assert_close(model(x[i : i + 1]), reduced[i : i + 1], rtol=1e-4, atol=2e-5)
            assert real_groups(tokred.trace(model), 0) == real_groups(trace, i)
        tokred.remove(model)
        assert torch.equal(model(x), y)
    return trace


def check_compiled_and_trained(family: str, method: tokred.Method) -> None:
    """Compiles without a break to the same output, and lets every parameter learn."""
    model, x = tokred.apply(build(family), method), images()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
