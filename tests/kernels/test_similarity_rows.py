"""similarity_rows: the torch path against the float64 definition, the cards' numbers, gradients, and registration."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.kernels import similarity_rows as op
from tokred.kernels.similarity_rows import reference, registration, torch_path

Rows = tuple[Tensor, Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unit_rows(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(0)


def halves(batch: int, n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Rows:
    """The even and the odd rows of one tensor, as strided views."""
    m = torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return m[:, ::2], m[:, 1::2]


def some_masks(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a_mask = torch.rand(a.shape[:-1], generator=generator) > 0.2
    b_mask = torch.rand(b.shape[:-1], generator=generator) > 0.3
    b_mask[0] = False  # a sample in which nobody has a partner
    return {"a_mask": a_mask, "b_mask": b_mask}


@pytest.fixture(params=["whole", "batches", "rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The matrix in one piece, cut between samples, and cut between rows."""
    size = {"whole": 1 << 22, "batches": 70_000, "rows": 3000}[request.param]
    monkeypatch.setattr(torch_path, "CPU_BLOCK_BYTES", size)
    return str(request.param)


# Parity with the definition


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metric", op.METRICS)
@pytest.mark.parametrize(("batch", "n"), [(3, 63), (1, 197), (3, 197)])
def test_float64_equals_the_definition(batch: int, n: int, metric: str, masked: bool, blocks: str) -> None:
    a, b = halves(batch, n, 16)
    masks: dict[str, Any] = some_masks(a, b) if masked else {}
    score, index = reference.top(a, b, 6, metric, **masks)
    best, found = op.best_match(a, b, metric=metric, **masks)
    torch.testing.assert_close(best, score[..., 0])
    assert torch.equal(found, index[..., 0])
    top = op.similarity_topk(a, b, 6, metric=metric, **masks)
    torch.testing.assert_close(top.score, score)
    assert torch.equal(top.index, index)
    count = op.similarity_count(a, b, -0.4, metric=metric, **masks)
    assert count.dtype == torch.int64
    assert torch.equal(count.double(), reference.total(a, b, "count", -0.4, 1.0, metric, **masks))
    for function in op.FUNCTIONS:
        total = op.similarity_sum(a, b, function=function, margin=0.3, alpha=0.7, metric=metric, **masks)
        torch.testing.assert_close(total, reference.total(a, b, function, 0.3, 0.7, metric, **masks))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("metric", op.METRICS)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, metric: str) -> None:
    a, b = halves(3, 63, 24, dtype)
    exact = op.best_match(a.double(), b.double(), metric=metric)
    ours = op.best_match(a, b, metric=metric)
    assert ours.score.dtype == torch.float32
    assert torch.equal(ours.index, exact.index)
    torch.testing.assert_close(ours.score, exact.score.float(), rtol=1e-5, atol=1e-5)
    total = op.similarity_sum(a, b, margin=0.2, metric=metric)
    expected = op.similarity_sum(a.double(), b.double(), margin=0.2, metric=metric).float()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    a, b = halves(2, 63, 16, torch.float32)
    plain = op.best_match(a, b), op.similarity_sum(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = op.best_match(a, b), op.similarity_sum(a, b)
    assert torch.equal(plain[0].score, cast[0].score)
    assert torch.equal(plain[1], cast[1])


def test_leading_dimensions_and_expanded_rows() -> None:
    x = torch.randn(2, 5, 3, 40, 8, dtype=torch.float64).transpose(1, 2)  # [2, 3, 5, 40, 8], permuted
    ours = op.similarity_topk(x, x, 2, exclude_self=True)
    score, index = reference.top(x, x, 2, "cosine", exclude_self=True)
    torch.testing.assert_close(ours.score, score)
    assert torch.equal(ours.index, index)
    row = torch.randn(1, 1, 8).expand(3, 4, 8)
    assert torch.equal(op.best_match(row, row).index, torch.zeros(3, 4, dtype=torch.int64))
    mask = torch.arange(40) % 2 == 0  # without leading dimensions
    expected = reference.total(x, x, "elu", 0.1, 1.0, "cosine", None, mask) / mask.sum()
    torch.testing.assert_close(op.similarity_sum(x, x, margin=0.1, b_mask=mask, mean=True), expected)


# Edges


def test_ties_go_to_the_lower_index(blocks: str) -> None:
    b = torch.eye(4).repeat(60, 1)[None].expand(3, -1, -1) * 3
    a = torch.eye(4)[None].expand(3, -1, -1)
    for metric in op.METRICS:
        assert op.best_match(a, b, metric=metric).index[0].tolist() == [0, 1, 2, 3]
        top = op.similarity_topk(a, b, 16, metric=metric)
        assert top.index[1].tolist() == [[i + 4 * j for j in range(16)] for i in range(4)]
    without = torch.arange(240) >= 4
    assert op.best_match(a, b, b_mask=without).index[2].tolist() == [4, 5, 6, 7]


def test_rows_without_a_partner() -> None:
    a, b = halves(2, 9, 4, torch.float32)
    nobody = torch.zeros(4, dtype=torch.bool)
    best = op.best_match(a, b, b_mask=nobody)
    assert torch.isneginf(best.score).all()
    assert not best.index.any()
    two = op.similarity_topk(a, b, 3, b_mask=torch.tensor([False, True, False, True]))
    assert torch.isneginf(two.score[..., 2]).all()
    assert not two.index[..., 2].any()
    assert set(two.index[..., :2].flatten().tolist()) <= {1, 3}
    assert not op.similarity_sum(a, b, b_mask=nobody, mean=True).any()
    assert not op.similarity_count(a, b, -1.0, b_mask=nobody).any()
    alone = op.best_match(a[:, :1], a[:, :1], exclude_self=True)
    assert torch.isneginf(alone.score).all()
    assert op.best_match(a[:, :1], b[:, :1]).index.tolist() == [[0], [0]]


def test_zero_rows_are_similar_to_nothing_and_never_nan() -> None:
    a, b = halves(2, 9, 4, torch.float32)
    a, b = a.clone(), b.clone()
    a[:, 1], b[:, 2] = 0, 0
    a.requires_grad_(), b.requires_grad_()
    for metric in op.METRICS:
        score = op.best_match(a, b, metric=metric).score
        total = op.similarity_sum(a, b, metric=metric)
        grads = torch.autograd.grad(score.sum() + total.sum(), (a, b))
        for tensor in (score, total, *grads):
            assert torch.isfinite(tensor).all()
    assert not op.best_match(a, b).score[:, 1].any()


def test_equal_rows_have_a_finite_gradient_of_distance() -> None:
    a = torch.randn(1, 5, 3, requires_grad=True)
    score = op.best_match(a, a.detach().clone(), metric="distance").score
    assert torch.isfinite(torch.autograd.grad(score.sum(), a)[0]).all()


@pytest.mark.parametrize(("batch", "rows", "columns"), [(0, 3, 2), (2, 0, 2), (2, 3, 0), (0, 0, 0)])
def test_empty_inputs(batch: int, rows: int, columns: int) -> None:
    a, b = torch.randn(batch, rows, 4, requires_grad=True), torch.randn(batch, columns, 4)
    best = op.best_match(a, b)
    assert best.score.shape == best.index.shape == (batch, rows)
    assert torch.isneginf(best.score).all()
    assert not op.similarity_count(a, b, 0.0).any()
    total = op.similarity_sum(a, b, mean=True)
    assert not total.any()
    (best.score.nan_to_num(neginf=0).sum() + total.sum()).backward()
    assert a.grad is not None
    assert not a.grad.any()


# The cards' numbers


def test_pitome_energies() -> None:
    m = unit_rows(10, 15, 21, 28, 90, 130, 171, 200)
    at_045 = [-0.029996, -0.012482, 0.005548, 0.022392, -0.052373, -0.143579, -0.239565, -0.341214]
    at_0 = [0.308881, 0.331202, 0.354717, 0.377643, 0.361640, 0.207379, 0.055738, -0.073853]
    text = [0.425045, 0.433887, 0.445733, 0.460707, 0.375156, 0.330722, 0.309208, 0.241203]
    for margin, energy in ((0.45, at_045), (0.0, at_0)):
        ours = op.similarity_sum(m, m, margin=margin, mean=True)[0]
        torch.testing.assert_close(ours, torch.tensor(energy, dtype=torch.float64), rtol=0, atol=1e-6)
    ours = op.similarity_sum(m, m, function="gaussian", margin=0.5, mean=True)[0]
    torch.testing.assert_close(ours, torch.tensor(text, dtype=torch.float64), rtol=0, atol=1e-6)


def test_saint_degrees_and_scores() -> None:
    m = unit_rows(0, 5, 10, 20, 60, 30, 90, 100, 150, 200)
    a, b = m[:, ::2], m[:, 1::2]
    degree = op.similarity_count(a, b, 0.9)
    assert degree[0].tolist() == [2, 3, 0, 1, 0]
    above = op.similarity_sum(a, b, function="relu", margin=0.9) / degree.clamp_min(1)
    scores = torch.where(degree > 0, degree * torch.exp(10 * above), op.similarity_sum(a, b, function="identity") / 5)
    expected = [3.945532, 6.260515, 0.441129, 2.335153, -0.135273]
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    same = torch.ones(1, 1, 1)
    assert op.similarity_count(same, same, 1.0).tolist() == [[1]]  # not strict


def test_vomix_votes_leave_oneself_out() -> None:
    m = unit_rows(0, 4, 10, 90, 97, 45)
    vote = op.best_match(m, m, exclude_self=True)
    assert vote.index[0].tolist() == [1, 0, 1, 4, 3, 2]
    assert math.isclose(float(vote.score[0, 2]), math.cos(math.radians(6)), rel_tol=1e-9)


# Windows


def brute_force(x: Tensor, windows: op.Windows) -> Rows:
    """Best match over the whole matrix, where only pairs of one group take part."""
    s = reference.similarity(x, x, "cosine")
    allowed = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for sources, targets in zip(windows.a.tolist(), windows.b.tolist(), strict=True):
        for i in sources:
            for j in targets:
                if i >= 0 and j >= 0:
                    allowed[i, j] = True
    s = s.masked_fill(~allowed, -torch.inf)
    s = torch.cat([s, torch.full_like(s[:, :1], -torch.inf)], 1)  # row -1: padding
    return s[:, windows.a].max(-1)


@pytest.mark.parametrize(
    ("height", "width", "region"), [(8, 8, (4, 4)), (9, 7, (4, 4)), (5, 6, (2, 4)), (3, 3, (8, 8))]
)
@pytest.mark.parametrize("random", [False, True])
def test_cell_regions(height: int, width: int, region: tuple[int, int], random: bool) -> None:
    shape = (height // 2, width // 2)
    offsets = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0)) if random else None
    windows = op.cell_regions(height, width, region, offsets=offsets)
    everything = torch.cat([windows.a.flatten(), windows.b.flatten()])
    assert everything[everything >= 0].sort().values.tolist() == list(range(height * width))
    inside = windows.b[windows.b >= 0].sort().values
    assert inside.numel() == shape[0] * shape[1]
    chosen = torch.zeros(shape, dtype=torch.int64) if offsets is None else offsets
    y = torch.arange(shape[0])[:, None] * 2 + chosen // 2
    x = torch.arange(shape[1])[None, :] * 2 + chosen % 2
    assert torch.equal(inside, (y * width + x).flatten().sort().values)
    assert windows.padded or everything.min() >= 0
    tokens = torch.randn(2, height * width, 8, dtype=torch.float64)
    ours = op.best_match(tokens, tokens, windows=windows)
    score, index = brute_force(tokens, windows)
    torch.testing.assert_close(ours.score, score)
    partnered = ~torch.isneginf(score)
    assert torch.equal(ours.index[partnered], index[partnered])
    assert not ours.index[~partnered].any()


def test_grid_regions_for_every_reduction() -> None:
    windows = op.grid_regions(5, 7, (3, 3))
    assert windows.a.shape == (6, 9)
    x = torch.randn(2, 35, 8, dtype=torch.float64, requires_grad=True)
    score, index = brute_force(x.detach(), windows)
    ours = op.best_match(x, x, windows=windows)
    torch.testing.assert_close(ours.score, score)
    assert torch.equal(ours.index, index.masked_fill(torch.isneginf(score), 0))
    ours.score.nan_to_num(neginf=0).sum().backward()
    mask = torch.arange(35) % 5 != 0
    lengths = ((windows.b >= 0) & mask[windows.b]).sum(-1)
    count = op.similarity_count(x, x, -1.1, windows=windows, b_mask=mask)
    assert torch.equal(count, (lengths[:, None] * (windows.a >= 0)).expand(2, -1, -1))
    mean = op.similarity_sum(x, x, function="identity", margin=0.0, windows=windows, b_mask=mask, mean=True)
    total = op.similarity_sum(x, x, function="identity", windows=windows, b_mask=mask)
    torch.testing.assert_close(mean, total / lengths[:, None])
    top = op.similarity_topk(x, x, 3, windows=windows, exclude_self=True)
    assert top.index.shape == (2, 6, 9, 3)
    apart = op.similarity_topk(x[:, windows.a[0]], x[:, windows.a[0]], 3, exclude_self=True)
    torch.testing.assert_close(top.score[:, 0], apart.score)
    assert torch.equal(top.index[:, 0], windows.a[0][apart.index])


# The interface


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "metric is 'l1'", {"metric": "l1"}),
        (ValueError, "a has shape", {"a": torch.randn(4, 8)}),
        (ValueError, "a has shape", {"b": torch.randn(2, 3, 7)}),
        (ValueError, "a has shape", {"b": torch.randn(3, 3, 8)}),
        (TypeError, "b torch.float64", {"b": torch.randn(2, 3, 8, dtype=torch.float64)}),
        (TypeError, "a is torch.int64", {"a": torch.zeros(2, 4, 8).long(), "b": torch.zeros(2, 4, 8).long()}),
        (ValueError, "b on meta", {"b": torch.randn(2, 3, 8, device="meta")}),
        (TypeError, "a_mask is torch.float32", {"a_mask": torch.ones(2, 4)}),
        (ValueError, "b_mask has shape", {"b_mask": torch.ones(2, 4, dtype=torch.bool)}),
        (ValueError, "b_mask is on meta", {"b_mask": torch.ones(3, dtype=torch.bool, device="meta")}),
        (ValueError, "exclude_self", {"exclude_self": True}),
        (TypeError, "windows.a is", {"windows": op.Windows(torch.zeros(1, 2), torch.zeros(1, 2).long())}),
        (ValueError, "windows.a has shape", {"windows": op.Windows(torch.zeros(2).long(), torch.zeros(1, 2).long())}),
    ],
)
def test_errors_name_the_argument(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    arguments = {"a": torch.randn(2, 4, 8), "b": torch.randn(2, 3, 8), **options}
    with pytest.raises(error, match=words):
        op.best_match(**arguments)


def test_errors_of_single_functions() -> None:
    a, b = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    for k in (0, 4, 17):
        with pytest.raises(ValueError, match=f"k is {k}"):
            op.similarity_topk(a, b, k)
    with pytest.raises(ValueError, match="function is 'tanh'"):
        op.similarity_sum(a, b, function="tanh")
    with pytest.raises(ValueError, match="margin is 1"):
        op.similarity_sum(a, b, function="gaussian", margin=1.0)
    with pytest.raises(ValueError, match="reduce is 'min'"):
        op.similarity_rows(a, b, "min")
    with pytest.raises(ValueError, match="not a multiple"):
        op.cell_regions(8, 8, (4, 3))
    with pytest.raises(ValueError, match="offsets has shape"):
        op.cell_regions(8, 8, (4, 4), offsets=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot be cut"):
        op.grid_regions(0, 8, (4, 4))


def test_reductions_by_name() -> None:
    a, b = halves(2, 9, 4)
    assert torch.equal(op.similarity_rows(a, b)[1], op.best_match(a, b).index)
    assert torch.equal(op.similarity_rows(a, b, "topk", k=2)[1], op.similarity_topk(a, b, 2).index)
    assert torch.equal(op.similarity_rows(a, b, "count", threshold=0.1), op.similarity_count(a, b, 0.1))
    assert torch.equal(op.similarity_rows(a, b, "sum", margin=0.1), op.similarity_sum(a, b, margin=0.1))


def test_why_not_has_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = halves(2, 9, 4, torch.float32)
    reason = op.why_not(a, b)
    assert reason is not None
    assert "cpu" in reason or "triton" in reason
    monkeypatch.setenv("TOKRED_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="cannot run its kernel"):
        op.best_match(a, b)
    assert [row.reason for row in registration.refusals(a.double(), b.double()) if row.applies]


def test_importing_leaves_triton_alone() -> None:
    code = "import sys, tokred.kernels.similarity_rows; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
