"""The attention of a layer: every option against a softmax of all pairs in float64, and the laws that hold for all."""

from __future__ import annotations

import pytest
import torch

from tokred.core.attention import Attention

B, H, HK, M, N, D = 3, 4, 2, 6, 11, 8


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hidden(*shape: int, seed: int = 3) -> torch.Tensor:
    """A mask whose last key is seen by all."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = mask[..., -1] = True
    return mask


# Every option alone and the pairs that meet in one place; ``{"m": 11}`` for as many queries as keys.
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "bias": {"bias": drawn(B, N, seed=1)},
    "bias of heads": {"bias": drawn(B, H, N, seed=1)},
    "bias of key heads": {"bias": drawn(B, HK, N, seed=1)},
    "bias that hides": {"bias": drawn(B, N, seed=1).masked_fill(~hidden(B, N), -torch.inf)},
    "mask": {"mask": hidden(B, N)},
    "one mask for all samples": {"mask": hidden(1, N)},
    "mask of one head": {"mask": hidden(B, 1, N)},
    "mask of key heads": {"mask": hidden(B, HK, N)},
    "mask of key heads for all samples": {"mask": hidden(1, HK, N)},
    "mask and bias": {"mask": hidden(B, N), "bias": drawn(B, H, N, seed=1)},
    "masks of key heads and bias": {"mask": hidden(B, HK, N), "bias": drawn(B, N, seed=1)},
    "masks of key heads and bias of heads": {"mask": hidden(B, HK, N), "bias": drawn(B, H, N, seed=1)},
    "masks of key heads and their bias": {"mask": hidden(B, HK, N), "bias": drawn(B, HK, N, seed=1)},
    "softcap": {"softcap": 1.5},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "offset": {"causal": True, "offset": 2},
    "no offset": {"causal": True, "offset": 0},
    "everything": {
        "causal": True, "offset": 3, "window": 5, "softcap": 1.5, "scale": 0.7, "bias": drawn(B, HK, N, seed=1),
        "mask": hidden(B, HK, N),
    },
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", OPTIONS)
GROUPS = ["none", "sum", "mean", "max"]


def tensors(m: int = M, hk: int = HK, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(B, H, m, D, seed=4) * spread, drawn(B, hk, N, D, seed=5) * spread


def weights(q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:
    """``(B, H, M, N)`` float64, written out; zero in rows that see nothing."""
    h, m, n = q.shape[1], q.shape[2], k.shape[2]

    def each(t: torch.Tensor) -> torch.Tensor:
        t = t.unsqueeze(1) if t.ndim == 2 else t
        return t.repeat_interleave(h // t.shape[1], 1).unsqueeze(2)

    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    x = q.double() @ k.double().repeat_interleave(h // k.shape[1], 1).mT * scale
    if options.get("softcap"):
        x = options["softcap"] * (x / options["softcap"]).tanh()
    if options.get("bias") is not None:
        x = x + each(options["bias"]).double()
    if options.get("mask") is not None:
        x = x.masked_fill(~each(options["mask"]), -torch.inf)
    if options.get("causal"):
        offset = n - m if options.get("offset") is None else options["offset"]
        own, key = torch.arange(m).view(-1, 1) + offset, torch.arange(n)
        x = x.masked_fill(key > own, -torch.inf)
        if options.get("window"):
            x = x.masked_fill(own - key >= options["window"], -torch.inf)
    return x.softmax(-1).nan_to_num()


def grouped(x: torch.Tensor, group: str) -> torch.Tensor:
    if group == "none":
        return x
    x = x.unflatten(1, (HK, H // HK))
    return x.amax(2) if group == "max" else getattr(x, group)(2)


def close(found: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected.float(), **(tolerance or {"rtol": 2e-5, "atol": 2e-6}))


@pytest.mark.parametrize("group", GROUPS)
@EVERY
def test_columns_are_weighted_sums_of_the_rows(kind, group):
    q, k = tensors()
    made, a = Attention(q, k, **OPTIONS[kind]), weights(q, k, **OPTIONS[kind])
    assert (made.count, made.q.data_ptr()) == (M, q.data_ptr())
    close(made.columns(group=group), grouped(a.sum(2), group))
    for shape in ((M,), (B, M), (B, H, M)):
        w = drawn(*shape, seed=6).abs()
        full = w.double().expand(B, H, M) if w.ndim != 2 else w.double().unsqueeze(1)
        close(made.columns(w, group=group), grouped((full.unsqueeze(-1) * a).sum(2), group))


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(4, None), slice(-2, None), slice(None, -1)])
@EVERY
def test_some_rows_are_those_of_all(kind, rows):
    q, k = tensors()
    made, a = Attention(q, k, **OPTIONS[kind]), weights(q, k, **OPTIONS[kind])[:, :, rows]
    close(made.columns(rows=rows), a.sum(2))
    w = drawn(B, a.shape[2], seed=6)
    close(made.columns(w, rows, "max"), grouped((w.double()[:, None, :, None] * a).sum(2), "max"))
    close(made.statistics(rows=rows).max, a.amax(2))


@EVERY
def test_queries_that_are_made_as_they_are_asked_for(kind):
    options = OPTIONS[kind]
    offset = options.get("offset") or 0
    q, k = tensors(N - offset)
    asked = []

    def some(first: int, end: int) -> torch.Tensor:
        asked.append((first, end))
        return q[:, :, first:end]

    made = Attention(some, k, **options)
    assert (made.count, made.offset, asked) == (N - offset, offset, [])
    a = weights(q, k, **options)
    close(made.columns(rows=slice(3, 5)), a[:, :, 3:5].sum(2))
    assert asked == [(3, 5)]
    close(made.columns(), a.sum(2))
    assert torch.equal(made.q, q)


@pytest.mark.parametrize("group", GROUPS)
@EVERY
def test_statistics(kind, group):
    q, k = tensors()
    w, a = drawn(B, M, seed=6).abs(), weights(q, k, **OPTIONS[kind])
    full = w.double()[:, None, :, None]
    expected = ((full * a).sum(2), (full * a * a).sum(2), a.amax(2), -torch.special.xlogy(a, a).sum(2))
    found = Attention(q, k, **OPTIONS[kind]).statistics(w, group=group)
    for one, other in zip(found, expected, strict=True):
        close(one, grouped(other, group))


@EVERY
def test_other_values(kind):
    q, k = tensors()
    made, a = Attention(q, k, **OPTIONS[kind]), weights(q, k, **OPTIONS[kind])
    values = drawn(B, N, 5, seed=7)
    close(made.attend(values), a @ values.double().unsqueeze(1))
    heads = drawn(B, H, N, 5, seed=7)
    close(made.attend(heads), a @ heads.double())


@EVERY
def test_page_rank(kind):
    q, k = tensors(M if OPTIONS[kind].get("causal") else N)
    made, start = Attention(q, k, **OPTIONS[kind]), drawn(B, N, seed=8).abs()
    if made.causal or made.softcap:
        with pytest.raises(ValueError, match=r"power .*got causal="):
            made.power(start, 3)
        return
    a = weights(q, k, **OPTIONS[kind])
    expected = start.double()[:, None, None] @ a @ a @ a
    close(made.power(start, 3), expected.squeeze(2))


def test_votes():
    q, k = tensors(N)
    mask = hidden(B, N)
    made, a = Attention(q, k, mask=mask, votes=mask), weights(q, k, mask=mask)
    say = mask.double()[:, None, :, None]
    close(made.columns(), (say * a).sum(2))
    close(made.statistics().sum_squares, (say * a * a).sum(2))
    for w in (drawn(N, seed=6), drawn(B, N, seed=6), drawn(B, H, N, seed=6)):
        full = w.double()[:, None] if w.ndim == 2 else w.double()
        close(made.columns(w), (full.expand(B, H, N).unsqueeze(-1) * say * a).sum(2))
        expected = (full.expand(B, H, N) * mask[:, None]).unsqueeze(2) @ a @ a
        close(made.power(w, 2), expected.squeeze(2))
    close(made.columns(rows=slice(1, 3)), a[:, :, 1:3].sum(2))
    assert not made.columns()[(~mask).unsqueeze(1).expand(B, H, N)].any(), "masked keys get nothing"


@EVERY
def test_the_order_of_the_batch_does_not_matter(kind):
    q, k = tensors()
    turn = torch.tensor([2, 0, 1])

    def turned(t):
        return t[turn] if isinstance(t, torch.Tensor) and t.shape[0] == B else t

    there = Attention(q, k, **OPTIONS[kind])
    back = Attention(q[turn], k[turn], **{name: turned(t) for name, t in OPTIONS[kind].items()})
    assert torch.equal(back.columns(group="mean"), there.columns(group="mean")[turn])
    alone = Attention(q[1:2], k[1:2], **{n: t[1:2] if turned(t) is not t else t for n, t in OPTIONS[kind].items()})
    close(alone.columns(), there.columns()[1:2])


@EVERY
def test_keys_that_are_hidden_get_nothing_and_change_nothing(kind):
    options, (q, k) = OPTIONS[kind], tensors()
    gone = torch.zeros(B, N, dtype=torch.bool)
    gone[:, 4] = True
    mask = options.get("mask", torch.ones(B, N, dtype=torch.bool))
    mask = mask & ~(gone if mask.ndim == 2 else gone.unsqueeze(1))
    made = [Attention(q, t, **{**options, "mask": mask}) for t in (k, k.masked_fill(gone[:, None, :, None], 50.0))]
    first, second = (one.columns() for one in made)
    assert not first[..., 4].any()
    assert torch.equal(first, second)
    assert torch.equal(*(one.attend(drawn(B, N, 2)) for one in made))


def test_queries_that_see_nothing_give_nothing():
    q, k = tensors()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0] = False
    for more in ({}, {"softcap": 2.0}):
        made = Attention(q, k, mask=mask, **more)
        assert not made.columns()[0].any()
        assert not made.attend(drawn(B, N, 2))[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY
def test_half_precision_is_float32_from_the_first_operation(kind, dtype):
    """Logits of which half precision would keep a digit or two, and a single large one beside them."""
    q, k = (t.to(dtype) for t in tensors(spread=4.0))
    made, options = Attention(q, k, **OPTIONS[kind]), OPTIONS[kind]
    wide = Attention(q.float(), k.float(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.columns()
        values = made.attend(drawn(B, N, 3))
    assert found.dtype == values.dtype == torch.float32
    assert torch.equal(found, wide.columns())
    assert torch.equal(values, wide.attend(drawn(B, N, 3)))
    close(found, weights(q, k, **options).sum(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hk", [4, 1])
def test_among_some_tokens(hk):
    q, k = tensors(N, hk)
    rows, real = torch.tensor([[0, 2, 3, 9], [1, 4, 5, 6], [7, 8, 9, 10]]), torch.ones(B, 4, dtype=torch.bool)
    real[1, 3] = False
    for bias in (None, drawn(B, N, seed=1), drawn(B, H, N, seed=1)):
        made = Attention(q, k, bias=bias, scale=0.4, softcap=3.0)
        some = made.among(rows, real)
        for i in range(B):
            at = rows[i][real[i]]
            alone = made.sample(i, at)
            part = None if bias is None else bias[i : i + 1][..., at]
            one = weights(q[i : i + 1, :, at], k[i : i + 1, :, at], bias=part, scale=0.4, softcap=3.0)
            close(alone.columns(), one.sum(2))
            close(some.columns()[i : i + 1, :, : len(at)], one.sum(2))
    for pick in (lambda a: a.among(rows), lambda a: a.sample(0, rows[0])):
        with pytest.raises(ValueError, match="this one is causal"):
            pick(Attention(q, k, causal=True))


def test_arguments_that_do_not_fit():
    q, k = tensors()
    with pytest.raises(ValueError, match=r"need causal=True, got window=3, offset=None"):
        Attention(q, k, window=3)
    with pytest.raises(ValueError, match=r"need causal=True, got window=None, offset=1"):
        Attention(q, k, offset=1)
    with pytest.raises(ValueError, match=r"offset must be 0 to 5 for 6 queries and 11 keys, got 6"):
        Attention(q, k, causal=True, offset=6)
    for rows in (slice(3, 3), slice(6, None), slice(0, 4, 2), slice(-9, 2)):
        with pytest.raises(ValueError, match="rows must be some of 6 queries"):
            Attention(q, k).columns(rows=rows)
    with pytest.raises(ValueError, match="group must be one of"):
        Attention(q, k).columns(group="all")


def test_gradients_flow_to_queries_keys_and_values():
    q, k, v = (t.double().requires_grad_() for t in (*tensors(), drawn(B, N, 3)))
    w, mask = torch.arange(float(M)).double(), hidden(B, HK, N)
    made, a = Attention(q, k, mask=mask), weights(q, k, mask=mask)
    given = torch.autograd.grad(made.columns(w)[..., 0].sum() + made.attend(v).square().sum(), (q, k, v))
    expected = (a * w[:, None]).sum(2)[..., 0].sum() + (a @ v.unsqueeze(1)).square().sum()
    for one, other in zip(given, torch.autograd.grad(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # other values are taken in float32
