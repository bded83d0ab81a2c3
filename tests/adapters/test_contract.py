"""The contract with the hosts: names by role, found by annotation, and spelled in one file."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

import tokred
from tokred.adapters import contract
from tokred.core import versions

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
SOURCES = [p for p in ADAPTERS.rglob("*.py") if p.name != "contract.py" and "tiny" not in p.parts]


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
