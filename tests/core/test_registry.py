"""Names, entry points, and a method that lives outside tokred."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass

import pytest
import torch

import tokred
from tests.plugins import plugins as plugins
from tokred.core.registry import Registry, methods


def test_every_registered_method_is_complete():
    for name in tokred.list_methods():
        method = tokred.make(name)
        assert method.name == name
        assert method.summary
        assert method.source
        assert method.__doc__
        assert method.reads


# Settings in forms that examples do not have: pairs, lists, methods in methods.
FORMS = [
    tokred.ToMe(r=(8, -1)),
    tokred.ToMe(r=[3, 2]),
    tokred.EViT(blocks=(1, 2)),
    tokred.ATS(n=[None, 20, 0.5], blocks=(1,)),
    tokred.PPT(r=[0, 3], threshold=float("inf"), blocks=(1,), relative=True, sort=True),
    tokred.SAINT(tau=[0.8, None]),
    tokred.SAINT(form="full", M=50),
    tokred.ZeroTPrune(blocks=(1, 2), rho=(0.5, 0.4), r_s=3, cls_boost=1.0),
    tokred.ToFu(r=(8, -1), switch=2, mode="mean", by_size=True, inherit=True),
    tokred.ToMeSD(ratio=0.3, seed=4),
    tokred.ToDo(factors=(1, 3)),
    tokred.CAT(tokred.VisionZip(contextual=4), policy="levels", calibration=(0.1, 0.4)),
]


# What a representation may name: the methods in `tokred`, and what `from tokred.kv import *` brings.
NAMES = {name: getattr(tokred.kv, name) for name in tokred.kv.__all__} | {
    name: getattr(tokred, name) for name in (target.partition(":")[2] for target in tokred.methods.TARGETS.values())
}


@pytest.mark.parametrize("name", tokred.list_methods())
def test_settings_are_written_down_and_read_back(name):
    cls = methods.get(name)
    forms = [form for form in FORMS if form.name == name]
    for method in (cls(), cls(**cls.example), cls(**(cls.nothing or {})), *forms):
        again = tokred.from_dict(json.loads(json.dumps(method.to_dict())))
        assert again == method
        assert hash(again) == hash(method)
        assert repr(again) == repr(method)
        assert repr(method).startswith(f"{cls.__name__}(")
        assert eval(repr(method), NAMES) == method


def test_a_representation_says_what_differs_from_the_defaults():
    assert repr(tokred.ToMe()) == "ToMe()"
    assert repr(tokred.ToMe(r=13)) == "ToMe(r=13)"
    assert repr(tokred.ToMe(r=(8, -1))) == "ToMe(r=(8, -1))"
    assert repr(tokred.ToMe(r=(8, 0.5))) == "ToMe(r=(8, 0.5))"
    assert repr(tokred.SnapKV(budget=0.25, window=32)) == "SnapKV(budget=0.25, window=32)"
    assert repr(tokred.kv.Adaptive(9)) == "Adaptive(amount=9, layers=Uniform(amount=9))"
    # A budget of 1 is one token, one of 1.0 everything.
    assert repr(tokred.StreamingLLM(budget=1.0, sinks=0)) != repr(tokred.StreamingLLM(budget=1, sinks=0))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ToMe", "tome"),
        ("PiToMe", "pitome"),
        ("ToMe SD", "tomesd"),
        ("SnapKV", "snapkv"),
        ("PruMerge+", "prumerge_plus"),
        ("Zero-TPrune", "zero_tprune"),
        ("Expected-Attention", "expected_attention"),
        ("KthMerge", "kth"),
        ("RandomMerge", "random"),
    ],
)
def test_names_are_read_as_papers_write_them(text, name):
    assert methods.get(text) is methods.get(name)
    assert tokred.make(text).name == name


def test_a_spelling_of_nothing_is_refused_with_the_nearest():
    with pytest.raises(tokred.UnknownMethodError, match="no method is named 'ToMee'; did you mean 'tome'"):
        tokred.make("ToMee")
    with pytest.raises(tokred.UnknownMethodError, match=r"no method is named '\+'"):
        tokred.make("+")


def test_a_spelling_of_two_names_means_neither():
    registry = Registry("tokred.nothing")
    registry.add("ab_c", "m:A")
    registry.add("a_bc", "m:B")
    assert registry.resolve("AB-C") == "AB-C"
    registry.add("abc", "m:C")
    assert registry.resolve("ABC") == "abc", "the name itself, but for its case"


@pytest.mark.parametrize("name", tokred.list_methods())
def test_an_example_removes_something_and_nothing_nothing(name):
    cls = methods.get(name)
    assert not any(one.why_idle(3) for one in cls(**cls.example).members)
    if cls.nothing is None:
        return
    (idle,) = cls(**cls.nothing).members
    assert all(idle.why_idle(depth) for depth in (1, 3, 24))
    if cls.stage == "block":
        places = [
            tokred.Place(layer, 3, prefix, suffix) for layer in range(3) for prefix in (0, 1) for suffix in (0, 2)
        ]
        assert not any(idle.acts(n, place) for place in places for n in (4, 17, 26, 197))
        assert all(idle.tokens(n, place) == n for place in places for n in (4, 17, 26, 197) if cls.stage == "block")


# Numbers that any object passes for; flags of other stages than blocks are likewise.
UNCHECKED = ("seed", "epsilon", "gamma", "every")


class Wrong:
    """What no parameter can be."""


@pytest.mark.parametrize("name", tokred.list_methods())
def test_wrong_types_are_refused(name):
    cls = methods.get(name)
    for field in (f for f in dataclasses.fields(cls) if f.init):
        if cls.stage == "block" or not (isinstance(field.default, bool) or field.name in UNCHECKED):
            with pytest.raises((TypeError, ValueError)) as found:
                tokred.make(name, **{**cls.example, field.name: Wrong()})
            if cls.stage == "block":
                assert field.name.partition("_")[0] in str(found.value), "the message names the argument"


def test_double_and_odd_names_are_refused():
    registry = Registry("tokred.nothing")
    registry.add("a", "m:A")
    registry.add("a", "m:A")
    with pytest.raises(ValueError, match="'a' is taken by m:A"):
        registry.add("a", "m:B")
    with pytest.raises(ValueError, match="lower-case"):
        registry.add("My Method", "m:C")


def test_a_method_in_one_class_runs():
    @tokred.register("every_second")
    @dataclass(frozen=True)
    class EverySecond(tokred.BlockMethod):
        """Keep every second token."""

        def tokens(self, n, place):
            return (n + 1) // 2

        def reduce(self, site):
            b, n = site.shape
            return tokred.Reduction.keep(torch.arange(0, n, 2).expand(b, -1), n)

    r = tokred.make("every_second").reduce(tokred.Site(x=torch.zeros(2, 5, 1)))
    assert r.representative.tolist() == [[0, 2, 4]] * 2
    del methods._targets["every_second"]


BROKEN = {
    "raises": "raise RuntimeError('no licence')",
    "syntax": "def (",
    "lacks": "import nothing_of_this_name",
    "not_a_method": "class Plugin:\n    pass",
    "no_such_class": "",
    "needs_more": (
        "import dataclasses, tokred\n\n@dataclasses.dataclass(frozen=True)\nclass Plugin(tokred.ToMe):\n"
        "    r: int = dataclasses.field(kw_only=True)"
    ),
}
GOOD = """
import warnings
from dataclasses import dataclass
import tokred


@dataclass(frozen=True)
class Plugin(tokred.ToMe):
    pass
"""


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_names_itself_and_breaks_nothing(kind, plugins):
    plugins.add("broken", f"broken_{kind}", BROKEN[kind])
    plugins.add("sound", f"sound_beside_{kind}", GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokred.make("tome", r=2) == tokred.ToMe(r=2), "a plug-in that nobody asks for is not imported"
    with pytest.warns(tokred.PluginWarning, match=f"plug-in 'broken' .broken_{kind}:Plugin. is left out: ") as found:
        names = tokred.list_methods()
    assert len(found) == 1
    assert set(names) == {*tokred.methods.TARGETS, "sound"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert "sound" in tokred.list_methods(stage="block")
        assert len(tokred.supports(torch.nn.Linear(1, 1))) == len(names)
        with pytest.raises(tokred.UnknownMethodError, match="no method is named 'broken': the plug-in 'broken'"):
            tokred.make("broken")
        made = tokred.make("sound", r=3)
    assert made.to_dict()["method"] == "sound"


def test_a_plugin_that_takes_a_name_is_refused_at_its_own_cost(plugins):
    plugins.add("tome", "thief", GOOD)
    plugins.add("sound", "sound_beside_thief", GOOD)
    with pytest.warns(tokred.PluginWarning, match=r"plug-in 'tome' .thief:Plugin. is left out: .* taken by tokred\."):
        assert type(tokred.make("tome", r=2)) is tokred.ToMe
    assert tokred.list_methods().count("tome") == 1
    assert type(tokred.make("sound")).__name__ == "Plugin"


def test_a_plugin_whose_module_takes_a_name_is_refused_at_its_own_cost(plugins):
    plugins.add("other", "thief_inside", f"import tokred\n{GOOD}\ntokred.register('tome')(Plugin)")
    with pytest.warns(tokred.PluginWarning, match=r"plug-in 'other' .* is left out: ValueError: the name 'tome'"):
        assert "other" not in tokred.list_methods()
    assert type(tokred.make("tome", r=2)) is tokred.ToMe
    assert tokred.ToMe.name == "tome"
