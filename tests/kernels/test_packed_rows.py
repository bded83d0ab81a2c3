"""Products with rows in few bits: every path against rows that are restored first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokred.kernels import dispatch
from tokred.kernels.packed_rows import PackedRows, pack, packed_scores, packed_sums, restore, why_not_packed

OPERATOR = "tokred.kernels.packed_rows"
CASES = [  # bits, group, tokens, width, rows
    (2, 4, True, 8, 12), (2, 32, True, 16, 96), (4, 8, True, 12, 40), (8, 4, True, 8, 20), (1, 8, True, 8, 24),
    (2, 4, False, 8, 13), (4, 8, False, 16, 70), (8, 3, False, 6, 9), (1, 16, False, 16, 5),
]  # fmt: skip


def packed(case: tuple[int, int, bool, int, int], room: int = 0, seed: int = 0) -> PackedRows:
    """Random rows of two samples and three heads; with ``room``, the beginning of a longer buffer."""
    bits, group, tokens, width, count = case
    generator = torch.Generator().manual_seed(seed)
    units = count // group if tokens else count
    shape = (2, 3, units + room, group, width) if tokens else (2, 3, units + room, width // group, group)
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    sides = (2, 3, units + room, width if tokens else width // group)
    scale, zero = torch.rand(sides, generator=generator), torch.randn(sides, generator=generator)
    parts = pack(codes, bits, 3 if tokens else 4), scale.half(), zero.half()
    return PackedRows(*(x[:, :, :units] for x in parts), bits, group, tokens)


def check(rows: PackedRows, heads: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3, heads, rows.width, generator=generator)
    w = torch.rand(2, 3, heads, rows.count, generator=generator)
    whole = restore(rows, torch.float64)
    for found, wanted in ((packed_scores(q, rows), q.double() @ whole.mT), (packed_sums(w, rows), w.double() @ whole)):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case: tuple[int, int, bool, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    check(packed(case))
    assert why_not_packed(torch.zeros(1, 8), 2, 32) == "TOKRED_KERNELS is torch"


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loops(case: tuple[int, int, bool, int, int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    bits, group, _, width, _ = case
    assert why_not_packed(torch.zeros(1, width), bits, group) is None
    check(packed(case))
    check(packed(case, room=5), heads=1)


@pytest.mark.slow
def test_compiled_loops() -> None:
    pytest.importorskip("numba")
    check(packed(CASES[0], room=3))
    check(packed(CASES[5], room=3))


def test_bad_input_and_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    rows = packed(CASES[0])
    with pytest.raises(ValueError, match=r"q must be \[B, Hk, G, D\] = \[2, 3, G, 8\], got \[2, 3, 1, 9\]"):
        packed_scores(torch.zeros(2, 3, 1, 9), rows)
    with pytest.raises(ValueError, match=r"weights must be \[B, Hk, G, P\] = \[2, 3, G, 12\]"):
        packed_sums(torch.zeros(2, 3, 1, 8), rows)
    ops: Any = torch.ops.tokred
    torch.library.opcheck(ops.packed_scores.default, (torch.zeros(2, 3, 1, 8), *rows))
    torch.library.opcheck(ops.packed_sums.default, (torch.zeros(2, 3, 1, 12), *rows))


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_KERNELS", "auto")
    q = torch.zeros(1, 8)
    monkeypatch.setattr(dispatch, "_NUMBA_FOUND", False)
    assert why_not_packed(q, 2, 32) == "numba is not installed (pip install 'tokred[cpu]')"
    monkeypatch.setattr(dispatch, "_NUMBA_FOUND", True)
    assert why_not_packed(q, 2, 32) is None
    assert why_not_packed(q, 3, 32) == "32 codes of 3 bits do not fill whole bytes"
    assert why_not_packed(q.double(), 2, 32) == "the loops work in float32, not float64"


@pytest.mark.parametrize(("name", "tokens"), [("scores", True), ("sums", False)])
def test_compiles_for_a_gpu(name: str, tokens: bool, ptx: Callable[..., str]) -> None:
    from tokred.kernels.packed_rows import triton as kernels

    kernel = getattr(kernels, f"packed_{name}_fwd_kernel")
    constants = {
        "BITS": 2, "GROUP": 32, "SIZE": 8, "WIDTH": 128, "TOKENS": tokens, "HEADS": 16, "BLOCK_C": 128, "BLOCK_T": 64
    }  # fmt: skip
    kinds = {"q": "*fp32", "weights": "*fp32", "codes": "*u8", "scale": "*fp16", "zero": "*fp16", "out": "*fp32"}
    assert ".entry" in ptx(kernel, constants, kinds)


def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_packed_rows_kernels.py")))


def test_compiled_loops_are_found_on_disk_again() -> None:
    """Numba's key has what a closure holds: numbers are the same in every process, compiled functions are not."""
    pytest.importorskip("numba")
    from tokred.kernels.packed_rows import cpu

    for make in (cpu._token_scores, cpu._channel_scores, cpu._channel_sums):
        run = make(2, 32, 64, False)
        cells = getattr(run, "py_func", run).__closure__
        assert cells
        assert all(isinstance(cell.cell_contents, int) for cell in cells)
