"""similarity_rows: the Triton kernels under the interpreter, against the float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.kernels import similarity_rows as op
from tokred.kernels.similarity_rows import reference

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]

# Channels: one block; one block with an overhang; several blocks.
CASES = [(torch.float32, 16), (torch.float32, 70), (torch.bfloat16, 40), (torch.float16, 150)]


def halves(batch: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m = torch.randn(batch, n, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    return m[:, ::2], m[:, 1::2]


def check_top(a: Tensor, b: Tensor, k: int, metric: str, **options: Any) -> None:
    score, index = reference.top(a.double(), b.double(), k, metric, **options)
    if k == 1:
        best = op.best_match(a, b, metric=metric, **options)
        ours = op.TopMatches(best.score.unsqueeze(-1), best.index.unsqueeze(-1))
    else:
        ours = op.similarity_topk(a, b, k, metric=metric, **options)
    torch.testing.assert_close(ours.score, score.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.index, index)


def check_total(a: Tensor, b: Tensor, function: str, metric: str, **masks: Any) -> None:
    expected = reference.total(a.double(), b.double(), function, 0.3, 0.7, metric, **masks)
    if function == "count":
        ours = op.similarity_count(a, b, 0.3, metric=metric, **masks).float()
    else:
        ours = op.similarity_sum(a, b, function=function, margin=0.3, alpha=0.7, metric=metric, **masks)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "d"), CASES)
@pytest.mark.parametrize("metric", op.METRICS)
def test_top(dtype: torch.dtype, d: int, metric: str) -> None:
    a, b = halves(2, 63, d, dtype)
    a_mask, b_mask = torch.arange(32) % 5 != 0, torch.arange(62).view(2, 31) > 20
    b_mask[1] = False
    for k in (1, 5):
        check_top(a, b, k, metric)
        check_top(a, b, k, metric, a_mask=a_mask.expand(2, -1), b_mask=b_mask)


@pytest.mark.parametrize(("dtype", "d"), CASES)
@pytest.mark.parametrize("metric", op.METRICS)
def test_totals(dtype: torch.dtype, d: int, metric: str) -> None:
    a, b = halves(2, 63, d, dtype)
    a_mask, b_mask = torch.arange(64).view(2, 32) % 5 != 0, torch.arange(31) > 20
    for function in (*op.FUNCTIONS, "count") if dtype == torch.bfloat16 else ("count",):
        check_total(a, b, function, metric)
    check_total(a, b, "elu", metric, a_mask=a_mask, b_mask=b_mask.expand(2, -1))


def test_odd_lengths_self_and_layouts() -> None:
    torch.manual_seed(0)  # of values that are drawn anew some are nearer to each other than float32 can tell
    x = torch.randn(1, 197, 16)
    check_top(x, x, 1, "cosine", exclude_self=True)
    check_top(x, x, 16, "dot", exclude_self=True)
    heads = torch.randn(2, 33, 3, 16).transpose(1, 2)  # [2, 3, 33, 16]
    check_top(heads[:, :, ::2], heads[:, :, 1::2], 1, "cosine")
    check_total(heads[:, :, ::2], heads[:, :, 1::2], "elu", "cosine")
    channels_first = torch.randn(2, 16, 33).mT
    check_top(channels_first, channels_first, 3, "cosine")
    deep = torch.randn(2, 2, 3, 17, 16)
    check_top(deep, deep, 2, "dot")
    row = torch.ones(1, 1, 16).expand(3, 5, 16)
    assert not op.best_match(row, row).index.any()
    assert op.best_match(row[:, :1], row[:, :1]).score.allclose(torch.ones(3, 1))


def test_ties_and_zero_rows() -> None:
    b = torch.eye(16)[:4].repeat(60, 1)[None].expand(2, -1, -1) * 3
    a = torch.eye(16)[None, :4].expand(2, -1, -1)
    for metric in op.METRICS:
        assert op.best_match(a, b, metric=metric).index[0].tolist() == [0, 1, 2, 3]
        top = op.similarity_topk(a, b, 7, metric=metric)
        assert top.index[1].tolist() == [[i + 4 * j for j in range(7)] for i in range(4)]
    zero = torch.zeros(2, 5, 16)
    for rows in (zero, zero.bfloat16()):
        best = op.best_match(rows, rows)
        assert not best.score.any()
        assert not best.index.any()
        assert op.similarity_topk(rows, rows, 3).index[0, 0].tolist() == [0, 1, 2]


def test_splits_are_put_together_in_order() -> None:
    """Few rows and many columns: the walk over ``b`` is cut, and equal scores still resolve to the lower index."""
    a, b = torch.randn(1, 5, 16), torch.randn(1, 1200, 16)
    b[:, 600:] = b[:, :600]
    for metric in op.METRICS:
        check_top(a, b, 1, metric)
        check_total(a, b, "elu", metric)


def test_norms_are_shared_between_many_programs() -> None:
    m = torch.randn(1, 1100, 16)
    check_top(m[:, ::2], m[:, 1:60:2], 1, "cosine")
    check_total(m[:, ::2], m[:, 1:60:2], "relu", "distance")


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_windows_read_rows_where_they_lie(size: tuple[int, int]) -> None:
    x = torch.randn(2, size[0] * size[1], 24).bfloat16()
    windows = op.cell_regions(*size, (4, 4))
    plain = _by_torch(x, windows)
    ours = op.best_match(x, x, windows=windows)
    torch.testing.assert_close(ours.score, plain.score.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.index, plain.index)
    mask = torch.arange(x.shape[1]) % 3 != 0
    own = op.grid_regions(*size, (3, 3))
    for call in (
        lambda: op.similarity_sum(x, x, margin=0.2, windows=own, a_mask=mask, b_mask=mask, mean=True),
        lambda: op.similarity_topk(x, x, 2, windows=own, exclude_self=True, b_mask=mask).score,
    ):
        torch.testing.assert_close(call(), _on_torch(call), rtol=1e-5, atol=1e-5)


def _by_torch(x: Tensor, windows: op.Windows) -> op.BestMatch:
    return _on_torch(lambda: op.best_match(x, x, windows=windows))


def _on_torch(call: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKRED_KERNELS", "torch")
        return call()


def test_gradients() -> None:
    a, b = (x.contiguous().requires_grad_() for x in halves(2, 33, 16, torch.float32))
    windows = op.grid_regions(4, 4, (2, 2))

    def calls() -> list[Tensor]:
        return [
            op.best_match(a, b).score,
            op.similarity_topk(a, b, 3, metric="distance").score,
            op.similarity_sum(a, b, margin=0.2),
            op.best_match(b, b, windows=windows, exclude_self=True).score,
        ]

    for ours, expected in zip(calls(), _on_torch(calls), strict=True):
        ours_grads = torch.autograd.grad(ours.square().sum(), (a, b), allow_unused=True)
        expected_grads = torch.autograd.grad(expected.square().sum(), (a, b), allow_unused=True)
        torch.testing.assert_close(ours_grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_compiles_whole() -> None:
    def run(m: Tensor) -> tuple[Tensor, Tensor]:
        best = op.best_match(m[:, ::2], m[:, 1::2])
        return best.score, best.index

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (33, 41):
        m = torch.randn(2, n, 16)
        torch.testing.assert_close(compiled(m), run(m))


def test_forced_kernel_says_why_it_cannot() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        op.best_match(torch.randn(1, 2, 4).double(), torch.randn(1, 2, 4).double())
    assert op.why_not(torch.randn(1, 2, 4), torch.randn(1, 2, 4)) is None
