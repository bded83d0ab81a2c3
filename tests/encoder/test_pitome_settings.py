"""PiToMe's released settings for text, retrieval and classification, and batches with padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.angles import check_compiled_and_trained, check_on_a_model, column, keys, real_groups
from tokred.methods.encoder.pitome import FORMS, PRESETS

NINE = column(9, 1)
K9 = keys([0, 10, 15, 21, 28, 90, 130, 171, 200])


def margins(method: tokred.PiToMe, depth: int) -> list[float]:
    """The margin of every layer, read off the energy of two equal tokens, which is 1 - margin."""
    same = torch.ones(1, 2, 3, dtype=torch.float64)
    elu = tokred.PiToMe(margin=method.margin, fall=method.fall)
    return [1 - float(elu.energies(same, layer, depth)[0, 0]) for layer in range(depth)]


@pytest.mark.parametrize("host", PRESETS)
def test_presets_are_methods(host):
    method = tokred.PiToMe.preset(host, 0.9)
    assert method.ratio == 0.9
    assert tokred.from_dict(method.to_dict()) == method
    assert not method.proportional, "the released code never feeds sizes to attention"
    assert tokred.PiToMe.preset(host, 0.9, prop_attn=True).proportional


def test_forms_and_margins_of_the_presets():
    def forms(host: str, depth: int = 12) -> str:
        method = tokred.PiToMe.preset(host, 0.9)
        return "".join(method._form(layer, depth)[0] for layer in range(depth))

    assert forms("deit") == forms("augreg") == "bbbbbbpppppp"
    assert forms("mae") == "ppppppbbbbbb"
    assert forms("blip") == forms("clip") == "p" * 12
    assert forms("clip-hf", 24) == "t" * 13 + "p" * 11
    for host, first in {"deit": 0.75, "mae": 0.75, "augreg": 0.9, "blip": 0.9, "clip": 0.95, "clip-hf": 0.9}.items():
        expected = [first * (1 - layer / 12) for layer in range(12)]
        assert margins(tokred.PiToMe.preset(host, 0.9), 12) == pytest.approx(expected)
    assert margins(tokred.PiToMe.preset("bert", 0.9), 12) == pytest.approx([0.9 - 0.25 * i / 12 for i in range(12)])


def test_where_the_presets_act():
    def acts(host: str, depth: int = 12) -> list[int]:
        method = tokred.PiToMe.preset(host, 0.9)
        return [i for i in range(depth) if method.acts(101, tokred.Place(layer=i, depth=depth, prefix=1))]

    assert acts("bert") == [0, 1, 2]
    assert acts("blip") == list(range(1, 12))
    assert acts("clip") == list(range(12))


def test_what_the_presets_compare():
    assert {host: tokred.PiToMe.preset(host, 0.9).metric for host in PRESETS} == {
        "deit": "k", "mae": "k", "augreg": "k", "blip": "x", "clip": "x", "clip-hf": "x", "bert": "k",
    }  # fmt: skip


def test_the_text_preset_is_the_text_form_of_the_card():
    method = tokred.PiToMe.preset("bert", 0.75, margin=0.5)
    expected = [0.425045, 0.433887, 0.445733, 0.460707, 0.375156, 0.330722, 0.309208, 0.241203]
    assert method.energies(K9[:, 0, 1:])[0].tolist() == pytest.approx(expected, abs=2e-6)
    size = torch.tensor([[1.0, 1, 1, 1, 5, 1, 1, 1, 1]])
    r = method.reduce(tokred.Site(x=NINE, k=K9, prefix=1, sizes=size))
    assert r.merge(NINE, size).flatten().tolist() == pytest.approx([1, 6, 7, 8, 9, 4, 2]), "the plain mean of each step"
    # Layer 3 of 12 has the margin 0.9 - 0.25 / 4, so a width of 0.1625.
    two, width = torch.tensor([[[1.0, 0], [0.2, math.sqrt(1 - 0.04)]]]), 0.1625
    energy = (1 + math.exp(-((0.8 / width) ** 2) / 2)) / (2 * width * math.sqrt(2 * math.pi))
    assert tokred.PiToMe.preset("bert", 0.9).energies(two, 3, 12)[0].tolist() == pytest.approx([energy, energy])


def test_the_form_by_position_is_tome():
    x = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    site = tokred.Site(x=x, prefix=1, layer=3, depth=24)
    ours = tokred.PiToMe.preset("clip-hf", 0.7).reduce(site)
    assert ours.groups() == tokred.ToMe(r=3, metric="x").reduce(site).groups()
    assert not ours.by_size
    late = tokred.Site(x=x, prefix=1, layer=13, depth=24)
    assert (
        tokred.PiToMe.preset("clip-hf", 0.7).reduce(late).groups()
        == tokred.PiToMe(0.7, form="plain", metric="x").reduce(late).groups()
    )


@given(
    st.sampled_from(FORMS), st.integers(2, 16), st.integers(0, 2), st.integers(0, 2),
    st.sampled_from([0.5, 0.75, 0.95]), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_padding_takes_no_part(form, free, prefix, suffix, ratio, seed):
    g = torch.Generator().manual_seed(seed)
    n = prefix + free + suffix
    x = torch.randn(2, n, 4, generator=g)
    short = int(torch.randint(1, free + 1, (1,), generator=g))
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, prefix + short : prefix + free] = False
    method = tokred.PiToMe(ratio=ratio, form=form, metric="x", margin=0.4)
    place = {"prefix": prefix, "suffix": suffix, "layer": 1, "depth": 4}
    both = method.reduce(tokred.Site(x=x, mask=mask, **place))
    for i in range(2):
        rows = mask[i].nonzero().flatten()
        alone = method.reduce(tokred.Site(x=x[i : i + 1, rows], **place))
        if both.trivial:
            assert alone.trivial
            continue
        groups = [[rows[t].item() for t in group] for group in real_groups(alone, 0)]
        assert real_groups(both, i) == groups
        assert len(groups) == method.tokens(len(rows), tokred.Place(**place))
        merged, expected = both.merge(x), alone.merge(x[i : i + 1, rows])
        real = merged[i] if both.mask is None else merged[i][both.mask[i]]
        torch.testing.assert_close(real, expected[0])


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"fall": -0.1}, r"fall must lie in \[0, 2\], got -0.1"),
        ({"start": -1}, "start must be an integer of at least 0, got -1"),
        ({"stop": 1.5}, "stop must be an integer of at least 0, got 1.5"),
        ({"turn": True}, "turn must be an integer of at least 0, got True"),
        ({"form": "text"}, "form is 'text'; allowed are 'plain'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.PiToMe(**parameters)


def test_unknown_preset():
    with pytest.raises(ValueError, match="host is 'gpt'; allowed are 'deit', 'mae'"):
        tokred.PiToMe.preset("gpt", 0.9)


@pytest.mark.parametrize("host", ["clip", "clip-hf", "bert", "mae"])
def test_on_models(host):
    check_on_a_model("vit-pre-norm (CLIP)", tokred.PiToMe.preset(host, 0.8), tokred.PiToMe.preset(host, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("method", [tokred.PiToMe.preset("clip-hf", 0.8)])
def test_compiles_and_trains(method):
    check_compiled_and_trained("vit-mean", method)
