"""Whether the installed Triton can interpret kernels at all: asked of one that is no kernel of ours."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# A loop up to an argument: Triton 3.6 makes Python numbers of arrays with one element, which numpy 2.4 refuses.
PROBE = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

x, y = torch.arange(20.0), torch.empty(20)
double[(1,)](x, y, 20, BLOCK=8)
assert torch.equal(y, 2 * x)
"""


@functools.cache
def fault() -> str:
    """The last line of what Triton's interpreter says of a loop; empty where it runs one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.py"
        path.write_text(PROBE, encoding="utf8")
        done = subprocess.run(
            [sys.executable, str(path)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def skip_without() -> None:
    """Skip a test of kernels where Triton is missing, or cannot interpret any that loop.

    Only the clash of Triton and numpy is skipped: whatever else is wrong shall fail.
    """
    pytest.importorskip("triton")
    found = fault()
    if "only 0-dimensional arrays can be converted to Python scalars" in found:
        import numpy
        import triton

        pytest.skip(f"triton {triton.__version__} cannot interpret a loop with numpy {numpy.__version__}: {found}")
