"""Names, entry points, and a method that lives outside tokred."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

import tokred
from tokred.core.registry import Registry


def test_every_registered_method_is_complete():
    for name in tokred.list_methods():
        method = tokred.make(name)
        assert method.name == name
        assert method.summary
        assert method.source
        assert method.__doc__
        assert method.reads


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
    from tokred.core.registry import methods

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
from importlib.metadata import EntryPoint
import tokred


@dataclass(frozen=True)
class Plugin(tokred.ToMe):
    pass
"""


class Entries:
    """Entry points as installed packages declare them."""

    def __init__(self, folder, monkeypatch):
        self.found, self.folder = [], folder
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: self.found)

    def add(self, name, module, source):
        (self.folder / f"{module}.py").write_text(source)
        self.found.append(EntryPoint(name, f"{module}:Plugin", "tokred.methods"))


@pytest.fixture
def registry(monkeypatch):
    """The methods of tokred in a registry that has not looked for plug-ins yet, in place of the usual one."""
    fresh = Registry("tokred.methods")
    for name, target in tokred.methods.TARGETS.items():
        fresh.add(name, target)
    for module in ("tokred.api", "tokred.hosts"):
        monkeypatch.setattr(f"{module}.registered", fresh)
    return fresh


@pytest.fixture
def entries(tmp_path, monkeypatch):
    return Entries(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_names_itself_and_breaks_nothing(kind, registry, entries):
    entries.add("broken", f"broken_{kind}", BROKEN[kind])
    entries.add("sound", f"sound_beside_{kind}", GOOD)
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


def test_a_plugin_that_takes_a_name_is_refused_at_its_own_cost(registry, entries):
    entries.add("tome", "thief", GOOD)
    entries.add("sound", "sound_beside_thief", GOOD)
    with pytest.warns(tokred.PluginWarning, match=r"plug-in 'tome' .thief:Plugin. is left out: .* taken by tokred\."):
        assert type(tokred.make("tome", r=2)) is tokred.ToMe
    assert tokred.list_methods().count("tome") == 1
    assert type(tokred.make("sound")).__name__ == "Plugin"


def test_a_plugin_whose_module_takes_a_name_is_refused_at_its_own_cost(registry, entries):
    entries.add("other", "thief_inside", f"import tokred\n{GOOD}\ntokred.register('tome')(Plugin)")
    with pytest.warns(tokred.PluginWarning, match=r"plug-in 'other' .* is left out: ValueError: the name 'tome'"):
        assert "other" not in tokred.list_methods()
    assert type(tokred.make("tome", r=2)) is tokred.ToMe
    assert tokred.ToMe.name == "tome"
