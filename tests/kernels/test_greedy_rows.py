"""Greedy choices of rows: against loops, registered, and compiled for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokred.kernels.greedy_rows import determinant_rows, farthest_rows, why_not_kernel


def distances(b: int, n: int, seed: int = 0) -> Tensor:
    """``(B, N, N)`` with ties, minus infinity on the diagonal."""
    d = torch.randint(0, 5, (b, n, n), generator=torch.Generator().manual_seed(seed)).float()
    d = d + d.mT
    d.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return d


def gram(b: int, n: int, c: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel, diagonal, and the least gains."""
    x = torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed))
    kernel = x @ x.mT
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    return kernel, gains, gains * 1e-4


def test_farthest_by_loops() -> None:
    d = distances(2, 9)
    found = farthest_rows(d, torch.tensor([3, 0]), 9)
    for i in range(2):
        picks = [int(found[i, 0])]
        while len(picks) < 9:
            near = [float(min(d[i, p, j] for p in picks)) for j in range(9)]
            picks.append(near.index(max(near)))
        assert found[i].tolist() == picks
        assert sorted(picks) == list(range(9))


def test_determinant_by_loops() -> None:
    kernel, gains, least = gram(2, 8)
    found = determinant_rows(kernel, gains, least, 5)
    for i in range(2):
        picks: list[int] = []
        for t in range(5):
            here = {j: float(torch.linalg.det(kernel[i][[*picks, j]][:, [*picks, j]].double()))
                    for j in range(8) if j not in picks}  # fmt: skip
            best = max(here, key=lambda j: here[j])
            assert int(found.picks[i, t]) == best
            before = float(torch.linalg.det(kernel[i][picks][:, picks].double())) if picks else 1.0
            assert found.gain[i, t].item() == pytest.approx(here[best] / before, rel=1e-3)
            picks.append(best)
    assert determinant_rows(*gram(1, 8, 2), 5).gain[0, 2:].tolist() == [0, 0, 0], "two directions, two picks"


def test_bad_input_and_registration() -> None:
    with pytest.raises(ValueError, match=r"\(B, N, N\)"):
        farthest_rows(torch.zeros(1, 3, 4), torch.zeros(1, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="n = 5"):
        determinant_rows(*gram(1, 4), 5)
    assert why_not_kernel(torch.zeros(1, 3, 3)) is not None
    ops: Any = torch.ops.tokred
    torch.library.opcheck(ops.farthest_rows.default, (distances(2, 7), torch.tensor([1, 2]), 4))
    torch.library.opcheck(ops.determinant_rows.default, (*gram(2, 7), 4))


@pytest.mark.parametrize("name", ["farthest", "determinant"])
def test_compiles_for_a_gpu(name: str, ptx: Callable[..., str]) -> None:
    from tokred.kernels.greedy_rows import triton as kernels

    kernel = getattr(kernels, f"{name}_rows_fwd_kernel")
    constants = {"BLOCK_N": 1024, "BLOCK_T": kernels.STEPS} if name == "determinant" else {"BLOCK_N": 1024}
    kinds = {"first": "*i64", "picks": "*i64", "N": "i32", "n": "i32"}
    assert "bar.sync" in ptx(kernel, constants, {**dict.fromkeys(kernel.arg_names, "*fp32"), **kinds})


def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_greedy_rows_kernels.py")))
