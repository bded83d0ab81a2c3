"""Hidden tokens: what a mask hides is as if it had been dropped before, with every method of the blocks."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.encoder.blocks import OF_GRID, SETTINGS, learned, method, site, tensors
from tokred.core.site import Site
from tokred.encoder.padding import reduce_each

LABELS = [label for label in SETTINGS if label not in OF_GRID]


def holes(seed: int, kept: tuple[int, ...] = (16, 11, 6)) -> torch.Tensor:
    """``(3, 18)``: patches hidden anywhere, each sample having lost others; both ends are real."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(len(kept), 18, dtype=torch.bool)
    for i, count in enumerate(kept):
        mask[i, 1 + torch.randperm(16, generator=g)[count:]] = False
    return mask


def behind(kept: tuple[int, ...] = (16, 11, 6)) -> torch.Tensor:
    """``(3, 18)``: padding behind the real patches, in front of the token at the end."""
    mask = torch.ones(len(kept), 18, dtype=torch.bool)
    for i, count in enumerate(kept):
        mask[i, 1 + count : 17] = False
    return mask


def alone(label: str, given: dict[str, torch.Tensor], i: int, rows: torch.Tensor) -> Site:
    """One sample that never had the hidden tokens."""
    cut = {}
    for name, value in given.items():
        dim = 1 if name in ("motion", "x", "before", "after") else 2
        cut[name] = value[i : i + 1].index_select(dim, rows)
    found = site(label, cut)
    return Site(
        **{n: v for n, v in cut.items() if n not in ("before", "after")}, transform=(cut["before"], cut["after"]),
        prefix=1, suffix=1, layer=found.layer, depth=2, learned=found.learned,
    )  # fmt: skip


def check(label: str, step: tokred.Reduction, given: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
    """Every sample's slots are those that it has alone, in their order and with their members."""
    one = method(label)
    merged, sizes = step.merge(given["x"], mask.float()), step.sizes(mask.float())
    for i in range(len(mask)):
        rows = mask[i].nonzero().flatten()
        by_itself = alone(label, given, i, rows)
        expected = one.reduce(by_itself)
        here = torch.ones(step.slots, dtype=torch.bool) if step.mask is None else step.mask[i]
        if step.trivial:
            here = mask[i]
        # Alone, there is no padding; only a protected token that has halted keeps a row which nobody sees.
        seen = slice(None) if expected.mask is None else expected.mask[0]
        torch.testing.assert_close(merged[i][here], expected.merge(by_itself.x)[0][seen], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sizes[i][here], expected.sizes()[0][seen])
        assert (sizes[i][~here] == 0).all()


@pytest.mark.parametrize("label", LABELS)
def test_dropping_is_masking(label):
    one = method(label)
    for seed in range(4):
        given, mask = tensors(seed, batch=3, heads=2), holes(seed)
        whole = site(label, given, mask=mask)
        check(label, one.reduce(whole) if one.by_mask else reduce_each(one, whole), given, mask)


@pytest.mark.parametrize("label", LABELS)
def test_padding_behind_the_real_tokens(label):
    """As methods of uneven counts leave it: decided for the batch at once."""
    for seed in range(4):
        given, mask = tensors(seed, batch=3, heads=2), behind()
        check(label, method(label).reduce(site(label, given, mask=mask)), given, mask)


@pytest.mark.parametrize(
    "label", [label for label in SETTINGS if not label.startswith(("downsample", "pixelprune", "bavit"))]
)
def test_hidden_tokens_never_meet_visible_ones(label):
    for seed in range(6):
        given, mask = tensors(seed, batch=3, heads=3), holes(seed)
        if label.startswith("vtm") and label in OF_GRID:
            continue
        step = method(label).reduce(site(label, given, mask=mask))
        poisoned = {**given, "x": given["x"].masked_fill(~mask.unsqueeze(-1), 1e6)}
        merged = step.merge(poisoned["x"], mask.float())
        here = torch.ones(3, step.slots, dtype=torch.bool) if step.mask is None else step.mask
        here = mask if step.trivial else here
        assert (merged[here].abs() < 1e3).all(), "a hidden token came out, or went into a visible one"
        kept = step.sizes(mask.float())
        assert (kept[~here] == 0).all()
        if not method(label).drops and not label.startswith("vomix") and "tofu" not in label:
            torch.testing.assert_close(kept.sum(1), mask.float().sum(1))


@pytest.mark.parametrize("label", OF_GRID)
def test_what_is_left_of_a_grid_is_none(label):
    given, mask = tensors(0, batch=3), holes(0)
    with pytest.raises(tokred.MissingInputError, match=r"does not know the grid .* hidden by a mask"):
        reduce_each(method(label), site(label, given, mask=mask))
    found = reduce_each(method(label), site(label, given, mask=torch.ones_like(mask)))
    plain = method(label).reduce(site(label, given))
    for step in (found, plain):
        assert not step.trivial
    a, b = found.merge(given["x"]), plain.merge(given["x"])
    for i in range(3):
        kept = slice(None) if plain.mask is None else plain.mask[i]
        torch.testing.assert_close(a[i][found.mask[i]], b[i][kept])


@pytest.mark.parametrize("label", OF_GRID)
def test_without_a_grid_methods_of_the_grid_refuse(label):
    given = tensors(0)
    unknown = Site(x=given["x"], q=given["q"], k=given["k"], v=given["v"], prefix=1, suffix=1, depth=2,
                   learned=learned(label, given["x"].shape[-1]))  # fmt: skip
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
        method(label).reduce(unknown)


def test_places_of_a_sample_are_those_before_tokens_were_hidden():
    rows = torch.tensor([0, 3, 4, 17])
    part = site("tome-k", tensors(0)).sample(1, rows)
    assert part.positions.tolist() == [rows.tolist()]
    assert site("tome-k", tensors(0)).sample(1, torch.arange(18)).grid == (4, 4)
