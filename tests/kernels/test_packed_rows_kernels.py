"""The kernels over packed rows in Triton's interpreter; ``test_packed_rows.py`` starts this file."""

from __future__ import annotations

import pytest
import torch
from test_packed_rows import CASES, check, packed

from tokred.kernels.packed_rows import packed_scores

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize("case", [*CASES, (2, 32, True, 24, 160), (4, 12, False, 24, 150)], ids=str)
def test_kernels_equal_the_reference(case: tuple[int, int, bool, int, int]) -> None:
    check(packed(case))
    check(packed(case, room=5), heads=1)


@pytest.mark.parametrize("tokens", [True, False])
def test_no_rows_have_no_scores(tokens: bool) -> None:
    assert packed_scores(torch.zeros(2, 3, 1, 8), packed((2, 4, tokens, 8, 0))).shape == (2, 3, 1, 0)
