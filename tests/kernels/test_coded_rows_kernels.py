"""The kernels over coded rows in Triton's interpreter; ``test_coded_rows.py`` starts this file."""

from __future__ import annotations

from typing import Any

import pytest
from test_coded_rows import CASES, check, coded

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case: tuple[int, Any, bool, int, int]) -> None:
    check(coded(case, room=5))
