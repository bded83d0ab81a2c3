"""The contract with the hosts: names by role, found by annotation, and spelled in one file."""

from __future__ import annotations

import ast
import re
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

import tokred
from tests.adapters import spelled as syntax
from tokred.adapters import contract
from tokred.adapters.contract import members, words
from tokred.adapters.contract.spelling import Spelling, Word, arguments, spells
from tokred.adapters.contract.words import WORDS
from tokred.adapters.diffusion.sublayers import Kind
from tokred.cli.doctor import gone
from tokred.core import environment, versions
from tokred.core.registry import methods
from tokred.core.site import STAGES

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "adapters"
SOURCES = [p for p in ADAPTERS.rglob("*.py") if not {"contract", "tiny"} & {*p.relative_to(ADAPTERS).parts}]
# Tables of families: rows that say which parts one host's class has, in the words of that class.
TABLES = {
    "diffusion/clips.py", "diffusion/families.py", "diffusion/geometry.py", "diffusion/inputs.py",
    "encoder/packed/tables.py", "encoder/text_tables.py", "encoder/timm_tables.py", "encoder/transformers_maps.py",
    "encoder/transformers_tables.py", "moe/families.py", "vlm/families.py",
}  # fmt: skip
# What torch and Python document keeps its names: no host's, whatever has it.
_MADE = (nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.Embedding(1, 1), nn.ModuleList(), nn.Dropout(), torch.empty(0))
DOCUMENTED = {name for one in _MADE for name in dir(one) if not name.startswith("_")}
DOCUMENTED |= {name for kind in (str, dict, list, tuple, set, type, CodeType) for name in dir(kind)}
DOCUMENTED |= {"__code__", "__dict__", "__name__", "_replace", "value"}
KEYWORDS = {"always_call", "default", "device", "dim", "dtype", "keepdim", "key", "strict", "with_kwargs"}
# Words that are tokred's own as well, as strings: its stages, what its sites hand over, kinds of sub-layers, and what
# else it calls so. Where such a string reads something of an object or a dictionary, it counts as a host's nonetheless.
OWN_STRINGS = {
    *STAGES, *(one for name in methods for one in methods.get(name)().reads), *get_args(Kind), "attn", "config", "crop",
    "keys", "offloaded", "projection", "scale", "softcap", "values", "visual",
}  # fmt: skip


class Cache:
    """Of a host."""


def test_a_cache_is_found_by_its_annotation_whatever_it_is_called():
    def renamed(self, hidden_states, memory: Cache | None = None, **kwargs): ...
    def quoted(self, hidden_states, memory: Cache | None = None): ...
    def bare(self, hidden_states, past_key_values=None): ...
    def older(self, hidden_states, layer_past=None): ...
    def none(self, hidden_states, caches: int = 0): ...

    assert [contract.cache_argument(f) for f in (renamed, quoted, bare, older, none)] == [
        "memory", "memory", "past_key_values", "layer_past", None,
    ]  # fmt: skip
    with pytest.raises(TypeError, match=r"none takes no cache \(cache, past_key_values"):
        contract.cache_name(none)


def test_a_cache_has_one_spelling_at_a_time():
    given = {"past_key_values": None, "layer_past": 3, "x": 1}
    assert contract.cache_of(given) == 3
    assert contract.with_cache(given, "cache", 4) == {"x": 1, "cache": 4}
    assert contract.cache_of({"x": 1}) is None


@pytest.mark.parametrize(
    ("version", "name"), [("5.17", "past_key_values"), ("5.23.2", "past_key_values"), ("5.24", "cache")]
)
def test_a_cache_is_handed_over_by_the_name_that_the_installed_host_has(monkeypatch, version, name):
    monkeypatch.setattr(environment, "version", lambda package: version)
    assert tokred.cache_kwargs(3) == {name: 3}


def test_the_name_costs_a_token_nothing(monkeypatch):
    """What is installed is read once: loops ask for the name at every token."""
    tokred.cache_kwargs(3)
    monkeypatch.setattr(metadata, "version", lambda package: pytest.fail("the metadata of a package was read again"))
    assert list(tokred.cache_kwargs(4).values()) == [4]


def test_documentation_hands_caches_over_by_no_name_of_one_version():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        code = re.sub("#.*", "", "".join(re.findall(r"```python\n(.*?)```", page.read_text("utf8"), re.DOTALL)))
        assert not re.search(r"past_key_values\b *[=\"']|\.past_key_values|\bcache=cache\b", code), page


def test_hosts_that_are_installed_keep_every_name():
    rows = contract.kept()
    assert {row.library for row in rows} >= {"torch"}
    assert [row for row in rows if not row.found] == []


def test_each_spelling_stands_where_its_row_says_in_the_versions_of_which_it_says_so():
    for word in WORDS.values():
        for one in word.spellings:
            if find_spec(one.library) is not None:
                version = environment.version(environment.package(one.library))
                assert spells(one.where, one.name) or not contract.in_force(one, version), one


@pytest.mark.parametrize(("since", "until", "versions"), [
    ("", "", (True, True, True, True)),
    ("5.18", "", (False, True, True, True)),
    ("", "5.23", (True, True, True, False)),
    ("5.18.1", "5.23.0", (False, False, False, False)),
])  # fmt: skip
def test_a_spelling_is_in_force_from_its_first_to_its_last_version(since, until, versions):
    row = Spelling("a", "transformers", since, until)
    assert tuple(contract.in_force(row, v) for v in ("5.17.9", "5.18", "5.23.2", "5.24.0")) == versions


def test_a_name_that_a_host_drops_is_told():
    gone = contract.Name("a lost thing", (contract.Spelling("torch.nn:Lost", "torch"),))
    contract._BY_ROLE["a lost thing"] = gone
    try:
        with pytest.raises(tokred.UnsupportedModelError, match=r"torch has no torch\.nn:Lost \(a lost thing\).*doctor"):
            contract.host_object("a lost thing")
    finally:
        del contract._BY_ROLE["a lost thing"]
        contract.find_object.cache_clear()


def words_of(path: Path) -> set[str]:
    """Names that a file spells: attributes, and whole strings, docstrings aside."""
    tree = ast.parse(path.read_text("utf8"))
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_no_other_file_spells_a_private_name_of_a_host_or_a_cache():
    private = {s.name for name in contract.NAMES for s in name.spellings if ":" not in s.name}
    private |= set(contract.CACHE_NAMES) - {"cache"}
    private |= {s.name for s, _ in contract.KEPT_FORWARDS} | {"_hf_hook", "_is_stateful", "_current_graph_task_id"}
    assert len(private) > 8
    for path in SOURCES:
        assert not words_of(path) & private, path


NAMES = {name for word in WORDS.values() for name in word.names}
# Fields of the library's classes, which it may look for on what need not be its own.
OWN_FIELDS = {name for own in syntax.own_classes().values() for name in own.fields}


def of_hosts(path: Path) -> dict[str, syntax.Use]:
    """Names of hosts that a file spells, each with one place: those of the contract, and those that are nobody's."""
    found = {}
    for use in syntax.uses(path):
        known = {
            "attribute": use.name in DOCUMENTED,
            "argument": use.name in KEYWORDS,
            "read": use.name in DOCUMENTED | OWN_FIELDS,
            "key": True,  # of any dictionary
            "string": use.name in OWN_STRINGS or "tokred." in use.text,
            "definition": True,
        }[use.kind]
        mine = use.kind == "string" and known
        if use.kind != "definition" and not mine and (use.name in NAMES or (use.kind != "string" and not known)):
            found[use.name] = use
    return found


def test_no_other_file_spells_a_name_of_a_host():
    assert len(WORDS) > 200
    assert {str(path.relative_to(ADAPTERS)) for path in SOURCES} >= TABLES
    for path in SOURCES:
        if str(path.relative_to(ADAPTERS)) not in TABLES:
            assert of_hosts(path) == {}, path


def test_what_subclasses_of_a_hosts_class_define_is_in_the_contract():
    from tokred.adapters.kv.cache import TokCache
    from tokred.adapters.kv.layer import TokLayer

    taken = {name for word in (*members.TAKEN_OVER, words.KEYS, words.VALUES) for name in word.names}
    for file, cls in (("cache", TokCache), ("layer", TokLayer)):
        host = {name for base in cls.__mro__[1:] for name in dir(base)}
        defined = {use.name for use in syntax.uses(ADAPTERS / "kv" / f"{file}.py") if use.kind == "definition"}
        assert len(defined & host) > 1
        assert defined & host <= taken


def test_a_class_takes_over_each_spelling_of_a_host(monkeypatch):
    crop = Word("tokens taken back", (), ("shorten", "crop"))
    monkeypatch.setattr(members, "TAKEN_OVER", (crop, members.LENGTH))

    @members.under_each_name
    class Rows:
        def crop(self):
            return 3

    assert Rows().shorten() == Rows().crop() == 3
    assert not hasattr(Rows, members.LENGTH.name)


SEEN = """
from torch import nn
from tokred.adapters.encoder.host import BlockCost
from tokred.adapters.kv.cache import Snapshot
from tokred.adapters.kv.layer import TokLayer

def one(self: nn.Module, x, y: dict[str, Any], own: BlockCost, layer: TokLayer, held: Snapshot, given: dict[str, int]):
    own.attention, own.mlp, held.layers, layer.seen, layer.keys, given.keys(), given.values()
    {}
"""


@pytest.mark.parametrize(("line", "name"), [
    ("x.layer_idx", "layer_idx"),
    ("x(position_ids=1)", "position_ids"),
    ("y['attention_mask']", "attention_mask"),
    ("y.get('attention_mask')", "attention_mask"),
    ("'attention_mask' in y", "attention_mask"),
    ("getattr(x, 'o_proj')", "o_proj"),
    ("getattr(x, f'{x}.o_proj')", "o_proj"),
    ("names = ('q_proj', 'o_proj')", "o_proj"),
    ("self.layers", "layers"),
    ("x.attention", "attention"),
    ("x.attn.weight", "attn"),
    ("hasattr(x, 'mlp')", "mlp"),
    ("x.self_attn.mlp.blocks", "blocks"),
    ("x.config.scaling", "scaling"),
    ("y['labels']", "labels"),
    ("x.keys", "keys"),
    ("x.values", "values"),
    ("x.processor", "processor"),
    ("getattr(x, 'merged', False)", "merged"),
    ("x.rope", "rope"),
    ("y.get('softcap')", "softcap"),
    ("x(config=1)", "config"),
    ("x.model.config", "config"),
    ("x.to_q(1)", "to_q"),
    ("x.something_of_a_host", "something_of_a_host"),
    ("hasattr(x, 'something_of_a_host')", "something_of_a_host"),
    ("x(something_of_a_host=1)", "something_of_a_host"),
    ("layer.is_sliding_window", "is_sliding_window"),
    ("layer.is_initialized", None),
    ("own.attention + own.mlp", None),
    ("held.layers[0]", None),
    ("'attention'", None),
    ("{'keys': 1, 'mlp': 2}", None),
    ("x.weight.shape", None),
    ("x.register_forward_hook(1, with_kwargs=True)", None),
    ("[one.attention for one in (own, own)]", None),
])  # fmt: skip
def test_the_look_at_sources_tells_a_hosts_from_tokreds_own(tmp_path, line, name):
    (tmp_path / "some.py").write_text(SEEN.format(line))
    found = set(of_hosts(tmp_path / "some.py"))
    assert name in found if name else not found


def test_the_look_at_an_attribute_that_is_set_from_itself_ends(monkeypatch):
    tree = ast.parse("class Walk:\n    def __init__(self):\n        self.at = self.at.after\n")
    own = syntax.Own([], syntax._set_on_self(tree.body[0].body[0]))
    monkeypatch.setattr(syntax, "own_classes", lambda: {"Walk": own})
    assert syntax.Look(tree).of(ast.parse("Walk().at", mode="eval").body) is None


def test_a_word_is_found_under_each_of_its_spellings():
    mask = Word("a mask", (), ("mask", "attention_mask"))
    assert mask.of({"attention_mask": 1}) == mask.of({"mask": None, "attention_mask": 1}) == mask.at({"mask": 1}) == 1
    assert mask.of({}) is None
    assert mask.of({}, 2) == 2
    assert mask.key({"attention_mask": 1}) == mask.key({}, ("x", "attention_mask")) == "attention_mask"
    assert mask.key({}) == mask.name == "mask"
    given = {"attention_mask": 1}
    mask.put(given, 3)
    assert given == {"attention_mask": 3}
    assert mask.pop(given) == 3
    assert given == {}
    with pytest.raises(KeyError, match=r"mask or attention_mask \(a mask\)"):
        mask.at({})
    owner = SimpleNamespace(mask=None)
    assert mask.on(owner)
    assert mask.part(owner, 1) is mask.need(owner) is None
    with pytest.raises(AttributeError, match=r"object has no mask or attention_mask \(a mask\)"):
        mask.need(object())


def test_arguments_have_the_names_that_a_signature_has():
    def function(x, attention_mask=None, *, position_ids=None): ...

    mask = Word("a mask", (), ("mask", "attention_mask"))
    assert arguments(function, {mask: 1, words.POSITIONS: 2}) == {"attention_mask": 1, "position_ids": 2}


def test_a_public_name_that_no_host_spells_any_more_is_told_with_the_version(monkeypatch):
    row, version = Spelling("lost_argument", "torch", where="torch.nn:Linear"), environment.version("torch")
    monkeypatch.setitem(WORDS, "a lost argument", Word("a lost argument", (row,), ("lost_argument",)))
    assert [kept for kept in contract.kept() if not kept.found] == [
        contract.Kept("torch", "a lost argument", "lost_argument", False, version)
    ]
    assert gone() == [f"torch {version}: a lost argument (lost_argument)"]
    later = Spelling("lost_argument", "torch", since="99.0", where="torch.nn:Linear")
    monkeypatch.setitem(WORDS, "a lost argument", Word("a lost argument", (later,), ("lost_argument",)))
    assert gone() == []


@pytest.mark.parametrize(("path", "name", "found"), [
    ("torch.nn:Linear", "in_features", True),
    ("torch.nn:Linear.forward", "input", True),
    ("torch.nn:Linear", "attention_mask", False),
    ("torch.nn.functional", "relu", True),
    ("torch.nn:NoSuchClass", "in_features", False),
    ("torch.no_such_module:Linear", "in_features", False),
])  # fmt: skip
def test_a_name_is_looked_for_in_the_code_of_a_host(path, name, found):
    assert spells(path, name) == found


def test_imported_names_of_the_contract_are_imported_there_alone():
    objects = {s.name for name in contract.NAMES for s in name.spellings if ":" in s.name}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.ImportFrom):
                taken = {f"{node.module}:{alias.name}" for alias in node.names}
                assert not taken & (objects - {"timm.models:register_notrace_module"}), path


def test_no_role_takes_the_name_of_another():
    for path in (ADAPTERS / "contract").glob("*.py"):
        targets = [
            t for node in ast.parse(path.read_text("utf8")).body if isinstance(node, ast.Assign) for t in node.targets
        ]
        names = [one.id for one in targets if isinstance(one, ast.Name)]
        assert sorted(names) == sorted(set(names)), path


def test_an_untested_host_warns_once_and_names_both_versions(monkeypatch):
    torch_nn = pytest.importorskip("timm") and __import__("torch").nn
    from tests.encoder import tiny_timm

    model = tiny_timm.build("vit")
    monkeypatch.setattr(versions, "tested", lambda: {"timm": versions.Bounds("0.1", "0.2")})
    versions.check_tested.cache_clear()
    try:
        with pytest.warns(tokred.UntestedVersionWarning, match=r"timm .* is newer than 0\.2.*tokred doctor"):
            tokred.apply(model, "tome", r=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokred.apply(torch_nn.Sequential(model), "tome", r=2)
    finally:
        versions.check_tested.cache_clear()
