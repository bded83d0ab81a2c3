"""The kernels of ``merge_rows`` in Triton's interpreter; ``test_merge_rows_registered.py`` starts this file."""

from __future__ import annotations

import math

import pytest
import torch
from row_cases import Case, assert_as_good, make, oracle, per_row, rows
from torch import Tensor

from tokred.kernels.merge_rows import MODES, merge_rows, merge_rows_norm, merge_sizes, reference, unmerge_rows

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.fixture(params=["scan", "scan in pieces", "sorted"])
def members_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways in which a program finds the members of its slots."""
    from tokred.kernels.gather_rows import triton as kernels

    if request.param == "sorted":
        monkeypatch.setattr(kernels, "SCAN_LIMIT", 0)
    if request.param == "scan in pieces":
        monkeypatch.setattr(kernels, "SCAN_BLOCK", 2)
    return request.param


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs along the channels and few rows in each, as wide models have."""
    from tokred.kernels.gather_rows import triton as kernels

    monkeypatch.setattr(kernels, "WIDEST", 4)
    monkeypatch.setattr(kernels, "ELEMENTS", 16)


def check(x: Tensor, case: Case, size: Tensor | None, weight: Tensor | None, mode: str) -> None:
    ours = merge_rows(x, *case, size=size, weight=weight, mode=mode)
    exact = oracle(x, case, size, weight, mode)
    assert ours.dtype == x.dtype
    assert_as_good(ours, exact, oracle(x, case, size, weight, mode, x.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("members_by")
def test_against_loop(mode: str) -> None:
    for batch, n, r in ((3, 13, 7), (1, 9, 8), (2, 4, 0), (1, 1, 0)):
        case = make(batch, n, r)
        for size, weight in ((None, None), (per_row(batch, n, 1), None), (per_row(batch, n, 1), per_row(batch, n, 2))):
            check(rows(batch, n, 5), case, size, weight, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(mode: str, dtype: torch.dtype) -> None:
    check(rows(2, 11, 6, dtype), make(2, 11, 6), per_row(2, 11, 1), None, mode)
    check(rows(2, 11, 6, dtype), make(2, 11, 6), None, per_row(2, 11, 1).to(dtype), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("narrow")
def test_many_programs(mode: str) -> None:
    check(rows(2, 21, 11), make(2, 21, 9), per_row(2, 21, 1), None, mode)


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_odd_lengths_and_strides(mode: str) -> None:
    case, size = make(2, 63, 20), per_row(63, 2, 1).t()
    shared = Case(*(t[:1].expand(2, -1) for t in case))
    for x in (rows(2, 65, 4)[:, 2:], rows(2, 63, 12).view(2, 63, 3, 4)[:, :, 1], rows(2, 4, 63).transpose(1, 2)):
        for reduction in (case, shared):
            found = merge_rows(x, *reduction, size=size, mode=mode)
            expected = reference.merge_rows(x, *reduction, size, None, mode)
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_singletons_drops_and_nan(mode: str) -> None:
    case = make(2, 12, 6)
    x = rows(2, 12, 4)
    for b in range(2):
        x[b, case.source[b][case.target[b] < 0]] = math.nan
    none = case._replace(target=torch.full_like(case.target, -1))
    keep = reference.merge_rows(x, *case, None, None, "keep")
    assert torch.equal(merge_rows(x, *none, size=per_row(2, 12, 1), mode=mode), keep)
    x[0, case.representative[0, 0]] = math.nan
    expected = reference.merge_rows(x, *case, None, None, mode)
    torch.testing.assert_close(merge_rows(x, *case, mode=mode), expected, equal_nan=True)


def test_nothing_weighs() -> None:
    case, x = make(2, 12, 6), rows(2, 12, 4)
    assert torch.equal(merge_rows(x, *case, weight=torch.zeros(2, 12)), merge_rows(x, *case, mode="keep"))


def test_mlerp_without_direction() -> None:
    case = Case(torch.tensor([[2]]), torch.tensor([[3, 0, 1]]), torch.tensor([[0, 0, 0]]))
    x = torch.tensor([[[2.0, 0], [0, 2], [-1, -1], [-1, -1]]])
    assert merge_rows(x, *case, mode="mlerp").tolist() == [[[2.0, 0.0]]]
    equal = torch.tensor([[[0.0, 1], [1, 0], [0, -1], [-1, 0]]])
    assert merge_rows(equal, *case, mode="mlerp").tolist() == [[[0.0, -1.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", ["both", "scale", "none"])
def test_norm(dtype: torch.dtype, affine: str) -> None:
    case, x, size = make(2, 13, 5), rows(2, 13, 6, dtype), per_row(2, 13, 1)
    weight = None if affine == "none" else torch.rand(6)
    bias = torch.rand(6) if affine == "both" else None
    found = merge_rows_norm(x, *case, weight, bias, 1e-3, size=size)
    assert torch.equal(found.x, merge_rows(x, *case, size=size))
    exact = torch.nn.functional.layer_norm(
        found.x.double(), (6,), *(None if t is None else t.double() for t in (weight, bias)), 1e-3
    )
    assert_as_good(found.normed, exact, reference.layer_norm(found.x, weight, bias, 1e-3))


@pytest.mark.parametrize("mode", ["mean", "sum", "keep"])
@pytest.mark.usefixtures("members_by")
def test_gradient(mode: str) -> None:
    case, seed = make(2, 13, 7), rows(2, 6, 5, seed=9)
    case.representative[0, 0] = case.representative[0, 1]
    for size, weight in ((None, None), (per_row(2, 13, 1), None), (per_row(2, 13, 1), per_row(2, 13, 2))):
        x = rows(2, 13, 5).requires_grad_()
        (found,) = torch.autograd.grad(merge_rows(x, *case, size=size, weight=weight, mode=mode), x, seed)
        (expected,) = torch.autograd.grad(reference.merge_rows(x, *case, size, weight, mode), x, seed)
        torch.testing.assert_close(found, expected)


def test_gradient_through_norm() -> None:
    case, size = make(2, 13, 7), per_row(2, 13, 1)
    x, weight, bias = rows(2, 13, 5).requires_grad_(), torch.rand(5).requires_grad_(), torch.rand(5).requires_grad_()
    seeds = [rows(2, 6, 5, seed=8), rows(2, 6, 5, seed=9)]
    found = torch.autograd.grad(list(merge_rows_norm(x, *case, weight, bias, size=size)), [x, weight, bias], seeds)
    merged = reference.merge_rows(x, *case, size, None, "mean")
    plain = [merged, reference.layer_norm(merged, weight, bias, 1e-5)]
    for ours, expected in zip(found, torch.autograd.grad(plain, [x, weight, bias], seeds), strict=True):
        torch.testing.assert_close(ours, expected)


def test_modes_whose_gradient_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = make(1, 7, 3), rows(1, 7, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="the gradient of mode 'max' is torch's"):
        merge_rows(x, *case, mode="max")
    monkeypatch.setenv("TOKRED_KERNELS", "auto")
    assert merge_rows(x, *case, mode="max").requires_grad


@pytest.mark.usefixtures("members_by")
def test_sizes() -> None:
    case, size = make(3, 13, 7), per_row(3, 13, 1)
    for given in (None, size, size.bfloat16()):
        found = merge_sizes(given, *case, 13)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, reference.merge_sizes(given, *case, 13))


@pytest.mark.usefixtures("members_by")
def test_unmerge() -> None:
    y = rows(2, 5, 3)
    y[:, 0] = math.inf
    index = torch.randint(-1, 5, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [torch.where((i >= 0)[:, None], r[i.clamp(min=0)], 0.0) for r, i in zip(y, index, strict=True)]
    )
    assert torch.equal(unmerge_rows(y, index), expected)
    leaf, seed = rows(2, 5, 3).requires_grad_(), rows(2, 13, 3)
    (found,) = torch.autograd.grad(unmerge_rows(leaf, index), leaf, seed)
    wide = leaf.detach().double().requires_grad_()
    table = torch.cat([wide, wide.new_zeros(2, 1, 3)], 1)
    plain = table.gather(1, index.where(index >= 0, 5)[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(found.double(), torch.autograd.grad(plain, wide, seed.double())[0], rtol=1e-6, atol=1e-6)


def test_the_same_bits_every_time() -> None:
    case, x = make(2, 21, 17), rows(2, 21, 4)
    size = per_row(2, 21, 1)
    assert torch.equal(merge_rows(x, *case, size=size), merge_rows(x, *case, size=size))


def test_opcheck_and_compile() -> None:
    case, x = make(2, 9, 4), rows(2, 9, 4).requires_grad_()
    arguments = (x, *case, per_row(2, 9, 1), None, "mean")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.tokred.merge_rows.default, arguments, test_utils=tests)
    compiled = torch.compile(lambda x, *case: merge_rows(x, *case), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, r in ((9, 4), (8, 3)):
        case, x = make(2, n, r), rows(2, n, 4)
        torch.testing.assert_close(compiled(x, *case), reference.merge_rows(x, *case, None, None, "mean"))
