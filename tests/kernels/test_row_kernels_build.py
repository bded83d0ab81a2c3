"""The row kernels compile for a GPU of compute capability 9.0, on any machine, and move rows in 16-byte pieces."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

INDICES = "representative source target order offsets keys slots index"
COUNTS = {"N", "M", "R", "E", "K", "rows", "x_rows", "blocks", "heads", "slices"}


def transfers(kernel: Any, constants: dict[str, Any], cache: bool, element: str) -> Counter[str]:
    """How often each kind of access to device memory stands in the kernel's assembly.

    Args:
        kernel: a jitted function.
        constants: its compile-time arguments.
        cache: whether ``keys`` are the keys of a cache and not indices.
        element: type of the rows, as in ``bf16``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    indices = {"index"} if cache else set(INDICES.split())
    names = kernel.arg_names
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        is_row_pointer = re.fullmatch(r"x|out|norm(ed|_weight|_bias)|(out_)?(keys|values)", name) is not None
        if name in constants:
            signature[name] = "constexpr"
        elif name in indices:
            signature[name] = "*i64"
        elif name in ("positions", "out_positions"):
            signature[name] = "*i32"
        elif name in ("size", "weight", "coefficients"):
            signature[name] = "*fp32"
        elif is_row_pointer:
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name not in constants and name not in COUNTS | {"eps"} and not name.endswith("position_n"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return Counter(re.findall(r"(?:ld|st)\.global(?:\.v\d)?", built.asm["ptx"]))


@pytest.mark.parametrize("mode", [0, 3])
def test_merge_and_norm(mode: int) -> None:
    from tokred.kernels.merge_rows.triton import merge_rows_fwd_kernel

    flags = ("HAS_SIZE", "HAS_WEIGHT", "NORM", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS")
    blocks = {"MODE": mode, "SORTED": False, "BLOCK_M": 4, "BLOCK_C": 1024, "BLOCK_E": 16}
    found = transfers(merge_rows_fwd_kernel, {**dict.fromkeys(flags, True), **blocks}, False, "bf16")
    # 4 x 1024 halves in 128 threads: four vectors a thread, stored merged and normed and loaded at least twice.
    assert found["st.global.v4"] == 8
    assert found["st.global"] == 0
    assert found["ld.global.v4"] >= 10


def test_segment_sum_and_gather() -> None:
    from tokred.kernels.gather_rows.triton import gather_rows_fwd_kernel, segment_sum_fwd_kernel

    blocks = {"BLOCK_N": 4, "BLOCK_C": 1024, "BLOCK_E": 256}
    flags = {"HAS_SLOTS": True, "HAS_COEFFICIENTS": True, "SORTED": True}
    found = transfers(segment_sum_fwd_kernel, {**blocks, **flags}, False, "fp32")
    assert (found["st.global.v4"], found["ld.global.v4"], found["st.global"]) == (8, 8, 0)
    found = transfers(gather_rows_fwd_kernel, {"OR_ZERO": True, "BLOCK_K": 4, "BLOCK_C": 1024}, False, "bf16")
    assert (found["st.global.v4"], found["ld.global.v4"], found["st.global"]) == (4, 4, 0)


def test_cache() -> None:
    from tokred.kernels.gather_rows.triton import compact_cache_kernel, gather_cache_fwd_kernel

    found = transfers(gather_cache_fwd_kernel, {"BLOCK_K": 32, "BLOCK_D": 128}, True, "bf16")
    assert (found["st.global.v4"], found["ld.global.v4"]) == (8, 8)
    found = transfers(compact_cache_kernel, {"BLOCK_K": 1024, "BLOCK_D": 16}, True, "bf16")
    assert found["st.global.v4"] == found["ld.global.v4"]
    assert found["st.global.v4"] >= 32
