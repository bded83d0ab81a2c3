"""FastV: the card's example, and whose attention counts."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm.layered import LAYOUT, check_laws, columns_kept, layer_site, layout
from tokred.core.attention import Attention
from tokred.methods.vlm.fastv import FastV
from tokred.vlm import LayerSite


def maps(site: LayerSite) -> torch.Tensor:
    """``(B, H, L, L)`` float64 attention of the layer before, written out."""
    heads, length = site.attention_of("before"), site.shape[1]
    q, k = heads.q.double(), heads.k.double().repeat_interleave(2, 1)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen if site.mask is None else seen & site.mask[:, None, None]
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


def best(scores: torch.Tensor, visual: torch.Tensor, count: int) -> list[int]:
    """The visual columns with the highest scores, ties to the lower one."""
    columns = visual.nonzero().flatten().tolist()
    return sorted(sorted(columns, key=lambda j: (-float(scores[j]), j))[:count])


def test_worked_example():
    rows = torch.tensor([[0.1, 0.2, 0.05, 0.15, 0.3, 0.2], [0.1, 0.1, 0.25, 0.05, 0.2, 0.3]])

    class Given(LayerSite):
        def row_scores(self, rows_=1, *, of="own", heads="mean", group="none"):
            assert (rows_, of) == (1, "before")
            return rows.mean(0, keepdim=True) if heads == "mean" else rows.amax(0, keepdim=True)

    def kept(**parameters):
        visual = torch.tensor([[False, True, True, True, True, False]])
        found = FastV(**parameters).reduce(Given(x=torch.zeros(1, 6, 2), visual=visual, layer=2, depth=4))
        return found.representative[0].tolist()

    assert kept() == [0, 1, 4, 5], "the tie goes to the lower column"
    assert kept(heads="max") == [0, 2, 4, 5]
    assert FastV().left(5) == 2, "half to even"
    assert FastV().left(7) == 4


# Text before, between and behind images, padding, and an image at the end.
ROWS = [*LAYOUT, "ttvvvvttvvvvttttt", "-tvvvttttvvvvvvvv"]


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_the_mean_over_what_comes_after_the_image(heads):
    site, (visual, real) = layer_site(ROWS), layout(ROWS)
    last = FastV(ratio=0.5, layer=3, heads=heads).reduce(layer_site(ROWS))
    found = FastV(ratio=0.5, layer=3, query="mean", heads=heads).reduce(site)
    attention, differ = maps(site), False
    for i, row in enumerate(ROWS):
        after = [j for j in range(len(row)) if j > row.rindex("v")] or [len(row) - 1]
        one = attention[i][:, after].mean(1)
        scores = one.mean(0) if heads == "mean" else one.amax(0)
        count = round(row.count("v") / 2)
        if row.endswith("v"):  # the prompt's last token stays whatever it gets
            scores[-1] = 2
        wanted = best(scores, visual[i], count)
        kept = [j + len(row) for j in columns_kept(found, i)]
        assert [j for j in kept if visual[i, j]] == wanted
        assert [j for j in kept if not visual[i, j] and real[i, j]] == [j for j, c in enumerate(row) if c == "t"]
        differ |= columns_kept(found, i) != columns_kept(last, i)
    assert differ, "another choice than the last token's"


def test_the_last_token():
    site, (visual, _) = layer_site(ROWS), layout(ROWS)
    found = FastV(ratio=0.25, layer=3).reduce(site)
    attention = maps(site)[:, :, -1].mean(1)
    for i, row in enumerate(ROWS):
        scores = attention[i].clone()
        if row.endswith("v"):
            scores[-1] = 2
        kept = [j + len(row) for j in columns_kept(found, i)]
        assert [j for j in kept if visual[i, j]] == best(scores, visual[i], round(row.count("v") * 0.75))


def test_drafts_do_not_vote():
    """Tokens that wait for verification are no part of the prompt."""
    site = layer_site(["ttvvvvvvvvvvtttt"])
    heads = site.attention_of("before")
    fields = {"visual": site.visual, "before": Attention(heads.q, heads.k, causal=True), "layer": 3, "depth": 8}
    for query in ("last", "mean"):
        method = FastV(layer=3, query=query)
        found = method.reduce(LayerSite(x=site.x, end=14, **fields))
        before = Attention(heads.queries(0, 14), heads.k[:, :, :14], causal=True)
        short = {**fields, "visual": site.visual[:, :14], "before": before}
        alone = method.reduce(LayerSite(x=site.x[:, :14], **short))
        assert found.representative[0].tolist() == [*alone.representative[0].tolist(), 14, 15]


@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_laws(query, heads):
    check_laws(FastV(layer=3, query=query, heads=heads), FastV(layer=3, ratio=0.0), 3)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"layer": 0}, "layer must be"),
        ({"ratio": 1.0}, "leaves no visual token"),
        ({"ratio": -0.1}, "ratio"),
        ({"query": "first"}, "query is 'first'"),
        ({"heads": "sum"}, "heads is 'sum'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("fastv", **parameters)
