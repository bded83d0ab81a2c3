"""The contract with the hosts: names by role, found by annotation, and spelled in one file."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import tokred
from tokred.adapters import contract
from tokred.adapters.contract import words
from tokred.adapters.contract.spelling import Spelling, Word, arguments, spells
from tokred.adapters.contract.words import WORDS
from tokred.cli.doctor import gone
from tokred.core import environment, versions

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
SOURCES = [p for p in ADAPTERS.rglob("*.py") if not {"contract", "tiny"} & {*p.relative_to(ADAPTERS).parts}]
# Tables of families: rows that say which parts one host's class has, in the words of that class.
TABLES = {
    "diffusion/clips.py", "diffusion/geometry.py", "diffusion/survey.py", "encoder/transformers_maps.py",
    "encoder/transformers_tables.py", "vlm/families.py",
}  # fmt: skip
# Words that are tokred's own as well: kinds of sites and what they supply (strings), and fields of its classes.
OWN_STRINGS = {"attention", "keys", "layers", "merged", "mlp", "rope", "softcap", "values"}
OWN_FIELDS = {
    "attention", "attn", "blocks", "keys", "labels", "layers", "merged", "mlp", "processor", "rope", "scaling",
    "softcap", "values",
}  # fmt: skip
# What is spelled elsewhere for a reason, by file.
EXCEPTIONS = {
    # Torch's own functions for attention, which is documented and keeps its names.
    "diffusion/inside.py": {"attn_mask"},
    "diffusion/weights.py": {"attn_mask"},
    "encoder/capture.py": {"attn_mask", "is_causal", "num_heads"},
    # A subclass of the host's cache, which has the host's fields.
    "kv/cache.py": {"offloading"},
    # Layouts of blocks, and the lists that hold them.
    "diffusion/host.py": {"attn", "blocks"},
    # All that the code of known forwards names, to be compared with what is installed, and parts of these classes.
    "encoder/divided.py": {"image_size", "num_heads", "patch_size", "qkv"},
    "encoder/timm.py": {
        "attn", "fused_attn", "k_norm", "num_heads", "q_norm", "qkv", "rel_pos_h", "rel_pos_w", "window_size",
    },
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


def test_hosts_that_are_installed_keep_every_name():
    rows = contract.kept()
    assert {row.library for row in rows} >= {"torch"}
    assert [row for row in rows if not row.found] == []


def test_a_name_that_a_host_drops_is_told():
    gone = contract.Name("a lost thing", (contract.Spelling("torch.nn:Lost", "torch"),))
    contract._BY_ROLE["a lost thing"] = gone
    try:
        with pytest.raises(tokred.UnsupportedModelError, match=r"torch has no torch\.nn:Lost \(a lost thing\).*doctor"):
            contract.host_object("a lost thing")
    finally:
        del contract._BY_ROLE["a lost thing"]
        contract.find_object.cache_clear()


def spelled(path: Path) -> set[str]:
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
        assert not spelled(path) & private, path


def public(path: Path) -> set[str]:
    """Public names of hosts that a file spells: strings, attributes of other objects than itself, keywords of calls."""
    names = {name for word in WORDS.values() for name in word.names}
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} - OWN_STRINGS
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found |= {node.attr} - OWN_FIELDS
        elif isinstance(node, ast.Call) and not ast.unparse(node.func).endswith("scaled_dot_product_attention"):
            found |= {keyword.arg for keyword in node.keywords if keyword.arg} - OWN_FIELDS
    return found & names


def test_no_other_file_spells_a_public_name_of_a_host():
    assert len(WORDS) > 80
    spelling = {str(path.relative_to(ADAPTERS)): public(path) for path in SOURCES}
    assert set(spelling) >= TABLES | set(EXCEPTIONS)
    found = {file: names for file, names in spelling.items() if file not in TABLES and names}
    assert found == EXCEPTIONS  # an exception that is not needed any more goes as well


def test_the_look_at_sources_sees_each_way_of_spelling(tmp_path):
    lines = "x.layer_idx; f(position_ids=1); y['attention_mask']; getattr(z, 'o_proj')\n"
    lines += "self.head_dim; F.scaled_dot_product_attention(attn_mask=1)\n"
    (tmp_path / "some.py").write_text(lines)
    assert public(tmp_path / "some.py") == {"layer_idx", "position_ids", "attention_mask", "o_proj"}


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
