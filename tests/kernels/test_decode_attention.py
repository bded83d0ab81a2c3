"""Decode attention over ragged caches: visibility, parity with masking, both layouts, registration, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from score_cases import queries_keys, relative_rms
from torch import Tensor

from tokred.kernels.attention import attention
from tokred.kernels.decode_attention import (
    SENTINEL,
    decode_attention,
    decode_attention_flat,
    decode_attention_flat_with_weights,
    decode_attention_with_weights,
    visible_positions,
    why_not_kernel,
)
from tokred.kernels.decode_attention.reference import decode_flat_reference, decode_reference

VISIBILITIES = ("all", "positions", "query", "queries", "mask", "slot mask")


class Case(NamedTuple):
    """A query over a ragged cache in both layouts, and what it may see by the definition."""

    q: Tensor  # [B, H, 1, D]
    k: Tensor
    v: Tensor
    flat_k: Tensor
    flat_v: Tensor
    offsets: Tensor
    seen: Tensor  # [B, Hk, K]
    ragged: Tensor  # [B, Hk, K]: seen, and inside the flattened layout
    rectangular: dict[str, Any]
    flat: dict[str, Any]


def _visible(b: int, hk: int, n: int, kind: str, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    """Keyword arguments of a visibility and the slots it shows, one by one."""
    seen = torch.ones(b, hk, n, dtype=torch.bool)
    if kind == "all":
        return seen, {}
    if kind == "slot mask":
        mask = torch.rand(b, n, generator=generator) > 0.3
        return mask[:, None].expand(b, hk, n).clone(), {"key_mask": mask}
    order = torch.stack([torch.randperm(2 * n, generator=generator)[:n].sort().values for _ in range(b * hk)])
    filled = torch.arange(n) < torch.randint(0, n + 1, (b * hk, 1), generator=generator)
    positions = torch.where(filled, order, SENTINEL).view(b, hk, n).to(torch.int32)
    query = {"query": n, "queries": torch.randint(0, 2 * n, (b,), generator=generator), "mask": 2 * n - 2}.get(kind)
    mask = torch.rand(b, n, generator=generator) > 0.3 if kind == "mask" else None
    for i, j, s in torch.cartesian_prod(torch.arange(b), torch.arange(hk), torch.arange(n)).tolist():
        p = int(positions[i, j, s])
        last = SENTINEL - 1 if query is None else int(query if isinstance(query, int) else query[i])
        seen[i, j, s] = p <= last and (mask is None or p >= n or bool(mask[i, p]))
    return seen, {"positions": positions, "query_position": query, "key_mask": mask}


def make_case(b: int, h: int, hk: int, n: int, d: int, dtype: torch.dtype, kind: str, layout: str = "rows") -> Case:
    q, k, v = queries_keys(b, h, hk, 1, n, d, dtype, layout=layout)
    generator = torch.Generator().manual_seed(n)
    seen, rectangular = _visible(b, hk, n, kind, generator)
    lengths = torch.randint(0, n + 1, (b * hk,), generator=generator)
    lengths[0] = n
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    kept = torch.arange(n) < lengths.view(b, hk, 1)
    flat = dict(rectangular)
    if kind == "slot mask":
        flat = {}
    elif kind != "all":
        flat["positions"] = rectangular["positions"][kept]
    ragged = kept if kind == "slot mask" else kept & seen
    return Case(q, k, v, k[kept], v[kept], offsets, seen, ragged, rectangular, flat)


def check_case(case: Case, tolerance: float, softcap: float | None = None) -> None:
    """Both layouts, with and without weights, against the definition in float64."""
    q, k, v = case.q[:, :, 0].double(), case.k.double(), case.v.double()
    scale = q.shape[2] ** -0.5
    near: dict[str, Any] = {"atol": tolerance, "rtol": tolerance}
    wanted = decode_reference(q, k, v, case.seen, scale, softcap or 0.0)
    plain = decode_attention(case.q, case.k, case.v, softcap=softcap, **case.rectangular)
    full = decode_attention_with_weights(case.q, case.k, case.v, softcap=softcap, **case.rectangular)
    assert plain.output.shape == case.q.shape
    for found in (plain, full):
        torch.testing.assert_close(found.output[:, :, 0].double(), wanted[0], **near)
        torch.testing.assert_close(found.lse.double(), wanted[1], **near)
    torch.testing.assert_close(full.weights.double(), wanted[2], **near)
    wanted = decode_reference(q, k, v, case.ragged, scale, softcap or 0.0)
    arguments = (case.q[:, :, 0], case.flat_k, case.flat_v, case.offsets)
    plain = decode_attention_flat(*arguments, softcap=softcap, **case.flat)
    full = decode_attention_flat_with_weights(*arguments, softcap=softcap, **case.flat)
    for found in (plain, full):
        torch.testing.assert_close(found.output.double(), wanted[0], **near)
        torch.testing.assert_close(found.lse.double(), wanted[1], **near)
    b, hk, n = case.seen.shape
    lengths = case.offsets.diff().view(b, hk, 1)
    rows = wanted[2].view(b, hk, -1, n).movedim(2, 0)[:, torch.arange(n) < lengths]
    torch.testing.assert_close(full.weights.double(), rows, **near)


def test_oracle_of_the_host_study() -> None:
    """kv_hosts.md, oracle 7: physical rows at 0, 3, 7 and the new tokens at slots 9 and 10."""
    positions = torch.tensor([[[0, 3, 7, 9, 10]]], dtype=torch.int32)
    assert visible_positions(positions, 9, None).flatten().tolist() == [True, True, True, True, False]
    assert visible_positions(positions, 10, None).all()
    padding = torch.arange(11)[None] > 0
    assert visible_positions(positions, 9, padding).flatten().tolist() == [False, True, True, True, False]
    assert visible_positions(positions, 10, padding).flatten().tolist() == [False, True, True, True, True]
    q, k, v = queries_keys(1, 2, 1, 1, 5, 8, torch.float64)
    weights = decode_attention_with_weights(q, k, v, positions=positions, query_position=9, key_mask=padding).weights
    assert ((weights > 0) == torch.tensor([False, True, True, True, False])).all()


def test_eviction_equals_masking() -> None:
    """kv_hosts.md, golden test: a cache without the evicted keys is the full cache with them masked."""
    q, k, v = queries_keys(2, 4, 2, 1, 40, 16, torch.float64)
    kept = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:17] for i in range(4)])
    kept = kept.sort(-1).values.view(2, 2, 17)
    small = [x.gather(2, kept[..., None].expand(2, 2, 17, 16)) for x in (k, v)]
    mask = torch.zeros(2, 2, 40, dtype=torch.bool).scatter_(2, kept, True)
    bias = torch.where(mask, 0.0, -torch.inf).repeat_interleave(2, 1)
    wanted = attention(q, k, v, bias=bias.double())
    found = decode_attention(q, *small, positions=kept.int(), query_position=40)
    torch.testing.assert_close(found.output, wanted)


@pytest.mark.parametrize("kind", VISIBILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity(kind: str, dtype: torch.dtype, nan_memory: None) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for b, h, hk, n, d, layout in (
        (1, 4, 4, 63, 80, "rows"),
        (3, 8, 2, 197, 64, "contiguous"),
        (3, 6, 2, 1, 8, "expanded"),
    ):
        case = make_case(b, h, hk, n, d, dtype, kind, layout)
        for softcap in (None, 2.0):
            check_case(case, tolerance, softcap)


@pytest.mark.parametrize("kind", ["all", "queries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hk", [4, 1])
def test_half_precision(hk: int, dtype: torch.dtype, kind: str) -> None:
    """No worse than twice what plain attention in the same type loses."""
    case = make_case(3, 4, hk, 197, 64, dtype, kind)
    q, k, v = case.q, case.k.repeat_interleave(4 // hk, 1), case.v.repeat_interleave(4 // hk, 1)
    s = (q @ k.transpose(-1, -2) * 0.125).masked_fill(~case.seen.repeat_interleave(4 // hk, 1)[:, :, None], -torch.inf)
    plain = (torch.softmax(s, -1) @ v).nan_to_num(0.0)
    wanted = decode_reference(q[:, :, 0].double(), case.k.double(), case.v.double(), case.seen, 0.125, 0.0)
    found = decode_attention_with_weights(q, case.k, case.v, **case.rectangular)
    assert relative_rms(found.output[:, :, 0], wanted[0]) <= 2 * relative_rms(plain[:, :, 0], wanted[0])
    assert found.weights.dtype == torch.float32
    check_case(case, 2e-2)


def test_rows_outside_the_offsets() -> None:
    """Rows before the first and after the last offset belong to nobody."""
    q, k, v = queries_keys(1, 2, 1, 1, 12, 8, torch.float32)
    offsets = torch.tensor([2, 9], dtype=torch.int32)
    wanted = decode_attention_with_weights(q, k[:, :, 2:9], v[:, :, 2:9])
    for grad in (False, True):  # the loop, and the form that autograd sees
        found = decode_attention_flat_with_weights(q.requires_grad_(grad), k[0, 0], v[0, 0], offsets)
        torch.testing.assert_close(found.output, wanted.output)
        torch.testing.assert_close(found.weights[:, 2:9], wanted.weights[0])
        assert (found.weights[:, :2] == 0).all()
        assert (found.weights[:, 9:] == 0).all()


def test_empty() -> None:
    q = torch.randn(2, 4, 8)
    cache = torch.randn(2, 2, 0, 8)
    found = decode_attention_with_weights(q, cache, cache)
    assert (found.output == 0).all()
    assert (found.lse == -torch.inf).all()
    assert found.weights.shape == (2, 4, 0)
    flat = torch.randn(0, 8)
    found = decode_attention_flat_with_weights(q, flat, flat, torch.zeros(5, dtype=torch.int32))
    assert (found.output == 0).all()
    assert (found.lse == -torch.inf).all()
    assert found.weights.shape == (2, 0)


@pytest.mark.parametrize("kind", ["all", "queries"])
def test_gradients(kind: str) -> None:
    case = make_case(2, 4, 2, 5, 4, torch.float64, kind)
    # A head that sees nothing has -inf as its log-sum-exp, which no difference quotient can follow.
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = decode_attention_with_weights(q, k, v, softcap=2.0, **case.rectangular)
        return found.output, found.weights

    assert torch.autograd.gradcheck(call, inputs)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.flat_k, case.flat_v)]

    def call_flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = decode_attention_flat_with_weights(q, k, v, case.offsets, **case.flat)
        return found.output, found.weights

    assert torch.autograd.gradcheck(call_flat, inputs)


def test_gradients_of_the_operators() -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys(2, 4, 2, 1, 5, 4, torch.float64))
    op, flat = torch.ops.tokred.decode_attention, torch.ops.tokred.decode_attention_flat
    rest = (None, None, 7, None, 0.5, 0.0, True)
    assert torch.autograd.gradcheck(lambda q, k, v: op(q[:, :, 0], k, v, *rest), (q, k, v))
    offsets = torch.tensor([0, 5, 9, 15, 20])
    assert torch.autograd.gradcheck(
        lambda q, k, v: flat(q[:, :, 0], k.reshape(20, 4), v.reshape(20, 4), offsets, *rest), (q, k, v)
    )


@pytest.mark.parametrize(("kind", "grad"), [("all", True), ("mask", False)])
def test_opcheck(kind: str, grad: bool) -> None:
    case = make_case(2, 4, 2, 9, 8, torch.float32, kind)
    last, mask = 17, case.rectangular.get("key_mask")
    for weights in (True,) if grad else (False, True):
        rest = (None, last, mask, 0.5, 0.0, weights)
        inputs = [x.clone().requires_grad_(grad) for x in (case.q[:, :, 0], case.k, case.v)]
        op = torch.ops.tokred.decode_attention.default
        torch.library.opcheck(op, (*inputs, case.rectangular.get("positions"), *rest))
        inputs = [x.clone().requires_grad_(grad) for x in (case.q[:, :, 0], case.flat_k, case.flat_v)]
        op = torch.ops.tokred.decode_attention_flat.default
        torch.library.opcheck(op, (*inputs, case.offsets, case.flat.get("positions"), *rest))


def test_compile_sees_through() -> None:
    compiled = torch.compile(decode_attention_with_weights, fullgraph=True)
    flat = torch.compile(decode_attention_flat, fullgraph=True)
    for n in (33, 47):
        case = make_case(2, 4, 2, n, 16, torch.float32, "queries")
        wanted = decode_attention_with_weights(case.q, case.k, case.v, **case.rectangular)
        for a, b in zip(compiled(case.q, case.k, case.v, **case.rectangular), wanted, strict=True):
            torch.testing.assert_close(a, b)
        wanted = decode_attention_flat(case.q, case.flat_k, case.flat_v, case.offsets, **case.flat)
        for a, b in zip(flat(case.q, case.flat_k, case.flat_v, case.offsets, **case.flat), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("q must", {"q": torch.randn(2, 4, 2, 8)}, ValueError),
        ("q, k and v", {"v": torch.randn(2, 2, 5, 8).double()}, TypeError),
        ("k and v", {"v": torch.randn(2, 2, 6, 8)}, ValueError),
        ("channels", {"q": torch.randn(2, 4, 9)}, ValueError),
        ("batch", {"q": torch.randn(3, 4, 8)}, ValueError),
        ("heads", {"q": torch.randn(2, 3, 8)}, ValueError),
        ("positions", {"positions": torch.zeros(2, 5, dtype=torch.int32)}, ValueError),
        ("positions", {"positions": torch.zeros(2, 2, 5)}, TypeError),
        ("query_position", {"query_position": 3}, ValueError),
        ("query_position", {"query_position": torch.ones(2), "positions": torch.zeros(2, 2, 5).int()}, TypeError),
        (
            "query_position",
            {"query_position": torch.ones(3).int(), "positions": torch.zeros(2, 2, 5).int()},
            ValueError,
        ),
        ("key_mask", {"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError),
        ("key_mask", {"key_mask": torch.ones(2, 5)}, TypeError),
        ("softcap", {"softcap": 0.0}, ValueError),
    ],
)
def test_errors_name_the_argument(name: str, change: dict[str, Any], error: type[Exception]) -> None:
    cache = torch.randn(2, 2, 5, 8)
    arguments: dict[str, Any] = {"q": torch.randn(2, 4, 8), "k": cache, "v": cache, **change}
    with pytest.raises(error, match=name):
        decode_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(700, 1100, 1, 0), (3, 0, 1, 2), (513, 514, 515, 516)])
def test_flat_rows_are_shared_out_among_threads(threads: int, lengths: tuple[int, ...]) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = torch.randn(2, 6, 8), torch.randn(total + 4, 8), torch.randn(total + 4, 8)
    offsets = torch.tensor([0, *lengths]).cumsum(0) + 2  # rows outside belong to nobody
    wanted = decode_flat_reference(q, k, v, offsets, None, 0.5, 0.0)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = decode_attention_flat(q, k, v, offsets, scale=0.5)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, wanted, strict=False):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_errors_of_the_flat_layout() -> None:
    q, rows, offsets = torch.randn(2, 4, 8), torch.randn(9, 8), torch.tensor([0, 3, 5, 6, 9])
    for bad, error in ((offsets.float(), TypeError), (offsets[:4], ValueError), (offsets[None], ValueError)):
        with pytest.raises(error, match="offsets"):
            decode_attention_flat(q, rows, rows, bad)
    with pytest.raises(ValueError, match="positions"):
        decode_attention_flat(q, rows, rows, offsets, positions=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="key_mask needs positions"):
        decode_attention_flat(q, rows, rows, offsets, key_mask=torch.ones(2, 9, dtype=torch.bool))
    assert why_not_kernel(q, rows[None, None], rows[None, None]) is not None


@pytest.mark.hosts
def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", VISIBILITIES)
def test_kernel_parity(kind: str, nan_memory: None) -> None:
    dtype = torch.bfloat16 if kind in ("all", "query") else torch.float32
    shapes = ((1, 4, 4, 63, 80, "rows"), (2, 8, 2, 300, 16, "contiguous"))
    for b, h, hk, n, d, layout in ((3, 6, 2, 7, 72, "expanded"),) if kind == "queries" else shapes:
        check_case(make_case(b, h, hk, n, d, dtype, kind, layout), 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.interpret
def test_kernel_softcap_and_slack(nan_memory: None) -> None:
    check_case(make_case(2, 20, 1, 140, 24, torch.float32, "mask"), 2e-5, 2.0)
    test_rows_outside_the_offsets()
