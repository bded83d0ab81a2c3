"""``merge_rows`` and its kin against a loop over groups, and the published examples."""

from __future__ import annotations

import math

import pytest
import torch
from row_cases import Case, assert_as_good, make, members, oracle, per_row, rows
from torch import Tensor

from tokred.kernels.merge_rows import MODES, merge_rows, merge_rows_norm, merge_sizes, unmerge_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


SHAPES = [(1, 63, 20), (3, 63, 31), (2, 197, 16), (3, 5, 0), (1, 1, 0), (2, 6, 5)]


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.usefixtures("nan_memory", "drops_by")
    def test_against_loop(self, mode: str, dtype: torch.dtype) -> None:
        for batch, n, r in SHAPES if mode != "mlerp" else SHAPES[1:]:
            case, x = make(batch, n, r), rows(batch, n, 5, dtype)
            for size in (None, per_row(batch, n, 1)):
                for weight in (None, per_row(batch, n, 2)):
                    exact = oracle(x, case, size, weight, mode)
                    plain = oracle(x, case, size, weight, mode, dtype)
                    for recorded in (False, True):
                        given = x.clone().requires_grad_(recorded)
                        ours = merge_rows(given, *case, size=size, weight=weight, mode=mode)
                        assert ours.dtype == dtype
                        assert ours.shape == exact.shape
                        assert_as_good(ours.detach(), exact, plain)

    @pytest.mark.parametrize("mode", MODES)
    def test_strides(self, mode: str) -> None:
        batch, n, c = 3, 31, 6
        case, size = make(batch, n, 9), per_row(batch, n, 1)
        views = {
            "prefix cut off": rows(batch, n + 2, c)[:, 2:],
            "packed": rows(batch, n, 3 * c).view(batch, n, 3, c)[:, :, 1],
            "transposed": rows(n, batch, c).transpose(0, 1),
            "channels first": rows(batch, c, n).transpose(1, 2),
            "every other": rows(batch, 2 * n, c)[:, ::2],
            "channels cut": rows(batch, n, c + 1)[..., :c],
            "expanded batch": rows(1, n, c).expand(batch, n, c),
            "expanded rows": rows(batch, 1, c).expand(batch, n, c),
        }
        shared = Case(*(t[:1].expand(batch, -1) for t in case))
        for name, x in views.items():
            for reduction in (case, shared):
                expected = merge_rows(x.contiguous(), *reduction, size=size, mode=mode)
                for strided in (size, size.t().contiguous().t()):
                    assert torch.equal(merge_rows(x, *reduction, size=strided, mode=mode), expected), name
                recorded = merge_rows(x.clone().requires_grad_(), *reduction, size=size, mode=mode)
                torch.testing.assert_close(recorded.detach(), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.usefixtures("drops_by")
    def test_singletons_are_their_row(self, mode: str, dtype: torch.dtype) -> None:
        case, x, size = make(3, 63, 6), rows(3, 63, 7, dtype), per_row(3, 63, 1)
        out = merge_rows(x, *case, size=size, mode=mode)
        for b in range(3):
            for m in range(57):
                if len(members(case, b, m)) == 1:
                    assert torch.equal(out[b, m], x[b, case.representative[b, m]])

    @pytest.mark.parametrize("mode", ["mean", "max", "mlerp", "keep"])
    def test_constant_stays(self, mode: str) -> None:
        case = make(2, 40, 30, drops=False)
        x = rows(1, 1, 9).expand(2, 40, 9)
        out = merge_rows(x, *case, size=per_row(2, 40, 1), mode=mode)
        torch.testing.assert_close(out, x[:, :10], rtol=4e-7, atol=0)

    @pytest.mark.parametrize("mode", ["mean", "sum", "max", "mlerp"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.usefixtures("drops_by")
    def test_dropped_rows_leave_no_trace(self, mode: str, dtype: torch.dtype) -> None:
        case = make(2, 12, 6)
        x = rows(2, 12, 4, dtype)
        for b in range(2):
            x[b, case.source[b][case.target[b] < 0]] = math.nan
        clean = x.nan_to_num(0.0)
        assert torch.equal(merge_rows(x, *case, mode=mode), merge_rows(clean, *case, mode=mode))
        none = case._replace(target=torch.full_like(case.target, -1))
        expected = merge_rows(x, *case, mode="keep")
        assert torch.equal(merge_rows(x, *none, mode=mode), expected)

    def test_without_weight_the_representative_stays(self) -> None:
        case = make(2, 12, 6, drops=False)
        x = rows(2, 12, 4)
        out = merge_rows(x, *case, weight=torch.zeros(2, 12))
        assert torch.equal(out, merge_rows(x, *case, mode="keep"))

    def test_empty(self) -> None:
        none = torch.empty(2, 0, dtype=torch.int64)
        assert merge_rows(rows(2, 3, 4), none, none, none).shape == (2, 0, 4)
        assert merge_sizes(None, none, none, none, 3).shape == (2, 0)


class TestCards:
    """The published examples."""

    tome = Case(torch.tensor([[0, 6, 1, 3, 5]]), torch.tensor([[2, 4]]), torch.tensor([[2, 3]]))

    def test_tome_example_1(self) -> None:
        x = torch.arange(1.0, 8).view(1, 7, 1)
        out = merge_rows(x, *self.tome)
        assert out.flatten().tolist() == [1, 7, 2.5, 4.5, 6]
        assert merge_sizes(None, *self.tome, 7).tolist() == [[1, 1, 2, 2, 1]]
        index = torch.tensor([[0, 2, 2, 3, 3, 4, 1]])
        assert unmerge_rows(out, index).flatten().tolist() == [1, 2.5, 2.5, 4.5, 4.5, 6, 7]

    def test_tome_example_2(self) -> None:
        case = Case(torch.tensor([[0, 4, 1, 3]]), torch.tensor([[2]]), torch.tensor([[2]]))
        size = torch.tensor([[1.0, 1, 2, 2, 1]])
        out = merge_rows(torch.tensor([1, 7, 2.5, 4.5, 6]).view(1, 5, 1), *case, size=size)
        torch.testing.assert_close(out.flatten(), torch.tensor([1, 6, 4, 4.5]))
        assert merge_sizes(size, *case, 5).tolist() == [[1, 1, 3, 2]]

    def test_tome_gradient(self) -> None:
        x = torch.arange(1.0, 8).view(1, 7, 1).requires_grad_()
        merge_rows(x, *self.tome).flatten().dot(torch.arange(1.0, 6)).backward()
        assert x.grad is not None
        assert x.grad.flatten().tolist() == [1, 1.5, 1.5, 2, 2, 5, 2]

    def test_tofu_mlerp(self) -> None:
        case = Case(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]]))
        out = merge_rows(torch.tensor([[[3.0, 0], [0, 1]]]), *case, mode="mlerp")
        torch.testing.assert_close(out, torch.tensor([[[2.846050, 0.948683]]]), atol=1e-6, rtol=0)

    def test_mlerp_without_direction_takes_the_longest(self) -> None:
        case = Case(torch.tensor([[2]]), torch.tensor([[3, 0, 1]]), torch.tensor([[0, 0, 0]]))
        x = torch.tensor([[[2.0, 0], [0, 2], [-1, -1], [-1, -1]]])
        for given in (x, x.bfloat16(), x.clone().requires_grad_()):
            assert merge_rows(given, *case, mode="mlerp").tolist() == [[[2.0, 0.0]]]
        equal = torch.tensor([[[0.0, 1], [1, 0], [0, -1], [-1, 0]]])
        assert merge_rows(equal, *case, mode="mlerp").tolist() == [[[0.0, -1.0]]]

    def test_evit_fused_token(self) -> None:
        attention = torch.tensor([[0.20, 0.30, 0.05, 0.15, 0.22, 0.08]])
        x = torch.arange(1.0, 7).view(1, 6, 1)
        case = Case(torch.tensor([[1, 4, 0, 2]]), torch.tensor([[3, 5]]), torch.tensor([[3, 3]]))
        kept = torch.ones(1, 6).index_copy(1, torch.tensor([2, 3, 5]), attention[:, [2, 3, 5]])
        fused = merge_rows(x, *case, weight=kept, mode="sum")
        torch.testing.assert_close(fused.flatten(), torch.tensor([2, 5, 1, 1.23]))
        divided = merge_rows(x, *case, weight=attention)
        torch.testing.assert_close(divided.flatten(), torch.tensor([2, 5, 1, 4.392857]))


class TestGradients:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.usefixtures("drops_by")
    def test_gradcheck(self, mode: str) -> None:
        case = make(2, 9, 5)
        x = rows(2, 9, 3, torch.float64).requires_grad_()
        size = per_row(2, 9, 1).double().requires_grad_()
        weight = per_row(2, 9, 2).double().requires_grad_()

        def merged(x: Tensor, size: Tensor, weight: Tensor) -> Tensor:
            return merge_rows(x, *case, size=size, weight=weight, mode=mode)

        assert torch.autograd.gradcheck(merged, (x, size, weight))
        assert torch.autograd.gradcheck(lambda x: merge_rows(x, *case, mode=mode), (x,))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_loop(self, mode: str, dtype: torch.dtype) -> None:
        case, size = make(3, 33, 20), per_row(3, 33, 1)
        x = rows(3, 33, 4, dtype)
        seed = rows(3, 13, 4, seed=9).to(dtype)
        found = []
        for arithmetic in (None, torch.float64, dtype):
            leaf = x.clone().requires_grad_() if arithmetic is None else x.to(arithmetic).requires_grad_()
            if arithmetic is None:
                out = merge_rows(leaf, *case, size=size, mode=mode)
            else:
                out = oracle(leaf, case, size, None, mode, arithmetic)
            found.append(torch.autograd.grad(out, leaf, seed.to(out.dtype))[0])
        ours, exact, plain = found
        assert ours.dtype == dtype
        assert_as_good(ours, exact, plain)

    def test_a_repeated_representative_collects_all(self) -> None:
        case = Case(torch.tensor([[0, 1, 0]]), torch.tensor([[2, 0]]), torch.tensor([[0, -1]]))
        x = rows(1, 3, 2).requires_grad_()
        merge_rows(x, *case).backward(torch.ones(1, 3, 2))
        assert x.grad is not None
        assert x.grad[0, :, 0].tolist() == [1.5, 1, 0.5]


class TestSizesNormUnmerge:
    def test_sizes(self) -> None:
        case, size = make(3, 63, 31), per_row(3, 63, 1)
        for given in (None, size, size.bfloat16()):
            found = merge_sizes(given, *case, 63)
            counts = torch.ones(3, 63) if given is None else given.float()
            expected = [[float(counts[b, members(case, b, m)].sum()) for m in range(32)] for b in range(3)]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.tensor(expected))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("affine", [True, False])
    def test_norm_is_the_composition(self, dtype: torch.dtype, affine: bool) -> None:
        case, x = make(2, 20, 7), rows(2, 20, 8, dtype)
        layer = torch.nn.LayerNorm(8, eps=1e-3, elementwise_affine=affine).to(dtype)
        found = merge_rows_norm(x, *case, layer.weight, layer.bias, 1e-3, size=per_row(2, 20, 1))
        assert torch.equal(found.x, merge_rows(x, *case, size=per_row(2, 20, 1)))
        assert torch.equal(found.normed, layer(found.x))

    def test_norm_with_wide_parameters(self) -> None:
        case, x = make(2, 20, 7), rows(2, 20, 8, torch.bfloat16)
        weight, bias = torch.rand(8), torch.rand(8)
        found = merge_rows_norm(x, *case, weight, bias)
        expected = torch.nn.functional.layer_norm(found.x.float(), (8,), weight, bias).bfloat16()
        assert torch.equal(found.normed, expected)

    @pytest.mark.usefixtures("drops_by")
    def test_unmerge(self) -> None:
        y = rows(3, 7, 4)
        y[:, 0] = math.inf
        index = torch.randint(-1, 7, (3, 63), generator=torch.Generator().manual_seed(1))
        for given in (index, index.clamp(min=0), torch.full_like(index, -1)):
            out = unmerge_rows(y, given)
            for b in range(3):
                for n in range(63):
                    slot = int(given[b, n])
                    assert torch.equal(out[b, n], y[b, slot] if slot >= 0 else torch.zeros(4))

    @pytest.mark.usefixtures("drops_by")
    def test_unmerge_gradient(self) -> None:
        index = torch.randint(-1, 5, (2, 11), generator=torch.Generator().manual_seed(1))
        y = rows(2, 5, 3, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda y: unmerge_rows(y, index), (y,))
        seed = rows(2, 11, 3)
        expected = torch.zeros(2, 5, 3)
        for b in range(2):
            for n in range(11):
                if int(index[b, n]) >= 0:
                    expected[b, index[b, n]] += seed[b, n]
        leaf = y.detach().float().requires_grad_()
        (found,) = torch.autograd.grad(unmerge_rows(leaf, index), leaf, seed)
        torch.testing.assert_close(found, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"mode": "median"}, ValueError, "mode is 'median'; allowed are mean"),
            ({"x": torch.ones(2, 6)}, ValueError, r"x must be \(B, N, C\), got \(2, 6\)"),
            ({"x": torch.ones(2, 6, 3, dtype=torch.int32)}, TypeError, "x must be a float tensor, got torch.int32"),
            ({"representative": torch.zeros(2, 4)}, TypeError, "representative must be an int64 tensor"),
            ({"representative": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "representative has shape"),
            ({"source": [[1, 2]]}, TypeError, "source must be an int64 tensor, got list"),
            (
                {"target": torch.zeros(2, 3, dtype=torch.int64)},
                ValueError,
                r"target has shape \(2, 3\), expected \(2, 2\)",
            ),
            ({"size": torch.ones(2, 5)}, ValueError, r"size has shape \(2, 5\), expected \(2, 6\)"),
            ({"weight": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "weight must be a float tensor"),
            ({"size": torch.ones(2, 6, device="meta")}, ValueError, "size is on meta, the rows are on cpu"),
        ],
    )
    def test_named(self, change: dict[str, object], error: type[Exception], words: str) -> None:
        case = make(2, 6, 2)
        arguments = {"x": rows(2, 6, 3), **case._asdict(), **change}
        with pytest.raises(error, match=words):
            merge_rows(**arguments)  # type: ignore[arg-type]

    def test_others(self) -> None:
        case = make(2, 6, 2)
        with pytest.raises(ValueError, match=r"norm_weight has shape \(4,\), expected \(3\)"):
            merge_rows_norm(rows(2, 6, 3), *case, torch.ones(4), None)
        with pytest.raises(ValueError, match="size has shape"):
            merge_sizes(torch.ones(2, 5), *case, 6)
        with pytest.raises(TypeError, match="index must be an int64 tensor"):
            unmerge_rows(rows(2, 4, 3), torch.zeros(2, 6))
        with pytest.raises(ValueError, match=r"y must be \(B, M, C\)"):
            unmerge_rows(rows(2, 4, 3)[0], torch.zeros(2, 6, dtype=torch.int64))

    def test_ranges_in_debug_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKRED_DEBUG", "1")
        case = make(2, 6, 2)
        for name, bad in (("representative", 6), ("source", -1), ("target", 4), ("target", -2)):
            index = getattr(case, name).clone()
            index[1, 1] = bad
            with pytest.raises(ValueError, match=f"{name} holds indices"):
                merge_rows(rows(2, 6, 3), *case._replace(**{name: index}))
        with pytest.raises(ValueError, match="index holds indices from 0 to 4, allowed are -1 to 3"):
            unmerge_rows(rows(1, 4, 3), torch.tensor([[0, 4]]))
