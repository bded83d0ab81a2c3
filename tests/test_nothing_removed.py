"""A method that cannot remove anything says so when it is applied, and what to give."""

from __future__ import annotations

import re
import warnings

import pytest

import tokred
from tests.encoder.test_timm import METHODS, NOTHING
from tests.encoder.tiny_timm import build
from tokred.core.registry import methods

NAMED = {
    "tome": ("r=0", "r=8"), "tofu": ("r=0", "r=8"), "random": ("r=0", "r=8"), "random_prune": ("r=0", "r=8"),
    "pitome": ("ratio=1.0", "ratio=0.9"), "downsample": ("keep=1.0", "keep=0.5"),
    "cropr": ("r=0", "r=8"), "dtem": ("r=0", "r=8"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_by_name_alone(name):
    at, give = NAMED[name]
    model = build("vit")
    text = f"{name} removes nothing at {at}: give {give.partition('=')[0]}=..., such as tokred.apply(model, '{name}', "
    with pytest.warns(tokred.NothingRemovedWarning) as found:
        tokred.apply(model, name)
    assert [str(w.message) for w in found] == [f"{text}{give})"]
    assert found[0].filename == __file__, "the warning points at the call"
    assert issubclass(tokred.NothingRemovedWarning, tokred.TokredWarning)
    assert issubclass(tokred.TokredWarning, UserWarning)


@pytest.mark.parametrize("name", NOTHING)
def test_settings_that_say_so_are_silent(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokred.TokredWarning)
        if name != "spatten":  # whose first three layers never prune
            tokred.apply(build("vit"), name, **NOTHING[name])
    assert tokred.make(name, **NOTHING[name]).why_idle(24) is not None


def test_an_object_with_its_defaults():
    with pytest.warns(tokred.NothingRemovedWarning, match="tome removes nothing at r=0"):
        tokred.apply(build("vit"), tokred.ToMe(prop_attn=False))
    with pytest.warns(tokred.NothingRemovedWarning, match="tome removes nothing at r=0"):
        tokred.apply(build("vit"), "tome", metric="x")


@pytest.mark.parametrize("case", METHODS)
def test_settings_that_remove_something_are_silent(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokred.TokredWarning)
        tokred.apply(build("vit"), case.partition("-")[0], **METHODS[case])


def test_by_default_only_those_whose_page_says_so_remove_nothing():
    idle = {name for name in tokred.list_methods() if any(m.why_idle(24) for m in tokred.make(name).members)}
    assert idle == {*NAMED, "duoattention", "diffrate"}  # of which nothing, or a list for each block, is asked
    assert {name for name in tokred.list_methods() if methods.get(name).usual} == idle


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("evit", {"kappa": 1.0, "fuse": False}, "at kappa=1.0: give kappa=..., such as .*'evit', kappa=0.7"),
        ("snapkv", {"budget": 1.0}, "at budget=1.0: give budget=..., such as .*budget=0.5"),
        ("tomesd", {"ratio": 0}, "at ratio=0: give ratio=..., such as .*ratio=0.5"),
        ("divprune", {"budget": 1.0}, "at budget=1.0: give budget=..., such as .*budget=0.098"),
        ("fastv", {"ratio": 0.0}, "at ratio=0.0: give ratio=..., such as .*ratio=0.5"),
        ("duoattention", {}, "duoattention removes nothing at gates=None: give gates=...$"),
        ("ats", {"blocks": ()}, r"at blocks=\[\]: give blocks=..., such as .*blocks=None"),
        ("pitome", {"ratio": 0.9, "start": 30}, "at start=30: give start=..., such as .*start=0"),
        ("tome", {"r": [0, 0]}, r"at r=\[0, 0\]: give r=..., such as .*r=8"),
    ],
)
def test_which_parameter_is_named(name, parameters, text):
    idle = tokred.make(name, **parameters).why_idle(24)
    assert re.search(text, idle.text)
    assert idle.meant == bool(parameters)
    assert f"at {idle.parameter}=" in idle.text


def test_depth_and_chosen_blocks_count():
    assert "removes nothing of 1 layers" in tokred.EViT().why_idle(1).text
    assert "removes nothing of 3 layers" in tokred.SpAtten().why_idle(3).text, "its first three layers prune nothing"
    assert tokred.SpAtten().why_idle(4) is None
    model = build("vit")  # three blocks; EViT acts in blocks 1 and 2
    with pytest.warns(tokred.NothingRemovedWarning, match="evit removes nothing in the 1 chosen of 3 layers"):
        tokred.apply(model, "evit", where=lambda name, block: name.endswith("0"))


def test_as_an_error_it_leaves_the_model_as_it_was():
    model = tokred.apply(build("vit"), "tome", r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokred.NothingRemovedWarning)
        with pytest.raises(tokred.NothingRemovedWarning):
            tokred.apply(model, "tofu")
    assert tokred.patched(model)[0] == tokred.ToMe(r=2)
