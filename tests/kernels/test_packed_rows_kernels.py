"""The kernels over packed rows in Triton's interpreter; ``test_packed_rows.py`` starts this file."""

from __future__ import annotations

import pytest
from test_packed_rows import CASES, check, packed

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize("case", [*CASES, (2, 32, True, 24, 160), (4, 12, False, 24, 150)], ids=str)
def test_kernels_equal_the_reference(case: tuple[int, int, bool, int, int]) -> None:
    check(packed(case))
    check(packed(case, room=5), heads=1)
