"""KeyMerge: fewer keys that count for what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tokred
from tests.diffusion.tiny import MODELS, inputs, run, sd15
from tests.kinds import DENOISERS, each
from tokred.diffusion.grid import typical_tokens
from tokred.diffusion.site import AttentionSite, SublayerPlace


def site(x: torch.Tensor, grid: tuple[int, int], **more: Any) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, 1), **more)


@pytest.mark.parametrize(("grid", "ratio", "left"), [((8, 8), 0.75, 16), ((8, 8), 0.99, 4), ((9, 7), 0.5, 32),
                                                     ((3, 9), 0.9, 3)])  # fmt: skip
def test_counts(grid: tuple[int, int], ratio: float, left: int):
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(0))
    method = tokred.KeyMerge(ratio=ratio)
    plan = method.reduce(site(x, grid))
    assert plan.slots == left == method.left(SublayerPlace(n, grid, 1))
    assert plan.sizes().sum() == 2 * n
    alone = method.reduce(site(x[1:], grid))
    assert torch.equal(alone.index[0], plan.index[1])


def test_equal_tokens_change_nothing():
    """Where every source equals its destination, weighed attention is attention over all of them, few or many."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 6, generator=g)
    which = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 0])
    x = kinds[which].unsqueeze(0)
    plan = tokred.KeyMerge(ratio=0.6, cell=2).reduce(site(x, (4, 4)))
    assert plan.slots < 16
    q = torch.randn(1, 7, 6, generator=g)
    full = F.scaled_dot_product_attention(q, x, x)
    y = plan.merge(x)
    weighed = F.scaled_dot_product_attention(q, y, y, attn_mask=plan.sizes().log().unsqueeze(1))
    torch.testing.assert_close(weighed, full)
    assert not torch.allclose(F.scaled_dot_product_attention(q, y, y), full)


def test_odd_tokens_are_no_destinations():
    """The typical token of each cell, by hand; one that is unlike all others stays alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, generator=g) + 0.3 * torch.randn(2, 63, 6, generator=g)
    odd = [20, 33]
    x[torch.arange(2), odd] = -10 * x[torch.arange(2), odd]
    found = typical_tokens(x, (9, 7), (4, 3))
    unit = F.normalize(x, dim=-1)
    for b in range(2):
        expected = []
        for top in (0, 4):
            for left in (0, 3):
                cell = [(top + y) * 7 + left + i for y in range(4) for i in range(3)]
                expected.append(cell[int((unit[b, cell] @ unit[b, cell].mean(0)).argmax())])
        assert found[b].tolist() == sorted(expected)
        plan = tokred.KeyMerge(ratio=0.85).reduce(site(x, (9, 7)))
        assert [odd[b]] in plan.groups()[b]
    for choice in ("first", "random"):
        assert tokred.KeyMerge(choice=choice).reduce(site(x, (9, 7))).slots == 16


@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.filterwarnings("ignore:.*reduced nothing")
def test_another_order_changes_nothing_in_a_denoiser(kind: str, queries: bool, monkeypatch: pytest.MonkeyPatch):
    """Every token a slot of its own, in another order, weighed by one: what is predicted is what was predicted."""
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    seen: list[tuple[Any, ...]] = []

    def turned(self: Any, at: Any) -> tokred.Reduction:
        b, n = at.shape
        seen.append((b, n))
        rows = torch.arange(n).expand(b, -1)
        none = torch.empty(b, 0, dtype=torch.int64)
        return tokred.Reduction(rows.flip(1).contiguous(), none, none, n, by_size=False, complete=True)

    monkeypatch.setattr(tokred.KeyMerge, "reduce", turned)
    tokred.apply(model, "keymerge", ratio=0.5, cell=2, max_downsample=8, queries=queries)
    torch.testing.assert_close(run(model, given), before, rtol=1e-4, atol=1e-5)
    assert seen


def test_weights_reach_the_attention(monkeypatch: pytest.MonkeyPatch):
    """A key that stands for two counts twice: the same as with both of them there."""
    model, given = sd15(), inputs("sd15")
    logs: list[torch.Tensor] = []
    original = F.scaled_dot_product_attention

    def spied(*args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs.get("attn_mask")
        if mask is not None:
            logs.append(mask)
        return original(*args, **kwargs)

    tokred.apply(model, "keymerge", ratio=0.75, max_downsample=8, share="block")
    sizes: list[torch.Tensor] = []
    reduce = tokred.KeyMerge.reduce

    def kept(self: Any, at: Any) -> tokred.Reduction:
        plan = reduce(self, at)
        sizes.append(plan.sizes())
        return plan

    monkeypatch.setattr(tokred.KeyMerge, "reduce", kept)
    from tokred.adapters.diffusion import weights

    monkeypatch.setattr(weights, "_both", lambda a, b: logs.append(b) or b)
    run(model, given)
    assert len(logs) == len(sizes) == 7
    for log, size in zip(logs, sizes, strict=True):
        torch.testing.assert_close(log.squeeze(1).squeeze(1), size.log())
        assert size.max() > 1


def test_draws():
    x = torch.randn(1, 256, 4)

    def destinations(**more: Any) -> list[int]:
        return tokred.KeyMerge(ratio=0.93, choice="random").reduce(site(x, (16, 16), **more)).representative[0].tolist()

    assert destinations(step=1) == destinations(step=1)
    assert destinations(step=1) != destinations(step=2)
    assert destinations(step=1) != destinations(step=1, layer=2)


def test_nothing_to_do():
    x = torch.randn(1, 64, 4)
    assert tokred.KeyMerge(ratio=0).reduce(site(x, (8, 8))).trivial
    assert tokred.KeyMerge(cell=1).idle
    assert tokred.KeyMerge().left(SublayerPlace(64, (8, 8), 4)) == 64
    assert tokred.KeyMerge().part == "kv"
    assert tokred.KeyMerge(queries=True).part == "tokens"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"choice": "best"}, "choice is 'best'"),
        ({"cell": 0}, "cell must be an integer of at least 1"),
        ({"max_downsample": 1.5}, "max_downsample must be an integer"),
        ({"share": "all"}, "share is 'all'"),
        ({"first_full": -1}, "first_full must be an integer of at least 0"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.KeyMerge(**parameters)
