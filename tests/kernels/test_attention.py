"""Attention with log size, its log-sum-exp and scores: oracles, parity, forms, registration, compilation, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from score_cases import HALVES, key_terms, queries_keys, relative_rms, score_options
from torch import Tensor

from tokred.kernels.attention import (
    attention,
    attention_with_lse,
    attention_with_scores,
    size_bias,
    torch_path,
    why_not_kernel,
)
from tokred.kernels.attention.bias import channel_form, combined_bias
from tokred.kernels.attention.reference import attention_reference
from tokred.kernels.column_scores import column_scores
from tokred.kernels.column_scores.reference import column_scores_reference

FORMS = ("auto", "mask", "channel")


def truth(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, **kw: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the definition in float64."""
    q, k, v = q.double(), k.double(), v.double()
    bias = combined_bias(size, kw.get("bias"), torch.float64)
    scale = kw.get("scale", q.shape[3] ** -0.5)
    return attention_reference(q, k, v, bias, kw.get("key_mask"), scale, kw.get("causal", False))


def sizes(b: int, n: int) -> Tensor:
    """Sizes as after merging, some keys with size 0."""
    size = torch.randint(1, 9, (b, n), generator=torch.Generator().manual_seed(5)).float()
    size[:, 1::7] = 0
    return size


def check_all(q: Tensor, k: Tensor, v: Tensor, tolerance: float, **kw: Any) -> None:
    """Every form, the log-sum-exp and the scores."""
    out, lse = truth(q, k, v, **kw)
    for form in FORMS:
        if form == "channel" and kw.get("causal") and q.shape[2] not in (1, k.shape[2]):
            continue
        found = attention(q, k, v, form=form, **kw)
        assert found.dtype == q.dtype
        torch.testing.assert_close(found.double(), out, atol=tolerance, rtol=tolerance)
    result = attention_with_scores(q, k, v, **kw)
    torch.testing.assert_close(result.output.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.lse.double(), lse, atol=tolerance, rtol=tolerance)
    bias = combined_bias(kw.get("size"), kw.get("bias"), torch.float64)
    options = score_options(d=q.shape[3], causal=kw.get("causal", False))
    scores = column_scores_reference(q.double(), k.double(), None, None, bias, kw.get("key_mask"), options)
    torch.testing.assert_close(result.scores.double(), scores, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_oracles_of_the_cards(form: str) -> None:
    """tome.md, oracle 7; vit_hosts.md, oracle 3."""
    q = torch.tensor([1.0, 0]).double().view(1, 1, 1, 2)
    k = torch.eye(2).double().view(1, 1, 2, 2)
    v = torch.tensor([10.0, 20]).double().view(1, 1, 2, 1)
    size = torch.tensor([[3.0, 1]]).double()
    assert attention(q, k, v, size=size, scale=1.0, form=form).item() == pytest.approx(11.092318, abs=1e-6)
    assert attention(q, k, v, size=size, form=form).item() == pytest.approx(11.41156, abs=1e-5)
    weights = column_scores(q, k, bias=size.log())
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.858844, 0.141156]).double(), atol=1e-6, rtol=0)
    weights = column_scores(q, k, bias=size.log(), scale=1.0)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.890768, 0.109232]).double(), atol=1e-6, rtol=0)
    assert attention(q, k, v).item() == pytest.approx(13.30239, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_size_is_repetition(form: str) -> None:
    q, k, v = queries_keys(2, 4, 2, 9, 20, 16, torch.float64)
    size = torch.tensor([1, 4, 2, 3] * 5)
    repeated = attention(q, k.repeat_interleave(size, 2), v.repeat_interleave(size, 2))
    found = attention(q, k, v, size=size.double().expand(2, 20), form=form)
    torch.testing.assert_close(found, repeated, atol=1e-12, rtol=1e-12)


def test_size_bias() -> None:
    bias = size_bias(torch.tensor([[1.0, 2, 0]]), torch.bfloat16)
    assert bias.shape == (1, 1, 1, 3)
    assert bias.dtype == torch.bfloat16
    assert bias[0, 0, 0, 0] == 0
    assert bias[0, 0, 0, 2] == -torch.inf
    assert size_bias(torch.tensor([[3]]), torch.float64).item() == pytest.approx(1.0986122886681098)


def test_plain_attention_is_torch_s() -> None:
    """Without a size the result is bit-equal to torch's fused attention: the patched model is the unpatched one."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = queries_keys(2, 4, 4, 33, 33, 16, dtype)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert torch.equal(attention(q, k, v), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("b", "hk", "m", "n", "d"), [(1, 4, 63, 63, 80), (3, 2, 197, 197, 64), (3, 4, 1, 63, 72)])
def test_parity(b: int, hk: int, m: int, n: int, d: int, dtype: torch.dtype, layout: str, nan_memory: None) -> None:
    q, k, v = queries_keys(b, 4, hk, m, n, d, dtype, layout=layout)
    check_all(q, k, v, 1e-10 if dtype == torch.float64 else 2e-5, size=sizes(b, n))


@pytest.mark.parametrize("terms", ["none", "bias", "head bias", "mask", "both", "dead"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_size", [False, True])
def test_options(terms: str, causal: bool, with_size: bool, nan_memory: None) -> None:
    for m, n, hk in ((33, 33, 2), (17, 40, 4), (50, 20, 4), (1, 1, 4)):
        q, k, v = queries_keys(3, 4, hk, m, n, 16, torch.float32)
        size = {"size": sizes(3, n)} if with_size else {}
        check_all(q, k, v, 2e-5, causal=causal, **size, **key_terms(terms, 3, 4, n))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worse than twice what hand-written attention in the same type loses, whatever the form."""
    q, k, v = queries_keys(3, 4, 4, 63, 63, 80, dtype)
    size = torch.randint(1, 60, (3, 63)).float()
    wanted = truth(q, k, v, size)[0]
    plain = torch.softmax(q @ k.transpose(-1, -2) * 80**-0.5 + size_bias(size, dtype), -1) @ v
    limit = 2 * relative_rms(plain, wanted)
    assert relative_rms(attention(q, k, v, size=size, form=form), wanted) <= limit
    monkeypatch.setattr(torch_path, "_BLOCK_ELEMENTS", 4 * 63 * 63)  # one sample at a time
    monkeypatch.setattr(torch_path, "fast_bfloat16", lambda: True)
    assert relative_rms(attention(q, k, v, size=size, form=form), wanted) <= limit
    mask = torch.tensor([True, False, True])[:, None].expand(3, 63)
    masked = attention(q, k, v, size=size, key_mask=mask, form=form)
    assert (masked[1] == 0).all()
    assert relative_rms(masked[::2], wanted[::2]) <= limit


def test_channel_form_has_common_widths() -> None:
    q, k, v = queries_keys(2, 4, 4, 5, 6, 20, torch.bfloat16)
    q2, k2, v2 = channel_form(q, k, v, torch.randn(2, 6), None, 20**-0.5)
    assert q2.shape[3] == k2.shape[3] == v2.shape[3] == 24


@pytest.mark.parametrize(("b", "m", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b: int, m: int, n: int) -> None:
    q, k, v = torch.randn(b, 2, m, 8), torch.randn(b, 2, n, 8), torch.randn(b, 2, n, 8)
    result = attention_with_scores(q, k, v)
    assert result.output.shape == attention(q, k, v).shape == (b, 2, m, 8)
    assert result.scores.shape == (b, 2, n)
    assert (result.lse == -torch.inf).all()


@pytest.mark.parametrize("form", ["mask", "channel"])
def test_gradients(form: str) -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys(2, 4, 2, 5, 6, 4, torch.float64))
    size = torch.randint(1, 5, (2, 6)).double()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, size=size, form=form)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradients_through_scores() -> None:
    """Output and scores have their gradients although the log-sum-exp has none."""
    q, k, v = (x.requires_grad_() for x in queries_keys(2, 4, 2, 5, 6, 4, torch.float64))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = attention_with_scores(q, k, v, group="sum")
        assert not result.lse.requires_grad
        return result.output, result.scores

    assert torch.autograd.gradcheck(call, (q, k, v))
    bias = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: attention_with_lse(q, k, v, bias=b).output, (bias,))


@pytest.mark.parametrize(("layout", "grad"), [("contiguous", False), ("rows", True)])
def test_opcheck(layout: str, grad: bool) -> None:
    q, k, v = (x.requires_grad_(grad) for x in queries_keys(2, 4, 2, 5, 6, 8, torch.float32, layout=layout))
    op = torch.ops.tokred.attention.default
    torch.library.opcheck(op, (q, k, v, None, None, 0.3, True))
    torch.library.opcheck(op, (q, k, v, torch.randn(2, 6), torch.rand(2, 6) > 0.3, 0.3, False))


def test_gradients_of_the_operator() -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys(2, 4, 2, 5, 6, 4, torch.float64))
    bias = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    op = torch.ops.tokred.attention
    assert torch.autograd.gradcheck(lambda q, k, v, b: op(q, k, v, b, None, 0.4, True)[0], (q, k, v, bias))
    mask = torch.rand(2, 6) > 0.3
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, None, mask, 0.4, False)[0], (q, k, v))


@pytest.mark.hosts  # half a minute of a compiler; in every run that of decode attention
def test_compile_sees_through() -> None:
    compiled = torch.compile(lambda q, k, v, s: attention(q, k, v, size=s), fullgraph=True)
    scored = torch.compile(lambda q, k, v, s: attention_with_scores(q, k, v, size=s), fullgraph=True)
    with torch.no_grad():
        for n in (33, 47):
            q, k, v = queries_keys(2, 4, 2, n, n, 16, torch.float32)
            size = sizes(2, n)
            torch.testing.assert_close(compiled(q, k, v, size), attention(q, k, v, size=size))
            for a, b in zip(scored(q, k, v, size), attention_with_scores(q, k, v, size=size), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("v must", {"v": torch.randn(2, 2, 4, 8)}, ValueError),
        ("v must", {"v": torch.randn(2, 2, 5, 8).double()}, TypeError),
        ("size", {"size": torch.ones(5)}, ValueError),
        ("key_mask", {"key_mask": torch.ones(2, 5)}, TypeError),
        ("bias", {"bias": torch.ones(2, 2, 5)}, ValueError),
        ("form", {"form": "best"}, ValueError),
        ("form 'channel'", {"form": "channel", "causal": True, "size": torch.ones(2, 5)}, ValueError),
        ("form 'channel'", {"form": "channel", "scale": -1.0, "size": torch.ones(2, 5)}, ValueError),
    ],
)
def test_errors_name_the_argument(name: str, change: dict[str, Any], error: type[Exception]) -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    arguments: dict[str, Any] = {"v": v, **change}
    with pytest.raises(error, match=name):
        attention(q, k, arguments.pop("v"), **arguments)


def test_why_not_the_kernel() -> None:
    q, k, v = queries_keys(1, 2, 2, 3, 4, 8, torch.float32)
    assert why_not_kernel(q, k, v) is not None


@pytest.mark.hosts
def test_kernels_in_the_interpreter(interpreted: Callable[[str], None]) -> None:
    interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("hk", "m", "n", "d", "dtype"),
    [
        (4, 70, 70, 24, torch.float32),
        (2, 1, 140, 80, torch.bfloat16),
        (4, 50, 20, 72, torch.float16),
        (1, 3, 1, 8, torch.bfloat16),
    ],
)
def test_kernel_parity(hk: int, m: int, n: int, d: int, dtype: torch.dtype, nan_memory: None) -> None:
    q, k, v = queries_keys(2, 4, hk, m, n, d, dtype)
    for causal, kw in ((True, {}), (False, {"size": sizes(2, n)})):
        wanted, lse = truth(q, k, v, causal=causal, **kw)
        found = attention_with_scores(q, k, v, causal=causal, **kw)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.output.double(), wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found.lse.double(), lse, atol=2e-5, rtol=2e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("terms", ["head bias", "both", "dead"])
def test_kernel_options(terms: str, nan_memory: None) -> None:
    for causal, m, n, hk in ((True, 33, 33, 2), (False, 17, 90, 4)):
        q, k, v = queries_keys(2, 4, hk, m, n, 16, torch.float32)
        check_all(q, k, v, 2e-5, causal=causal, **key_terms(terms, 2, 4, n))
