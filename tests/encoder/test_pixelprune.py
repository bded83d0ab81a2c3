"""PixelPrune: the card's examples, what can be rebuilt, and models that see fewer patches from their first block on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.core.attention import Attention
from tokred.methods.encoder.pixelprune import PixelPrune


def grid(*rows: str) -> torch.Tensor:
    """``(1, rows, columns, 1)`` patches of one pixel."""
    return torch.tensor([[[float(c)] for c in row] for row in rows])[None]


def flat(t: torch.Tensor) -> list[int]:
    return t.flatten().tolist()


@pytest.mark.parametrize("anchored", [True, False])
def test_the_predictor(anchored):
    kept, source = PixelPrune(std=1.0, anchored=anchored).predict(grid("00077", "00077", "05577", "05555"))
    assert kept.flatten().nonzero().flatten().tolist() == [0, 3, 11, 13, 18]
    assert flat(source) == [0, 0, 0, 3, 3, 0, 0, 0, 3, 3, 0, 11, 11, 13, 13, 0, 11, 11, 18, 18]


def test_errors_do_not_add_up_where_they_are_anchored():
    row = grid("012345")
    kept, source = PixelPrune(std=0.125, tau=0.125).predict(row)
    assert flat(source) == [0, 0, 2, 2, 4, 4]
    assert kept.flatten().nonzero().flatten().tolist() == [0, 2, 4]
    kept, _ = PixelPrune(std=0.125, tau=0.125, anchored=False).predict(row)
    assert kept.flatten().nonzero().flatten().tolist() == [0]


def test_mass_makes_up_for_what_equals_what_is_there():
    """Without positions, patches that are left out and their mass are as good as all of them."""
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    step = PixelPrune(mass=True, std=1.0).reduce(tokred.Site(x=x, grid=(1, 4), pixels=x))
    assert step.representative.tolist() == [[0, 3]]
    assert step.sizes().tolist() == [[3, 1]]
    assert PixelPrune(std=1.0).reduce(tokred.Site(x=x, grid=(1, 4), pixels=x)).sizes().tolist() == [[1, 1]]

    def attended(rows, sizes):
        heads = rows.unsqueeze(1)
        bias = None if sizes is None else sizes.log()
        return Attention(heads, heads, bias=bias, scale=1.0).attend(heads)[:, 0]

    short = attended(step.gather(x), step.sizes())
    torch.testing.assert_close(short, torch.tensor([[[0.8908, 0.1092], [0.5246, 0.4754]]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(short, attended(x, None)[:, [0, 3]])
    assert attended(step.gather(x), None)[0, 0, 0].item() == pytest.approx(0.7311, abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from(["loco", "raster"]),
    st.data(),
)
def test_every_patch_stays_within_the_tolerance(rows, columns, tau, scan, data):
    levels = data.draw(st.lists(st.integers(0, 3), min_size=2 * rows * columns, max_size=2 * rows * columns))
    x = torch.tensor(levels).float().view(2, rows, columns, 1) / 10
    method = PixelPrune(std=1.0, tau=tau, scan=scan)
    kept, source = method.predict(x)
    assert bool(kept[:, 0, 0].all())
    pixels = x.flatten(1)
    rebuilt = pixels.gather(1, source.flatten(1))
    assert (rebuilt - pixels).abs().max() <= tau + 1e-6
    assert bool(kept.flatten(1).gather(1, source.flatten(1)).all()), "sources stay"
    assert bool((source.flatten(1) <= torch.arange(rows * columns)).all()) or scan == "loco"
    if tau == 0:
        assert torch.equal(rebuilt, pixels)
        diagonal = method._by_diagonals(x, torch.arange(rows * columns).view(rows, columns).expand(2, -1, -1))
        assert scan == "raster" or torch.equal(diagonal[0], kept)
        assert scan == "raster" or torch.equal(diagonal[1], source)
    alone = method.predict(x[1:])
    assert torch.equal(alone[0], kept[1:])


def test_a_least_share():
    x = torch.zeros(1, 3, 3, 1)
    x[0, 1, 1] = 0.05
    method = PixelPrune(std=1.0, tau=0.1, min_keep=0.2)
    kept, source = method.predict(x)
    assert kept.flatten().nonzero().flatten().tolist() == [0, 4], "the one that differs most"
    assert flat(source)[4] == 4
    assert PixelPrune(min_keep=1.0).acts(10, tokred.Place(0, 3)) is False


def test_on_a_model():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model = build("vit")
    size = images().shape[-1]
    patch = model.patch_embed.patch_size[0]
    x = images()[:2]
    blank = x.clone()
    blank[0, :, : size // patch // 2 * patch] = 0.25
    blank[1] = 0.25
    with torch.no_grad():
        y, z = model(x), model(blank)
        tokred.apply(model, "pixelprune")
        assert torch.equal(model(x), y), "no two patches alike: bit for bit"
        short = model(blank)
        report = tokred.report(model)
        assert report.layers[0].tokens_out < report.layers[0].tokens_in
        assert report.layers[1].tokens_in == report.layers[0].tokens_out
        for i in range(2):
            torch.testing.assert_close(model(blank[i : i + 1]), short[i : i + 1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(short, z)
        tokred.remove(model)
        assert torch.equal(model(blank), z)


def test_pixels_are_not_kept_alive():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images
    from tokred.adapters.encoder.host import shared_of

    model = tokred.apply(build("vit"), "pixelprune", tau=0.9, metric="mae", min_keep=0.5)
    with torch.no_grad():
        model(images())
    ((_, _, shared),) = shared_of(model)
    states = [slot.state for slot in shared.slots.last.values()] + [record.state for record in shared.records.values()]
    assert len(states) > 4
    assert all(state.sides is not None and state.sides.pixels is None for state in states)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"tau": 1.0}, "tau must lie"),
        ({"metric": "l1"}, "metric is 'l1'"),
        ({"scan": "spiral"}, "scan is 'spiral'"),
        ({"min_keep": 2}, "min_keep must lie"),
        ({"std": 0}, "std must be"),
        ({"mass": 1}, "mass"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises((TypeError, ValueError), match=match):
        tokred.make("pixelprune", **parameters)


def test_a_std_for_each_channel():
    x = torch.rand(1, 2, 2, 12)
    assert PixelPrune(std=(0.1, 0.2, 0.3))._scaled(x)[..., 4:8].allclose(x[..., 4:8] * 0.2)
    with pytest.raises(ValueError, match="std has 5 numbers, but a patch has 12 pixels"):
        PixelPrune(std=(0.1,) * 5).predict(x)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.01])
def test_a_clip(anchored, tau):
    x = torch.zeros(1, 3, 2, 3, 1)
    x[:, :, 0, 2] = 4
    x[:, 1:, 1, 1] = 9
    x[:, 2, 0, 0] = 3
    kept, source = PixelPrune(std=1.0, anchored=anchored, tau=tau).predict(x)
    assert kept.flatten().nonzero().flatten().tolist() == [0, 2, 5, 10, 12]
    assert flat(source[0, 2]) == [12, 0, 2, 0, 10, 5]
    assert torch.equal(x.flatten()[source.flatten()], x.flatten())


TOWERS = ("qwen2.5", pytest.param("qwen2", marks=pytest.mark.hosts), pytest.param("qwen3", marks=pytest.mark.hosts))


@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_join_patches(name):
    """Whole cells leave, images do not change each other, and what comes out has its full length."""
    pytest.importorskip("transformers")
    from tests.encoder.tiny_towers import SIZES, alone, build, inputs, run

    model, given = build(name), inputs(name)
    y = run(model, given)
    with tokred.applied(model, "pixelprune"):
        for a, b in zip(run(model, given), y, strict=True):
            assert torch.equal(a, b), "no two cells alike: bit for bit"
        given["hidden_states"][:48] = 0.5  # twelve cells of the first image, in the order of the tower
        # One patch of a blank cell differs: the whole cell stays.
        given["hidden_states"][20] += 1
        whole = run(model, given)
        layers = tokred.report(model).layers
        # The cell with the patch, what is told by it, and the first one stay.
        gone = layers[0].tokens_in - layers[0].tokens_out
        assert gone % 4 == 0
        assert 32 <= gone <= 40
        assert all(row.tokens_in == layers[0].tokens_out for row in layers[1:])
        assert [t.shape for t in whole] == [t.shape for t in y]
        each = [run(model, alone(name, given, SIZES, i)) for i in range(3)]
        for parts, found in zip(zip(*each, strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(parts), found, rtol=1e-4, atol=1e-5)
    plain = run(model, given)
    for a, b in zip(whole, plain, strict=True):
        first = len(a) * 96 // 208
        assert not torch.equal(a[:first], b[:first])
        # Attention cannot tell: other images are bit for bit as they were.
        assert torch.equal(a[first:], b[first:])


def test_windows_cannot_tell():
    """Before the first block that sees whole frames, windows that have lost nothing are bit for bit as they were."""
    pytest.importorskip("transformers")
    from tests.encoder.tiny_towers import build, inputs, run
    from tokred.adapters.encoder.packed.layout import Folding

    model, given = build("qwen2.5", fullatt_block_indexes=[]), inputs("qwen2.5", ((1, 8, 16),))
    given["hidden_states"].view(4, 8, 4, -1)[:2, :2] = 0.25  # cells of the upper left window, one of four in a row
    y = run(model, given)
    tokred.apply(model, "pixelprune")
    z = run(model, given)
    assert tokred.report(model).layers[0].tokens_out == 128 - 12
    order, window = Folding(2, 2).order(8, 16, torch.device("cpu"))
    kept = (window != 0)[order].view(4, 2, 8, 2)[:, 0, :, 0].flatten()
    assert int((~kept).sum()) == 4
    assert torch.equal(z[1][kept], y[1][kept])
    assert not torch.equal(z[1], y[1])


def test_the_order_of_what_stays_in_windows():
    from tokred.adapters.encoder.packed.layout import Folding, Layout

    layout = Layout.of([(1, 8, 12)], Folding(2, 4), torch.device("cpu"))
    cells = layout.groups[0].rows[0].view(4, 2, 6, 2)[:, 0, :, 0].flatten()  # the first row of each cell
    units = [0, 4, 7, 10, 22]
    at = cells[units]
    assert at.argsort().tolist() == [0, 2, 1, 3, 4]
    kept = (at.unsqueeze(1) + torch.arange(4)).flatten().sort().values
    assert layout.ends(kept, True).diff().tolist() == [8, 12]
