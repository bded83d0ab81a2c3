"""``merge_rows``: dispatch, registered operators, compilation and laws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import Case, make, per_row, rows
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.merge_rows import MODES, merge_rows, merge_rows_norm, merge_sizes, unmerge_rows, why_not_kernel


class TestDispatch:
    def test_cpu_takes_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reason = why_not_kernel(rows(1, 3, 2))
        assert reason is not None
        assert "cpu" in reason or "triton" in reason
        monkeypatch.setenv("TOKRED_KERNELS", "triton")
        with pytest.raises(RuntimeError, match="merge_rows cannot run its kernel"):
            merge_rows(rows(1, 6, 2), *make(1, 6, 2))

    def test_reasons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "device_refusals", lambda tensor: [])
        x = rows(1, 3, 2)
        assert why_not_kernel(x) is None
        assert "float64" in str(why_not_kernel(x.double()))
        assert "empty" in str(why_not_kernel(x[:, :0]))
        assert "'mlerp'" in str(why_not_kernel(x.clone().requires_grad_(), mode="mlerp"))
        assert "sizes" in str(why_not_kernel(x, size=torch.ones(1, 3, requires_grad=True)))
        assert "8193 channels" in str(why_not_kernel(torch.ones(1, 1, 8193), norm=True))

    def test_importing_leaves_triton_alone(self) -> None:
        code = "import sys, tokred.kernels.merge_rows; print('triton' in sys.modules, 'torch._dynamo' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"]


def op_arguments(mode: str, recorded: bool, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    x = rows(2, 9, 4, dtype).requires_grad_(recorded)
    return (x, *make(2, 9, 4), per_row(2, 9, 1), per_row(2, 9, 2), mode)


class TestOperators:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("recorded", [True, False])
    def test_opcheck_merge(self, mode: str, recorded: bool) -> None:
        torch.library.opcheck(torch.ops.tokred.merge_rows.default, op_arguments(mode, recorded))

    @pytest.mark.parametrize("recorded", [True, False])
    def test_opcheck_others(self, recorded: bool) -> None:
        norm = (torch.rand(4).requires_grad_(recorded), torch.rand(4).requires_grad_(recorded), 1e-5)
        torch.library.opcheck(torch.ops.tokred.merge_rows_norm.default, (*op_arguments("mean", recorded), *norm))
        permuted = rows(9, 2, 4).transpose(0, 1).requires_grad_(recorded)
        arguments = (permuted, *make(2, 9, 4, seed=1), None, None, "mean")
        torch.library.opcheck(torch.ops.tokred.merge_rows.default, arguments)
        torch.library.opcheck(torch.ops.tokred.merge_rows_norm.default, (*arguments, None, None, 1e-5))

    @pytest.mark.parametrize("mode", MODES)
    def test_registered_gradient(self, mode: str) -> None:
        x, *reduction, size, weight, _ = op_arguments(mode, True, torch.float64)
        op = torch.ops.tokred.merge_rows.default
        for s, w in ((None, None), (size, None), (size, weight)):
            assert torch.autograd.gradcheck(lambda x, s=s, w=w: op(x, *reduction, s, w, mode), (x,))

    def test_registered_gradient_of_sizes_and_norm(self) -> None:
        x, *reduction, size, weight, mode = op_arguments("mean", True, torch.float64)
        assert isinstance(size, Tensor)
        assert isinstance(weight, Tensor)
        size, weight = size.double().requires_grad_(), weight.double().requires_grad_()
        op = torch.ops.tokred.merge_rows.default
        assert torch.autograd.gradcheck(lambda x, s, w: op(x, *reduction, s, w, mode), (x, size, weight))
        scale, shift = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        norm = torch.ops.tokred.merge_rows_norm.default
        assert torch.autograd.gradcheck(
            lambda x, a, b: norm(x, *reduction, None, None, "sum", a, b, 1e-5), (x, scale, shift)
        )

    def test_zero_weights_have_the_representatives_gradient(self) -> None:
        case, x = make(2, 9, 4, drops=False), rows(2, 9, 4).requires_grad_()
        seed, none = rows(2, 5, 4, seed=9), torch.zeros(2, 9)
        found = torch.autograd.grad(torch.ops.tokred.merge_rows(x, *case, None, none, "mean"), x, seed)[0]
        expected = torch.autograd.grad(merge_rows(x, *case, weight=none), x, seed)[0]
        assert torch.equal(found, expected)


class TestCompile:
    @pytest.mark.parametrize("mode", ["mean", "max", "mlerp"])
    def test_sees_through(self, mode: str) -> None:
        def step(x: Tensor, representative: Tensor, source: Tensor, target: Tensor, index: Tensor) -> Tensor:
            case = (representative, source, target)
            size = merge_sizes(None, *case, x.shape[1])
            merged, normed = merge_rows_norm(x, *case, None, None, mode=mode)
            return unmerge_rows((merged + normed) * size.unsqueeze(-1), index)

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n, r in ((21, 6), (18, 5), (15, 4)):
                case, x = make(2, n, r), rows(2, n, 4)
                index = torch.randint(-1, n - r, (2, n), generator=torch.Generator().manual_seed(n))
                torch.testing.assert_close(compiled(x, *case, index), step(x, *case, index))

    @pytest.mark.hosts
    def test_trains_in_the_default_backend(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, *case: merge_rows(x, *case), fullgraph=True, dynamic=True)
        for n, r in ((21, 6), (18, 5)):
            case, x = make(2, n, r), rows(2, n, 4).requires_grad_()
            seed = rows(2, n - r, 4, seed=9)
            found = torch.autograd.grad(compiled(x, *case), x, seed)[0]
            torch.testing.assert_close(found, torch.autograd.grad(merge_rows(x, *case), x, seed)[0])


@st.composite
def reductions(draw: Callable[[st.SearchStrategy[int]], int]) -> tuple[Case, int]:
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    r = draw(st.integers(0, n - 1))
    return make(batch, n, r, drops=bool(draw(st.integers(0, 1))), seed=draw(st.integers(0, 10**6))), n


class TestLaws:
    @settings(max_examples=60, deadline=None)
    @given(reductions())
    def test_totals(self, drawn: tuple[Case, int]) -> None:
        case, n = drawn
        batch = case.source.shape[0]
        x, size = rows(batch, n, 3, torch.float64), per_row(batch, n, 1)
        dropped = case.target < 0
        kept = size.scatter(1, case.source, torch.where(dropped, 0.0, size.gather(1, case.source)))
        merged, sizes = merge_rows(x, *case, size=size), merge_sizes(size, *case, n)
        total = (sizes.double().unsqueeze(-1) * merged).sum(1)
        torch.testing.assert_close(total, (kept.double().unsqueeze(-1) * x).sum(1), rtol=1e-5, atol=1e-5)
        assert torch.equal(merge_sizes(None, *case, n).sum(1), n - dropped.sum(1).float())
        torch.testing.assert_close(sizes.sum(1), kept.sum(1))

    @settings(max_examples=60, deadline=None)
    @given(reductions(), st.sampled_from(["mean", "max", "mlerp", "keep"]))
    def test_merging_what_was_unmerged(self, drawn: tuple[Case, int], mode: str) -> None:
        case, n = drawn
        batch, slots = case.representative.shape
        y = rows(batch, slots, 3, torch.float64)
        index = torch.full((batch, n), -1).scatter(1, case.source, case.target)
        index = index.scatter(1, case.representative, torch.arange(slots).expand(batch, -1))
        torch.testing.assert_close(merge_rows(unmerge_rows(y, index), *case, mode=mode), y, rtol=1e-12, atol=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(reductions(), st.sampled_from(MODES), st.randoms(use_true_random=False))
    def test_permuting_the_batch(self, drawn: tuple[Case, int], mode: str, random: object) -> None:
        case, n = drawn
        batch = case.source.shape[0]
        order = list(range(batch))
        random.shuffle(order)  # type: ignore[attr-defined]
        x, size = rows(batch, n, 3), per_row(batch, n, 1)
        moved = merge_rows(x[order], *(t[order] for t in case), size=size[order], mode=mode)
        assert torch.equal(moved, merge_rows(x, *case, size=size, mode=mode)[order])


@pytest.mark.hosts
def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_merge_rows_kernels.py")))
