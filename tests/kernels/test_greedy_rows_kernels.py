"""The kernels of the greedy choices in Triton's interpreter; ``test_greedy_rows.py`` starts this file."""

from __future__ import annotations

import pytest
import torch
from test_greedy_rows import distances, gram

from tokred.kernels.greedy_rows import determinant_rows, farthest_rows, reference

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize(("b", "n", "k"), [(1, 1, 1), (1, 7, 7), (3, 16, 5), (2, 33, 20)])
def test_kernels_equal_the_reference(b: int, n: int, k: int) -> None:
    d, first = distances(b, n), torch.arange(b) % n
    assert torch.equal(farthest_rows(d, first, k), reference.farthest_rows(d, first, k))
    kernel, gains, least = gram(b, n, c=40)
    found, expected = determinant_rows(kernel, gains, least, k), reference.determinant_rows(kernel, gains, least, k)
    assert torch.equal(found.picks, expected[0])
    torch.testing.assert_close(found.gain, expected[1], rtol=1e-3, atol=1e-5)


def test_an_exhausted_kernel_gains_nothing() -> None:
    kernel, gains, least = gram(2, 12, c=2)
    found = determinant_rows(kernel, gains, least, 6)
    assert (found.gain[:, :2] > 0).all()
    assert (found.gain[:, 2:] == 0).all()
