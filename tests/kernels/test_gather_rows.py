"""``gather_rows``, ``gather_cache`` and ``gather_cache_``: parity, in-place moves, operators, compilation, laws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import rows
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.gather_rows import gather_cache, gather_cache_, gather_rows, reference, why_not_kernel

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool)


def picks(lead: tuple[int, ...], n: int, k: int, *, ascending: bool = False, seed: int = 0) -> Tensor:
    """k of n rows, for every leading index its own."""
    order = torch.rand(*lead, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :k]
    return order.sort(-1).values if ascending else order


def heads(batch: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return rows(batch * h, n, d, dtype, seed).view(batch, h, n, d)


def cache(batch: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (of another width) and positions."""
    positions = torch.arange(n, dtype=torch.int32).mul(3).expand(batch, h, n).contiguous()
    return heads(batch, h, n, d, dtype), heads(batch, h, n, d + 2, dtype, 4), positions


def oracle(x: Tensor, index: Tensor) -> Tensor:
    """Row by row."""
    if x.ndim == 3:
        return torch.stack([x[b, index[b].tolist()] for b in range(x.shape[0])])
    per_head = index if index.ndim == 3 else index.unsqueeze(1).expand(-1, x.shape[1], -1)
    return torch.stack(
        [torch.stack([x[b, h, per_head[b, h].tolist()] for h in range(x.shape[1])]) for b in range(x.shape[0])]
    )


class TestGather:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.usefixtures("nan_memory")
    def test_against_loop(self, dtype: torch.dtype) -> None:
        for batch, n, k in ((1, 63, 31), (3, 197, 100), (2, 5, 5), (1, 1, 1), (2, 6, 0)):
            x = rows(batch, n, 4).to(dtype)
            index = picks((batch,), n, k)
            found = gather_rows(x, index)
            assert found.dtype == dtype
            assert torch.equal(found, oracle(x, index))
            packed = heads(batch, 3, n, 4).to(dtype)
            for own in (index, picks((batch, 3), n, k)):
                assert torch.equal(gather_rows(packed, own), oracle(packed, own))

    def test_strides(self) -> None:
        index, own = picks((2,), 13, 7), picks((2, 3), 13, 7)
        views = {
            "heads last": heads(2, 13, 3, 4).transpose(1, 2),
            "packed qkv": rows(2, 13, 3 * 3 * 4).view(2, 13, 3, 3, 4)[:, :, 1].transpose(1, 2),
            "front of a buffer": heads(2, 3, 20, 4)[:, :, :13],
            "rows skipped": heads(2, 3, 26, 4)[:, :, ::2],
            "expanded heads": heads(2, 1, 13, 4).expand(2, 3, 13, 4),
            "channels cut": heads(2, 3, 13, 5)[..., 1:],
            "channels first": heads(2, 3, 4, 13).transpose(2, 3),
        }
        for name, x in views.items():
            for chosen in (index, own, index[:1].expand(2, -1), own.transpose(0, 1).contiguous().transpose(0, 1)):
                assert torch.equal(gather_rows(x, chosen), oracle(x, chosen)), name
                assert torch.equal(gather_rows(x.clone().requires_grad_(), chosen), oracle(x, chosen)), name

    def test_repeated_rows_and_gradient(self) -> None:
        index = torch.tensor([[0, 2, 2], [1, 1, 1]])
        x = rows(2, 4, 3, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), (x,))
        packed = heads(2, 2, 4, 3, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), (packed,))
        assert torch.autograd.gradcheck(lambda x: gather_rows(x, picks((2, 2), 4, 3)), (packed,))


class TestCache:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.usefixtures("nan_memory")
    def test_copies(self, dtype: torch.dtype) -> None:
        for batch, n, k in ((1, 63, 31), (3, 17, 17), (2, 9, 0)):
            given_cache, index = cache(batch, 2, n, 4, dtype), picks((batch, 2), n, k)
            found = gather_cache(*given_cache, index)
            expected = [oracle(t, index) for t in given_cache[:2]]
            assert torch.equal(found.keys, expected[0])
            assert torch.equal(found.values, expected[1])
            assert torch.equal(found.positions, index.int() * 3)
            assert found.positions.dtype == torch.int32

    def test_into_given_tensors(self) -> None:
        given_cache, index = cache(2, 2, 17, 4), picks((2, 2), 17, 5)
        buffer = [torch.full((2, 2, 9, *t.shape[3:]), 7, dtype=t.dtype) for t in given_cache]
        out = tuple(t[:, :, 2:7] for t in buffer)
        found = gather_cache(*given_cache, index, out=out)
        for given_out, ours, expected in zip(out, found, gather_cache(*given_cache, index), strict=True):
            assert ours is given_out
            assert torch.equal(ours, expected)
        whole = tuple(torch.empty_like(t) for t in found)
        for ours, expected in zip(gather_cache(*given_cache, index, out=whole), found, strict=True):
            assert torch.equal(ours, expected)
        for t in buffer:
            assert bool((t[:, :, :2] == 7).all())
            assert bool((t[:, :, 7:] == 7).all())

    @pytest.mark.parametrize("chunk", [1, 12, 4096])
    def test_in_place(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "_CHUNK", chunk)
        for k in (0, 1, 8, 17):
            index = picks((2, 2), 17, k, ascending=True)
            given_cache = cache(2, 2, 17, 4)
            if chunk == 12:  # channels that no table of rows can describe
                given_cache = (given_cache[0].mT.contiguous().mT, *given_cache[1:])
            expected = gather_cache(*given_cache, index)
            found = gather_cache_(*given_cache, index)
            for ours, other, whole in zip(found, expected, given_cache, strict=True):
                assert torch.equal(ours, other)
                assert k == 0 or ours.data_ptr() == whole.data_ptr()
                assert ours.shape[2] == k

    def test_in_place_in_a_larger_buffer(self) -> None:
        buffers = cache(2, 2, 30, 4)
        views = tuple(t[:, :, 5:22] for t in buffers)
        before = [t.clone() for t in buffers]
        index = picks((2, 2), 17, 9, ascending=True)
        expected = gather_cache(*views, index)
        for ours, other in zip(gather_cache_(*views, index), expected, strict=True):
            assert torch.equal(ours, other)
        for now, then in zip(buffers, before, strict=True):
            assert torch.equal(now[:, :, :5], then[:, :, :5])
            assert torch.equal(now[:, :, 14:], then[:, :, 14:])


class TestErrors:
    def test_gather(self) -> None:
        x = rows(2, 6, 3)
        with pytest.raises(TypeError, match=r"index must be an int64 tensor, got torch.float32"):
            gather_rows(x, torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"x must be \(B, N, C\) or \(B, H, N, D\), got \(6, 3\)"):
            gather_rows(x[0], torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"index has shape \(3, 3\), expected \(2, any\)"):
            gather_rows(x, torch.zeros(3, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"index has shape \(2, 4, 3\), expected \(2, 5, any\)"):
            gather_rows(heads(2, 5, 6, 3), torch.zeros(2, 4, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="index is on meta, the rows are on cpu"):
            gather_rows(x, torch.zeros(2, 3, dtype=torch.int64, device="meta"))

    def test_cache(self) -> None:
        keys, values, positions = cache(2, 2, 6, 3)
        index = picks((2, 2), 6, 3)
        with pytest.raises(ValueError, match="keys must be"):
            gather_cache(keys[0], values, positions, index)
        with pytest.raises(ValueError, match=r"values has shape \(2, 2, 5, 5\), expected \(2, 2, 6, any\)"):
            gather_cache(keys, values[:, :, :5], positions, index)
        with pytest.raises(ValueError, match="positions has shape"):
            gather_cache(keys, values, positions[0], index)
        with pytest.raises(TypeError, match="positions must have an integer type"):
            gather_cache(keys, values, positions.float(), index)
        with pytest.raises(ValueError, match="index has shape"):
            gather_cache(keys, values, positions, index[:, :1])
        with pytest.raises(ValueError, match="out must hold keys, values and positions, got 2"):
            gather_cache(keys, values, positions, index, out=(keys, values))  # type: ignore[arg-type]
        out = gather_cache(keys, values, positions, index)
        with pytest.raises(ValueError, match="out values has shape"):
            gather_cache(keys, values, positions, index, out=(out.keys, values, out.positions))
        with pytest.raises(ValueError, match=r"out positions is torch.int64 on cpu, expected torch.int32 on cpu"):
            gather_cache(keys, values, positions, index, out=(out.keys, out.values, out.positions.long()))

    def test_debug_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKRED_DEBUG", "1")
        with pytest.raises(ValueError, match="index holds indices from 0 to 6, allowed are 0 to 5"):
            gather_rows(rows(1, 6, 3), torch.tensor([[0, 6]]))
        with pytest.raises(ValueError, match="index must ascend strictly"):
            gather_cache_(*cache(1, 1, 6, 3), torch.tensor([[[0, 3, 3]]]))
        gather_cache_(*cache(1, 1, 6, 3), torch.tensor([[[0, 3, 4]]]))


class TestDispatch:
    def test_reasons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert why_not_kernel(rows(1, 3, 2)) is not None
        monkeypatch.setattr(dispatch, "device_refusals", lambda tensor: [])
        assert why_not_kernel(rows(1, 3, 2)) is None
        assert "empty" in str(why_not_kernel(rows(1, 0, 2)))
        assert "float64" in str(why_not_kernel(rows(1, 3, 2, torch.float64).requires_grad_()))

    def test_forced_kernel_says_why_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKRED_KERNELS", "triton")
        with pytest.raises(RuntimeError, match="gather_rows cannot run its kernel"):
            gather_rows(rows(1, 3, 2), picks((1,), 3, 2))


class TestOperators:
    @pytest.mark.parametrize("recorded", [True, False])
    def test_opcheck_gather(self, recorded: bool) -> None:
        op = torch.ops.tokred.gather_rows.default
        holes = picks((2,), 6, 3) - 1
        torch.library.opcheck(op, (rows(2, 6, 3).requires_grad_(recorded), holes, True))
        permuted = heads(2, 6, 3, 4).transpose(1, 2).requires_grad_(recorded)
        torch.library.opcheck(op, (permuted, picks((2, 3), 6, 4), False))
        torch.library.opcheck(op, (permuted, picks((2,), 6, 4), False))

    @pytest.mark.parametrize("recorded", [True, False])
    def test_opcheck_segment_sum(self, recorded: bool) -> None:
        op = torch.ops.tokred.segment_sum.default
        x, keys = rows(2, 6, 3).requires_grad_(recorded), picks((2,), 6, 6) - 1
        torch.library.opcheck(op, (x, keys, None, None, 4 + 1))
        torch.library.opcheck(op, (x, keys[:, :4], picks((2,), 6, 4, seed=1), torch.rand(2, 4), 5))

    def test_opcheck_cache(self) -> None:
        arguments = (*cache(2, 2, 6, 3), picks((2, 2), 6, 3, ascending=True))
        torch.library.opcheck(torch.ops.tokred.gather_cache.default, arguments)
        torch.library.opcheck(torch.ops.tokred.gather_cache_.default, arguments)
        out = [torch.empty_like(t) for t in gather_cache(*arguments)]
        torch.library.opcheck(torch.ops.tokred.gather_cache_out.default, (*arguments, *out))

    def test_registered_gradients(self) -> None:
        gather, add = torch.ops.tokred.gather_rows.default, torch.ops.tokred.segment_sum.default
        x = rows(2, 6, 3, torch.float64).requires_grad_()
        packed = heads(2, 2, 6, 3, torch.float64).requires_grad_()
        holes = torch.tensor([[0, -1, 2, 2], [5, 1, -1, 1]])
        cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
            (lambda x: gather(x, holes, True), x),
            (lambda x: gather(x, holes.clamp(min=0), False), packed),
            (lambda x: gather(x, picks((2, 2), 6, 3), False), packed),
            (lambda x: add(x[:, :4], holes, None, None, 6), x),
            (lambda x: add(x, holes, holes.flip(1).clamp(min=0), torch.ones(2, 4) * 0.5, 6), x),
        ]
        for function, leaf in cases:
            assert torch.autograd.gradcheck(function, (leaf,))
            assert torch.autograd.gradgradcheck(function, (leaf,))


class TestCompile:
    def test_sees_through(self) -> None:
        def step(x: Tensor, index: Tensor, keys: Tensor, values: Tensor, positions: Tensor, own: Tensor) -> Tensor:
            copied = gather_cache(keys, values, positions, own)
            moved = gather_cache_(keys.clone(), values.clone(), positions.clone(), own)
            return gather_rows(x, index).sum() + (copied.values - 2 * moved.values).sum() + moved.positions.sum()

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n, k in ((21, 8), (18, 5)):
                arguments = (rows(2, n, 4), picks((2,), n, k), *cache(2, 3, n, 4), picks((2, 3), n, k, ascending=True))
                torch.testing.assert_close(compiled(*arguments), step(*arguments))

    def test_default_backend(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(gather_rows, fullgraph=True, dynamic=True)
        for n, k in ((21, 6), (18, 5)):
            x, index = heads(2, 3, n, 4), picks((2, 3), n, k)
            assert torch.equal(compiled(x, index), oracle(x, index))


class TestLaws:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 10**6), st.data())
    def test_composition_and_order(self, batch: int, n: int, seed: int, data: st.DataObject) -> None:
        k = data.draw(st.integers(1, n))
        m = data.draw(st.integers(1, k))
        x = rows(batch, n, 3)
        first, second = picks((batch,), n, k, seed=seed), picks((batch,), k, m, seed=seed + 1)
        twice = gather_rows(gather_rows(x, first), second)
        assert torch.equal(twice, gather_rows(x, first.gather(1, second)))
        everything = torch.arange(n).expand(batch, -1)
        assert torch.equal(gather_rows(x, everything), x)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 10**6), st.data())
    def test_in_place_equals_copy(self, batch: int, n: int, seed: int, data: st.DataObject) -> None:
        k = data.draw(st.integers(1, n))
        index, given_cache = picks((batch, 2), n, k, ascending=True, seed=seed), cache(batch, 2, n, 3)
        expected = gather_cache(*given_cache, index)
        for ours, other in zip(gather_cache_(*given_cache, index), expected, strict=True):
            assert torch.equal(ours, other)


def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_gather_rows_kernels.py")))
