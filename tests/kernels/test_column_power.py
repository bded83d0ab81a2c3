"""Column scores again and again: parity with matrices in float64, masks, grouped heads, settling, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cases import HALVES, key_terms, queries_keys, relative_rms, score_options
from torch import Tensor

from tokred.kernels.column_scores import column_power, column_scores, power
from tokred.kernels.column_scores.reference import weights_reference


def truth(q: Tensor, k: Tensor, start: Tensor, rounds: int, **terms: Tensor) -> Tensor:
    """By the matrices in float64, without settling."""
    q, k = q.double(), k.double()
    bias, mask = terms.get("bias"), terms.get("key_mask")
    p = weights_reference(q, k, None, bias, mask, score_options(d=q.shape[3]))
    s = start.double().expand(q.shape[0], q.shape[1], q.shape[2]).unsqueeze(-2)
    for _ in range(rounds):
        s = s @ p
    return s.squeeze(-2)


def starts(b: int, h: int, n: int, terms: dict[str, Tensor]) -> Tensor:
    start = torch.rand(b, h, n, generator=torch.Generator().manual_seed(5))
    return start * terms["key_mask"].unsqueeze(1) if "key_mask" in terms else start


def check_parity(n: int, h: int, hk: int, dtype: torch.dtype, kind: str, rounds: int, **options: Any) -> None:
    q, k, _ = queries_keys(3, h, hk, n, n, 16, dtype, **options)
    terms = key_terms(kind, 3, h, n)
    start = starts(3, h, n, terms)
    found = column_power(q, k, start, rounds, **terms)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (3, h, n)
    wanted = truth(q, k, start, rounds, **terms)
    if dtype in HALVES:
        # No worse than twice what the same rounds lose in that type.
        p = weights_reference(q, k, None, terms.get("bias"), terms.get("key_mask"), score_options(d=16)).to(dtype)
        plain = start.to(dtype).unsqueeze(-2)
        for _ in range(rounds):
            plain = plain @ p
        assert relative_rms(found, wanted) <= 2 * relative_rms(plain.squeeze(-2), wanted)
        return
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=50 * tolerance)


@pytest.mark.parametrize("kind", ["none", "bias", "head bias", "mask", "both", "dead"])
@pytest.mark.parametrize(("n", "h", "hk"), [(63, 4, 4), (17, 4, 2), (1, 3, 1)])
def test_parity(n: int, h: int, hk: int, kind: str, nan_memory: None) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for rounds in (0, 1, 5):
            check_parity(n, h, hk, dtype, kind, rounds)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "expanded"])
@pytest.mark.parametrize(("block", "head"), [(1, 1 << 22), (4 * 40 * 40, 1 << 22), (1 << 19, 100)])
def test_blocks(block: int, head: int, layout: str, monkeypatch: pytest.MonkeyPatch, nan_memory: None) -> None:
    """One head at a time, one sample at a time, and matrices too large to keep."""
    monkeypatch.setattr(power, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(power, "_HEAD_ELEMENTS", head)
    check_parity(40, 4, 2, torch.float32, "mask", 4, layout=layout)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_sum_is_kept_and_one_round_is_column_scores(n: int, h: int, rounds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, h, n, 4, generator=generator).unbind(0)
    start = torch.rand(2, n, generator=generator)
    torch.testing.assert_close(column_power(q, k, start, 1), column_scores(q, k, start))
    torch.testing.assert_close(column_power(q, k, start, rounds).sum(-1), start.sum(1, keepdim=True).expand(2, h))


def test_each_head_settles_by_itself() -> None:
    """Neither other heads nor other samples change a result."""
    q, k, _ = queries_keys(3, 4, 4, 10, 10, 16, torch.float32)
    start, limit = torch.rand(3, 10) / 10, 1e-3
    found = column_power(q, k, start, 30, tolerance=limit)
    for i in range(3):
        for h in range(4):
            alone = column_power(
                q[i : i + 1, h : h + 1], k[i : i + 1, h : h + 1], start[i : i + 1], 30, tolerance=limit
            )
            torch.testing.assert_close(alone[0, 0], found[i, h])
    exact = column_power(q, k, start, 30)
    assert not torch.equal(found, exact), "they did settle"
    torch.testing.assert_close(found, exact, rtol=0, atol=5 * limit)


@pytest.mark.parametrize("path", ["column_power_blocked", "column_power_reference"])
def test_settling_is_the_same_on_every_path(path: str) -> None:
    q, k, _ = queries_keys(2, 3, 3, 12, 12, 16, torch.float64)
    start = torch.rand(2, 3, 12, dtype=torch.float64)
    run: Callable[..., Tensor] = getattr(power, path)
    wanted = start
    settled = torch.zeros(2, 3, 1, dtype=torch.bool)
    for _ in range(20):
        voted = column_scores(q, k, wanted)
        still = (voted - wanted).abs().sum(-1, keepdim=True) < 1e-2
        wanted = torch.where(settled, wanted, voted)
        settled = settled | still
    torch.testing.assert_close(run(q, k, start, 20, 1e-2, None, None, score_options(d=16)), wanted)


def test_rounds_stop_where_looking_costs_nothing() -> None:
    calls: list[int] = []
    halve = torch.full((1, 1, 4), 1.0)

    def vote(s: Tensor) -> Tensor:
        calls.append(1)
        return s * 0.5

    power.iterate(vote, halve, 50, 0.5, look=True)
    assert len(calls) == 4
    calls.clear()
    kept = power.iterate(vote, halve, 50, 0.5, look=False)
    assert len(calls) == 50
    assert kept.flatten().tolist() == [0.0625] * 4
    calls.clear()
    power.iterate(vote, halve, 9, 0.0, look=True)
    assert len(calls) == 9


def test_gradients_take_the_definition() -> None:
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    start = torch.rand(1, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: column_power(q, k, start, 3), (q, k))


def test_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, s: column_power(q, k, s, 3, tolerance=1e-4), backend="eager", fullgraph=True)
    q, k, _ = queries_keys(2, 2, 2, 9, 9, 16, torch.float32)
    start = torch.rand(2, 9)
    torch.testing.assert_close(compiled(q, k, start), column_power(q, k, start, 3, tolerance=1e-4))


def test_wrong_arguments_are_refused() -> None:
    q, k, _ = queries_keys(2, 2, 2, 5, 7, 16, torch.float32)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 7"):
        column_power(q, k, torch.rand(5), 2)
    with pytest.raises(ValueError, match="rounds and tolerance must not be negative, got -1"):
        column_power(k, k, torch.rand(7), -1)
    with pytest.raises(ValueError, match="weight must broadcast"):
        column_power(k, k, torch.rand(6), 2)


def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["none", "both"])
def test_kernel_parity(kind: str, nan_memory: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_parity(33, 4, 2, dtype, kind, 3)


@pytest.mark.interpret
def test_kernels_read_the_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.kernels.column_scores import launch

    calls: list[int] = []
    plain = launch.launch_row_lse
    monkeypatch.setattr(launch, "launch_row_lse", lambda *a: calls.append(1) or plain(*a))
    q, k, _ = queries_keys(1, 2, 2, 20, 20, 16, torch.float32)
    column_power(q, k, torch.rand(20), 4)
    assert len(calls) == 1
