"""The kernels over coded rows in Triton's interpreter; ``test_coded_rows.py`` starts this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_coded_rows import CASES, check, coded

from tokred.kernels.coded_rows import coded_scores

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case: tuple[int, Any, bool, int, int]) -> None:
    check(coded(case, room=5))


def test_no_rows_have_no_scores() -> None:
    rows = coded(CASES[0])
    assert coded_scores(torch.zeros(2, 3, 1, rows.width), rows.part(0, 0)).shape == (2, 3, 1, 0)
