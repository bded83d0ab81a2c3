"""similarity_rows: gradients, the registered operators, and the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.kernels import similarity_rows as op
from tokred.kernels.similarity_rows import reference, registration, torch_path

Rows = tuple[Tensor, Tensor]


def halves(batch: int, n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Rows:
    """The even and the odd rows of one tensor, as strided views."""
    m = torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return m[:, ::2], m[:, 1::2]


def sums(metric: str, **masks: Any) -> list[Callable[[Tensor, Tensor], Tensor]]:
    return [
        lambda a, b, f=function: op.similarity_sum(a, b, function=f, margin=0.1, alpha=0.6, metric=metric, **masks)
        for function in op.FUNCTIONS
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metric", op.METRICS)
def test_gradcheck(metric: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "CPU_BLOCK_BYTES", 64)
    masks = {"a_mask": torch.arange(5) != 2, "b_mask": torch.arange(4) != 1} if masked else {}
    a, b = (x.contiguous().requires_grad_() for x in halves(2, 9, 3))
    functions = [
        lambda a, b: op.best_match(a, b, metric=metric, **masks).score.nan_to_num(neginf=0),
        lambda a, b: op.similarity_topk(a, b, 4, metric=metric, **masks).score.nan_to_num(neginf=0),
        *sums(metric, **masks),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(functions[2], (a, b))


def test_gradients_equal_those_of_the_definition() -> None:
    a, b = (x.contiguous().requires_grad_() for x in halves(3, 63, 8))
    weight = torch.randn(3, 32, dtype=torch.float64)
    pairs = [(op.best_match(a, b).score, reference.top(a, b, 1, "cosine")[0][..., 0])]
    for ours, function in zip(sums("cosine"), op.FUNCTIONS, strict=True):
        pairs.append((ours(a, b), reference.total(a, b, function, 0.1, 0.6, "cosine")))
    for ours_value, expected in pairs:
        ours_grads = torch.autograd.grad((ours_value * weight).sum(), (a, b), retain_graph=True)
        expected_grads = torch.autograd.grad((expected * weight).sum(), (a, b), retain_graph=True)
        torch.testing.assert_close(ours_grads, expected_grads)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    x = torch.randn(2, 3, 8, 4)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    for rows in (permuted,) if grad else (x, permuted):
        a, b = (y.detach().requires_grad_(grad) for y in (rows[:, :, ::2], rows[:, :, 1::2]))
        mask = torch.rand(2, 3, 4) > 0.3
        torch.library.opcheck(registration.similarity_top_op, (a, b, 2, "cosine", mask, mask, False, None, None))
        arguments = (a, b, "gaussian", 0.1, 1.0, "distance", mask, None, None, None)
        torch.library.opcheck(registration.similarity_total_op, arguments)
    if not grad:
        windows = op.grid_regions(4, 6, (2, 2))
        x = torch.randn(2, 1, 24, 4)
        positions = (windows.a, windows.b)
        torch.library.opcheck(registration.similarity_top_op, (x, x, 1, "cosine", None, None, True, *positions))
        torch.library.opcheck(registration.similarity_total_op, (x, x, "relu", 0.1, 1.0, "dot", None, None, *positions))


def test_the_registered_operators_have_the_gradients_of_the_path() -> None:
    a, b = (x.unsqueeze(1).requires_grad_() for x in halves(2, 9, 3))
    assert torch.autograd.gradcheck(
        lambda a, b: registration.similarity_top_op(a, b, 2, "cosine", None, None, False, None, None)[0], (a, b)
    )
    assert torch.autograd.gradcheck(
        lambda a, b: registration.similarity_total_op(a, b, "elu", 0.1, 1.0, "dot", None, None, None, None), (a, b)
    )


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(grad: bool) -> None:
    def run(m: Tensor) -> tuple[Tensor, ...]:
        best = op.best_match(m[:, ::2], m[:, 1::2], a_mask=torch.arange(m.shape[1])[::2] > 0)
        top = op.similarity_topk(m, m, 2, exclude_self=True)
        count = op.similarity_count(m, m, 0.5)
        return best.score[:, 1:], best.index, top.score, count, op.similarity_sum(m, m, margin=0.5, mean=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=None)
    for n in (63, 99):
        m = torch.randn(2, n, 16, requires_grad=grad)
        for ours, expected in zip(compiled(m), run(m), strict=True):
            torch.testing.assert_close(ours, expected)
        if grad:
            grads = [torch.autograd.grad((f(m)[0].sum() + f(m)[4].sum()), m)[0] for f in (compiled, run)]
            torch.testing.assert_close(*grads)


def test_a_graph_with_a_gradient_serves_other_lengths() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda m: op.similarity_sum(m, m, margin=0.5), fullgraph=True, backend=count, dynamic=True)
    for n in (63, 99, 120):
        compiled(torch.randn(2, n, 16, requires_grad=True)).sum().backward()
    assert len(graphs) == 1


@pytest.mark.hosts
def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_similarity_rows_kernels.py")))
