"""Column scores: laws, parity with the definition in float64, every option, registration, compilation, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from score_cases import key_terms, queries_keys, relative_rms, score_options
from torch import Tensor

from tokred.kernels.column_scores import (
    blocked,
    column_power,
    column_scores,
    column_statistics,
    row_lse,
    why_not_kernel,
)
from tokred.kernels.column_scores.reference import column_statistics_reference, row_lse_reference

GROUPS = ("none", "sum", "mean", "max")


def truth(q: Tensor, k: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
    """All statistics by the definition in float64."""
    bias, mask = options.pop("bias", None), options.pop("key_mask", None)
    opts = score_options(d=q.shape[3], **options)
    return column_statistics_reference(q.double(), k.double(), weight, None, bias, mask, opts)


def check_against_truth(q: Tensor, k: Tensor, weight: Tensor | None = None, tolerance: float = 2e-5, **kw: Any) -> None:
    """Scores and statistics, with the log-sum-exp computed and given."""
    wanted = truth(q, k, weight, **kw)
    lse = row_lse(q, k, **{name: x for name, x in kw.items() if name != "group"})
    for given in (None, lse):
        found = column_statistics(q, k, weight, lse=given, **kw)
        for name, a, b in zip(found._fields, found, wanted, strict=True):
            assert torch.isfinite(a).all(), name
            torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=50 * tolerance, msg=lambda m, n=name: n + m)
        scores = column_scores(q, k, weight, lse=given, **kw)
        assert scores.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores.double(), wanted.sum, atol=tolerance, rtol=50 * tolerance)


def weight_of(kind: str, b: int, h: int, m: int) -> Tensor | None:
    shapes = {"none": None, "row": (m,), "sample": (b, m), "head": (b, h, m), "one": (1,), "shared head": (b, 1, m)}
    shape = shapes[kind]
    return None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(9))


def test_oracle_of_the_host_study() -> None:
    """kv_hosts.md, oracle 6."""
    q = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)[None, None]
    k = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0.5, -0.5]], dtype=torch.float64)[None, None]
    lse = row_lse(q, k, causal=True)
    torch.testing.assert_close(lse[0, 0], torch.tensor([1.620621, 1.750663]).double(), atol=1e-6, rtol=0)
    found = column_statistics(q, k, causal=True)
    wanted = torch.tensor([0.574771, 0.549976, 0.753312, 0.121941]).double()
    torch.testing.assert_close(found.sum[0, 0], wanted, atol=1e-6, rtol=0)
    wanted = torch.tensor([0.401112, 0.3522, 0.401112, 0.121941]).double()
    torch.testing.assert_close(found.max[0, 0], wanted, atol=1e-6, rtol=0)
    variance = found.sum_squares - found.sum**2 / 2
    wanted = torch.tensor([0.025868, 0.011923, 0.001196, 0.007435]).double()
    torch.testing.assert_close(variance[0, 0], wanted, atol=1e-6, rtol=0)
    first = column_scores(q, k, torch.tensor([1.0, 0]), causal=True)[0, 0]
    wanted = torch.tensor([0.401112, 0.197776, 0.401112, 0]).double()
    torch.testing.assert_close(first, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("b", "m", "n", "d"), [(1, 63, 63, 80), (3, 197, 197, 64), (3, 1, 197, 72), (1, 5, 1, 8)])
def test_parity(b: int, m: int, n: int, d: int, dtype: torch.dtype, layout: str, nan_memory: None) -> None:
    q, k, _ = queries_keys(b, 4, 4, m, n, d, dtype, layout=layout)
    check_against_truth(q, k, tolerance=1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 63])
def test_half_precision(dtype: torch.dtype, m: int) -> None:
    """No worse than twice what plain softmax and sum in the same type loses."""
    q, k, _ = queries_keys(3, 4, 4, m, 63, 64, dtype)
    wanted = truth(q, k).sum
    plain = torch.softmax(q @ k.transpose(-1, -2) * 64**-0.5, -1).sum(-2)
    assert relative_rms(column_scores(q, k), wanted) <= 2 * relative_rms(plain, wanted)


@pytest.mark.parametrize("block", [1 << 19, 900])
@pytest.mark.parametrize("terms", ["none", "bias", "head bias", "mask", "both", "dead"])
@pytest.mark.parametrize("order", [{}, {"causal": True}, {"window": 4}, {"causal": True, "window": 7}])
def test_options(
    order: dict[str, Any], terms: str, block: int, monkeypatch: pytest.MonkeyPatch, nan_memory: None
) -> None:
    """Order, bias and mask together, in one block and in many."""
    monkeypatch.setattr(blocked, "_BLOCK_ELEMENTS", block)
    for m, n, hk in ((33, 33, 2), (17, 40, 4), (50, 20, 2), (1, 33, 2)):
        q, k, _ = queries_keys(3, 4, hk, m, n, 16, torch.float32)
        check_against_truth(q, k, **key_terms(terms, 3, 4, n), **order)


@pytest.mark.parametrize("weight", ["none", "row", "sample", "head", "one", "shared head"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_groups_and_weights(group: str, weight: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1 << 19, 2000):
        monkeypatch.setattr(blocked, "_BLOCK_ELEMENTS", block)
        for m in (1, 31):
            q, k, _ = queries_keys(3, 6, 2, m, 45, 24, torch.float32)
            kw = {"group": group, "softcap": softcap, "scale": 0.3}
            check_against_truth(q, k, weight_of(weight, 3, 6, m), **kw)


def test_laws() -> None:
    """Ones sum to the number of queries; repeated keys count as log size; samples do not see one another."""
    q, k, _ = queries_keys(3, 2, 2, 29, 40, 16, torch.float64)
    scores = column_scores(q, k)
    torch.testing.assert_close(scores.sum(-1), torch.full((3, 2), 29.0).double())
    torch.testing.assert_close(column_scores(q.flip(0), k.flip(0)), scores.flip(0))
    size = torch.tensor([3, 1] * 20)
    bias = size.double().log().expand(3, 40)
    repeated = column_scores(q, k.repeat_interleave(size, 2))
    owner = torch.arange(40).repeat_interleave(size)
    summed = torch.zeros(3, 2, 40).double().index_add_(2, owner, repeated)
    torch.testing.assert_close(column_scores(q, k, bias=bias), summed)
    one_hot = torch.zeros(29).double().index_fill_(0, torch.tensor(0), 1.0)
    torch.testing.assert_close(column_scores(q, k, one_hot), column_scores(q[:, :, :1], k))


def test_rows_that_see_nothing() -> None:
    q, k, _ = queries_keys(2, 2, 2, 6, 4, 8, torch.float32)
    mask = torch.tensor([[False] * 4, [True] * 4])
    scores = column_scores(q, k, key_mask=mask)
    assert (scores[0] == 0).all()
    torch.testing.assert_close(scores[1].sum(-1), torch.full((2,), 6.0))
    assert (row_lse(q, k, key_mask=mask)[0] == -torch.inf).all()
    # More queries than keys: the first two come before every key.
    torch.testing.assert_close(column_scores(q, k, causal=True).sum(-1), torch.full((2, 2), 4.0))


@pytest.mark.parametrize(("b", "m", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b: int, m: int, n: int) -> None:
    q, k = torch.randn(b, 2, m, 8), torch.randn(b, 2, n, 8)
    assert column_scores(q, k).shape == (b, 2, n)
    assert (column_scores(q, k) == 0).all()
    assert column_statistics(q, k, group="none").max.shape == (b, 2, n)


def test_memory_stays_small() -> None:
    """The largest block is far smaller than the matrix of weights."""
    q, k, _ = queries_keys(2, 8, 8, 577, 577, 64, torch.float32)
    _, plan, buffer = blocked._inputs(q, k, None, None, None, None, score_options(d=64))
    assert len(plan) > 1
    assert buffer.numel() * 10 <= 2 * 8 * 577 * 577


@pytest.mark.parametrize("function", [column_scores, column_statistics])
def test_gradients(function: Callable[..., Any]) -> None:
    q, k, _ = (x.requires_grad_() for x in queries_keys(2, 4, 2, 5, 6, 4, torch.float64))
    weight = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return function(q, k, weight, bias=bias, causal=True, group="mean", softcap=3.0)

    assert torch.autograd.gradcheck(call, (q, k, weight, bias))


def test_gradients_of_the_operators() -> None:
    """The registered operators, whose backward evaluates the definition again sample by sample."""
    q, k, _ = (x.requires_grad_() for x in queries_keys(2, 2, 1, 3, 4, 2, torch.float64))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    lse = row_lse(q, k).detach().requires_grad_()
    rest = (0.5, False, 0, 0.0, "mean")
    for op in (torch.ops.tokred.column_scores, torch.ops.tokred.column_statistics):
        assert torch.autograd.gradcheck(
            lambda q, k, w, s, op=op: op(q, k, w, s, None, None, *rest), (q, k, weight, lse)
        )
        assert torch.autograd.gradcheck(lambda q, k, op=op: op(q, k, None, None, None, None, *rest), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: torch.ops.tokred.row_lse(q, k, None, None, 0.5, True, 0, 0.0), (q, k))


@pytest.mark.parametrize(("layout", "grad"), [("contiguous", False), ("rows", True)])
def test_opcheck(layout: str, grad: bool) -> None:
    q, k, _ = (x.requires_grad_(grad) for x in queries_keys(2, 4, 2, 5, 6, 8, torch.float32, layout=layout))
    bias, mask = torch.randn(2, 6), torch.rand(2, 6) > 0.3
    rest = (0.3, True, 4, 2.0, "max")
    plain = (q, k, None, None, None, None, 0.3, False, 0, 0.0, "none")
    torch.library.opcheck(torch.ops.tokred.column_scores.default, plain)
    torch.library.opcheck(torch.ops.tokred.column_scores.default, (q, k, torch.rand(5), None, bias, mask, *rest))
    if grad:  # the three backwards share their code, and tracing one takes seconds
        return
    torch.library.opcheck(torch.ops.tokred.column_statistics.default, (q, k, None, None, bias, mask, *rest))
    torch.library.opcheck(torch.ops.tokred.row_lse.default, (q, k, bias, mask, 0.3, True, 4, 2.0))


@pytest.mark.hosts  # half a minute of a compiler; in every run that of decode attention
def test_compile_sees_through() -> None:
    compiled = torch.compile(lambda q, k, w: column_scores(q, k, w, causal=True, group="mean"), fullgraph=True)
    for n in (33, 47):
        q, k, _ = queries_keys(2, 4, 2, n, n, 16, torch.float32)
        w = torch.rand(2, n)
        torch.testing.assert_close(compiled(q, k, w), column_scores(q, k, w, causal=True, group="mean"))
    with torch.no_grad():
        eager = column_statistics(q, k)
        found = torch.compile(column_statistics, fullgraph=True)(q, k)
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("q and k", {"k": torch.randn(2, 2, 5, 8).double()}, TypeError),
        ("heads", {"k": torch.randn(2, 3, 5, 8)}, ValueError),
        ("channels", {"k": torch.randn(2, 2, 5, 9)}, ValueError),
        ("q and k", {"q": torch.randn(4, 6, 8)}, ValueError),
        ("weight", {"weight": torch.rand(7)}, ValueError),
        ("weight", {"weight": torch.ones(6, dtype=torch.int64)}, TypeError),
        ("lse", {"lse": torch.rand(2, 4, 5)}, ValueError),
        ("bias", {"bias": torch.rand(2, 1, 1, 5)}, ValueError),
        ("bias", {"bias": torch.ones(2, 5, dtype=torch.bool)}, TypeError),
        ("key_mask", {"key_mask": torch.ones(2, 5)}, TypeError),
        ("key_mask", {"key_mask": torch.ones(5, dtype=torch.bool)}, ValueError),
        ("window", {"window": 0}, ValueError),
        ("softcap", {"softcap": -1.0}, ValueError),
        ("group", {"group": "median"}, ValueError),
    ],
)
def test_errors_name_the_argument(name: str, change: dict[str, Any], error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"q": torch.randn(2, 4, 6, 8), "k": torch.randn(2, 2, 5, 8), **change}
    with pytest.raises(error, match=name):
        column_scores(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_why_not_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = queries_keys(1, 2, 2, 3, 4, 8, torch.float32)
    assert "cuda" in str(why_not_kernel(q, k)) or "triton" in str(why_not_kernel(q, k))
    monkeypatch.setenv("TOKRED_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="column_scores"):
        column_scores(q, k)


@pytest.mark.hosts  # half a minute; those of other kernels are in every run
def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("m", "n", "d", "hk", "dtype"),
    [
        (70, 70, 24, 4, torch.bfloat16),
        (1, 140, 80, 2, torch.float16),
        (5, 300, 16, 1, torch.float32),
        (70, 33, 40, 2, torch.float32),
        (3, 1, 8, 4, torch.bfloat16),
    ],
)
def test_kernel_parity(m: int, n: int, d: int, hk: int, dtype: torch.dtype, nan_memory: None) -> None:
    q, k, _ = queries_keys(2, 4, hk, m, n, d, dtype)
    check_against_truth(q, k)


@pytest.mark.interpret
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("terms", ["head bias", "both", "dead"])
def test_kernel_options(terms: str, group: str, nan_memory: None) -> None:
    orders: tuple[dict[str, Any], ...] = ({"causal": True}, {"causal": True, "window": 7, "softcap": 2.0})
    for order, (m, n), weight in zip(orders, ((33, 33), (17, 40)), ("head", "row"), strict=True):
        q, k, _ = queries_keys(2, 4, 2, m, n, 16, torch.float32)
        check_against_truth(q, k, weight_of(weight, 2, 4, m), **key_terms(terms, 2, 4, n), **order, group=group)


@pytest.mark.interpret
def test_kernel_more_queries_than_keys_and_expanded(nan_memory: None) -> None:
    q, k, _ = queries_keys(3, 2, 2, 80, 20, 16, torch.float32, layout="expanded")
    check_against_truth(q, k, causal=True)
    check_against_truth(q, k, window=5)
    wanted = row_lse_reference(q.double(), k.double(), None, None, score_options(d=16, causal=True))
    torch.testing.assert_close(row_lse(q, k, causal=True).double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_give_what_the_same_values_give_in_float32(dtype: torch.dtype, grad: bool) -> None:
    """Products that are rounded to half precision lead to other choices."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 19, 8, generator=g).to(dtype) for h in (4, 2))
    w = torch.rand(2, 4, 19, generator=g)
    runs = {
        "all": lambda q, k: column_scores(q, k, w),
        "row": lambda q, k: column_scores(q[:, :, :1], k),
        "statistics": lambda q, k: column_statistics(q, k, w).sum_squares,
        "power": lambda q, k: column_power(q, k, w, 3),
        "lse": row_lse,
    }
    for name, run in runs.items():
        wide, low = q.float().requires_grad_(grad), q.clone().requires_grad_(grad)
        expected = run(wide, k.float())
        assert torch.equal(run(low, k), expected), name
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(low, k), expected), name
            assert torch.equal(run(wide, k.float()), expected), name
