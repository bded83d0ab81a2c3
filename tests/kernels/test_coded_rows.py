"""Rows in codes that are no even steps: in torch, in compiled loops, and in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokred.kernels.coded_rows import BOOK, LARGEST, LEVELS, CodedRows, coded_scores, coded_sums, restore_coded
from tokred.kernels.packed_rows import bytes_of, pack

OPERATOR = "tokred.kernels.coded_rows"

# Kind; bits, or signs, or the type of numbers; whether rows are brought to length one; width; rows.
CASES: list[tuple[int, Any, bool, int, int]] = [
    (LEVELS, 2, True, 16, 21),
    (LEVELS, 2, False, 12, 40),
    (LEVELS, 3, True, 32, 9),
    (LEVELS, 4, True, 8, 130),
    (BOOK, True, False, 24, 37),
    (BOOK, False, False, 16, 70),
    (LARGEST, torch.float32, False, 20, 33),
    (LARGEST, torch.bfloat16, False, 16, 70),
    (LARGEST, torch.float16, False, 24, 5),
]


def coded(case: tuple[int, Any, bool, int, int], room: int = 0) -> CodedRows:
    """Rows of two samples and three heads, of a buffer that has room behind them."""
    kind, what, unit, width, count = case
    generator = torch.Generator().manual_seed(count)
    batch, n = (2, 3, count + room), width // 8
    second = torch.zeros(*batch, 0, dtype=torch.uint8)
    table, bits = torch.empty(0), 1
    if kind == LEVELS:
        bits, table = what, torch.randn(2**what, generator=generator)
        first = pack(torch.randint(0, 2**what, (*batch, width), generator=generator).to(torch.uint8), what, -1)
        assert first.shape[-1] == bytes_of(width, what)
    elif kind == BOOK:
        table = torch.randn(256, 8, generator=generator)
        first = torch.randint(0, 256, (*batch, n), generator=generator).to(torch.uint8)
        if what:
            second = torch.randint(0, 256, (*batch, n), generator=generator).to(torch.uint8)
    else:
        keep = width // 3
        index = torch.rand(*batch, width, generator=generator).topk(keep, -1).indices
        mask = torch.zeros(*batch, -(-width // 8) * 8, dtype=torch.uint8).scatter_(-1, index, 1)
        weight = 1 << torch.arange(7, -1, -1)
        second = (mask.unflatten(-1, (-1, 8)) * weight).sum(-1).to(torch.uint8)
        first = torch.randn(*batch, keep, generator=generator).to(what)
    factor = torch.rand(batch, generator=generator) + 0.5
    return CodedRows(first, second, table, factor, kind, width, bits, unit).part(0, count)


def check(rows: CodedRows, heads: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3, heads, rows.width, generator=generator)
    w = torch.rand(2, 3, heads, rows.count, generator=generator)
    whole = restore_coded(rows).double()
    for found, wanted in ((coded_scores(q, rows), q.double() @ whole.mT), (coded_sums(w, rows), w.double() @ whole)):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case: tuple[int, Any, bool, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    reference: Any = sys.modules["tokred.kernels.coded_rows.reference"]
    monkeypatch.setattr(reference, "BLOCK", 16)
    seen: list[int] = []
    monkeypatch.setattr(reference, "restore_coded", lambda rows: seen.append(rows.count) or restore_coded(rows))
    check(coded(case))
    assert max(seen) <= 16, "never all at once"


def test_rows_written_out() -> None:
    """Levels by their codes, entries by theirs, and what is left where its bits are set."""
    one = torch.ones(1, 1, 1)
    codes = torch.tensor([0b11100100], dtype=torch.uint8).view(1, 1, 1, 1)
    levels = CodedRows(codes, codes[..., :0], torch.tensor([-2.0, -1, 1, 2]), 3 * one, LEVELS, 4, 2)
    assert restore_coded(levels).flatten().tolist() == [-6, -3, 3, 6]
    assert restore_coded(levels._replace(unit=True)).norm().item() == pytest.approx(3)
    table = torch.arange(16.0).view(2, 8)
    book = CodedRows(codes * 0 + 1, codes * 0 + 0b11, table, one, BOOK, 8)
    assert restore_coded(book).flatten().tolist() == [-8, -9, 10, 11, 12, 13, 14, 15]
    left = CodedRows(torch.tensor([5.0, 7]).view(1, 1, 1, 2), codes * 0 + 0b10010000, one[0, 0, :0], one, LARGEST, 8)
    assert restore_coded(left).flatten().tolist() == [5, 0, 0, 7, 0, 0, 0, 0]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [(*case[:4], min(case[4], 21)) for case in CASES], ids=str)
def test_loops(case: tuple[int, Any, bool, int, int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(coded(case, room=0 if threads == 1 else 5), heads=threads)


# What each byte of codes stands for is looked up where there are many rows.
BY_BYTE = [(LEVELS, 2, True, 16, 21), (LEVELS, 4, True, 7, 13), (LEVELS, 1, False, 12, 9), (BOOK, False, False, 16, 20)]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", BY_BYTE, ids=str)
def test_many_rows_are_never_restored(
    case: tuple[int, Any, bool, int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokred.kernels.coded_rows import by_byte, cpu

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(by_byte, "LEAST", 1)
    monkeypatch.delattr(cpu, "_restored")
    check(coded(case, room=threads), heads=3 * threads - 1)


def test_few_rows_and_signed_entries_are_restored() -> None:
    pytest.importorskip("numba")
    from tokred.kernels.coded_rows import by_byte, cpu

    many = coded((LEVELS, 2, False, 8, by_byte.LEAST))
    assert cpu._never_restored(many, 1)
    assert not cpu._never_restored(many, 2), "a share of the rows"
    assert not cpu._never_restored(coded((LEVELS, 3, False, 8, by_byte.LEAST)), 1), "codes that lie across bytes"
    assert not cpu._never_restored(coded((BOOK, True, False, 8, by_byte.LEAST)), 1)
    assert not cpu._never_restored(coded((LARGEST, torch.float32, False, 8, by_byte.LEAST)), 1)


# Each is compiled for itself, in about two seconds: one of each kind, and the others before a release.
COMPILED = [case if i in (2, 4, 8) else pytest.param(case, marks=pytest.mark.hosts) for i, case in enumerate(CASES)]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_loops(case: tuple[int, Any, bool, int, int]) -> None:
    pytest.importorskip("numba")
    check(coded(case, room=3))


def test_compiled_loops_over_many_rows() -> None:
    pytest.importorskip("numba")
    check(coded((LEVELS, 2, True, 16, 1100)), heads=4)


def test_compiled_loops_are_found_on_disk_again() -> None:
    pytest.importorskip("numba")
    from tokred.kernels.coded_rows import by_byte, cpu

    made = [make(LEVELS, 64, 2, 1, 64, False) for make in (cpu._scores, cpu._sums)]
    for run in (*made, by_byte.scores(16, 64, 4, 1, 16, 1, False), by_byte.sums(16, 64, 4, 1, 16, 1, False)):
        cells = getattr(run, "py_func", run).__closure__
        assert cells
        assert all(isinstance(cell.cell_contents, int) for cell in cells)


def test_bad_input_and_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    rows = coded(CASES[0])
    with pytest.raises(ValueError, match=r"q must be \[B, Hk, G, D\] = \[2, 3, G, 16\], got \[2, 3, 1, 9\]"):
        coded_scores(torch.zeros(2, 3, 1, 9), rows)
    with pytest.raises(ValueError, match=r"weights must be \[B, Hk, G, P\] = \[2, 3, G, 21\]"):
        coded_sums(torch.zeros(2, 3, 1, 8), rows)
    ops: Any = torch.ops.tokred
    checks = ("test_schema", "test_faketensor")  # neither has a gradient
    torch.library.opcheck(ops.coded_scores.default, (torch.zeros(2, 3, 1, 16), *rows), test_utils=checks)
    torch.library.opcheck(ops.coded_sums.default, (torch.zeros(2, 3, 1, 21), *rows), test_utils=checks)


@pytest.mark.parametrize(("name", "kind"), [("scores", LARGEST), ("sums", BOOK)])
def test_compiles_for_a_gpu(name: str, kind: int, ptx: Callable[..., str]) -> None:
    from tokred.kernels.coded_rows import triton as kernels

    kernel = getattr(kernels, f"coded_{name}_fwd_kernel")
    constants = {
        "KIND": kind, "WIDTH": 128, "BITS": 2, "UNIT": True, "SIGNED": kind != LEVELS, "SIZE": 32, "MARKS": 16,
        "HEADS": 16, "BLOCK_C": 128, "BLOCK_T": 64,
    }  # fmt: skip
    first = "*bf16" if kind == LARGEST else "*u8"
    kinds = {"first": first, "second": "*u8", **dict.fromkeys(("q", "weights", "table", "factor", "out"), "*fp32")}
    assert ".entry" in ptx(kernel, constants, kinds)


def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(str(Path(__file__).with_name("test_coded_rows_kernels.py")))
