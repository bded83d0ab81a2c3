"""The kernels of ``gather_rows`` in Triton's interpreter; ``test_gather_rows.py`` starts this file."""

from __future__ import annotations

import pytest
import torch
from row_cases import rows
from torch import Tensor

from tokred.kernels.gather_rows import gather_cache, gather_cache_, gather_rows, reference

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


def picks(lead: tuple[int, ...], n: int, k: int, *, ascending: bool = False) -> Tensor:
    order = torch.rand(*lead, n, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :k]
    return order.sort(-1).values if ascending else order


def heads(batch: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return rows(batch * h, n, d, dtype, seed).view(batch, h, n, d)


def cache(batch: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.arange(n, dtype=torch.int32).mul(3).expand(batch, h, n).contiguous()
    return heads(batch, h, n, d, dtype), heads(batch, h, n, d + 3, dtype, 4), positions


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs along the channels and few rows in each, as wide models have."""
    from tokred.kernels.gather_rows import triton as kernels

    monkeypatch.setattr(kernels, "WIDEST", 4)
    monkeypatch.setattr(kernels, "ELEMENTS", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_gather(dtype: torch.dtype) -> None:
    for batch, n, k in ((1, 63, 31), (3, 7, 7), (1, 1, 1), (2, 6, 0)):
        x, index = rows(batch, n, 5).to(dtype), picks((batch,), n, k)
        found = gather_rows(x, index)
        assert found.dtype == dtype
        assert torch.equal(found, reference.gather_rows(x, index))
        packed = heads(batch, 3, n, 5).to(dtype)
        for own in (index, picks((batch, 3), n, k)):
            assert torch.equal(gather_rows(packed, own), reference.gather_rows(packed, own))


@pytest.mark.usefixtures("narrow")
def test_many_programs() -> None:
    x, index = heads(2, 3, 13, 11), picks((2, 3), 13, 9)
    assert torch.equal(gather_rows(x, index), reference.gather_rows(x, index))


def test_strides() -> None:
    own = picks((2, 3), 13, 7)
    views = (
        heads(2, 13, 3, 4).transpose(1, 2),
        heads(2, 3, 20, 4)[:, :, :13],
        heads(2, 1, 13, 4).expand(2, 3, 13, 4),
        heads(2, 3, 4, 13).transpose(2, 3),
    )
    for x in views:
        for index in (own, own[:, 0], own[:1].expand(2, -1, -1), own.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(gather_rows(x, index), reference.gather_rows(x, index))


def test_gradient() -> None:
    for index in (torch.tensor([[0, 2, 2], [1, 1, 1]]), picks((2, 2), 4, 3)):
        x, seed = heads(2, 2, 4, 3).requires_grad_(), heads(2, 2, 3, 3, seed=9)
        (found,) = torch.autograd.grad(gather_rows(x, index), x, seed)
        (expected,) = torch.autograd.grad(reference.gather_rows(x, index), x, seed)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("limit", [0, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_sum(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.kernels.gather_rows import triton as kernels

    monkeypatch.setattr(kernels, "SCAN_LIMIT", limit)
    op = torch.ops.tokred.segment_sum.default
    generator = torch.Generator().manual_seed(5)
    x, keys = rows(2, 9, 5, dtype), torch.randint(-1, 6, (2, 12), generator=generator)
    slots, factors = torch.randint(0, 9, (2, 12), generator=generator), torch.rand(2, 12, generator=generator)
    for arguments in ((x, keys[:, :9], None, None, 6), (x, keys, slots, None, 6), (x, keys, slots, factors, 6)):
        exact = reference.segment_sum(arguments[0].double(), *arguments[1:])
        rounded = exact.to(dtype)
        torch.testing.assert_close(op(*arguments), rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(dtype: torch.dtype) -> None:
    for batch, n, k in ((1, 63, 31), (3, 9, 9), (2, 9, 0)):
        given, index = cache(batch, 2, n, 4, dtype), picks((batch, 2), n, k)
        for ours, expected in zip(gather_cache(*given, index), reference.gather_cache(*given, index), strict=True):
            assert torch.equal(ours, expected)


def test_cache_into_given_tensors() -> None:
    given, index = cache(2, 2, 17, 4), picks((2, 2), 17, 5)
    buffer = [torch.full((2, 2, 9, *t.shape[3:]), 7, dtype=t.dtype) for t in given]
    out = tuple(t[:, :, 2:7] for t in buffer)
    gather_cache(*given, index, out=out)
    for ours, whole, expected in zip(out, buffer, reference.gather_cache(*given, index), strict=True):
        assert torch.equal(ours, expected)
        assert bool((whole[:, :, :2] == 7).all())
        assert bool((whole[:, :, 7:] == 7).all())


@pytest.mark.parametrize("elements", [4096, 32])
def test_in_place(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.kernels.gather_rows import triton as kernels

    monkeypatch.setattr(kernels, "ELEMENTS", elements)
    for k in (0, 1, 30, 63):
        index = picks((2, 2), 63, k, ascending=True)
        buffers = cache(2, 2, 70, 12)
        views = tuple(t[:, :, 3:66] for t in buffers)
        before = [t.clone() for t in buffers]
        expected = reference.gather_cache(*views, index)
        for ours, other in zip(gather_cache_(*views, index), expected, strict=True):
            assert torch.equal(ours, other)
        for now, then in zip(buffers, before, strict=True):
            assert torch.equal(now[:, :, :3], then[:, :, :3])
            assert torch.equal(now[:, :, 3 + k :], then[:, :, 3 + k :])


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*cache(1, 2, 6, 3), picks((1, 2), 6, 3, ascending=True))
    torch.library.opcheck(torch.ops.tokred.gather_cache_.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.tokred.gather_cache.default, arguments, test_utils=tests)
    x = rows(2, 6, 3).requires_grad_()
    torch.library.opcheck(torch.ops.tokred.gather_rows.default, (x, picks((2,), 6, 3), False), test_utils=tests)
