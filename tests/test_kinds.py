"""Laws over many hosts: every host is asked under the marker ``hosts`` at least, and each law runs without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from tests import kinds
from tests.diffusion import tiny as denoisers
from tests.encoder import test_timm_contract, tiny_open_clip, tiny_timm, tiny_transformers, tiny_windows
from tests.vlm import hosts
from tokred.adapters.tiny import kv

# File -> its table of hosts, and those of every run.
LAWS: dict[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "encoder/test_timm.py": (tiny_timm.FAMILIES, kinds.TIMM),
    "encoder/test_timm_contract.py": (test_timm_contract.MODELS, kinds.TIMM_MODELS),
    "encoder/test_transformers.py": (tiny_transformers.FAMILIES, kinds.TRANSFORMERS),
    "encoder/test_open_clip.py": (tiny_open_clip.FAMILIES, kinds.OPEN_CLIP),
    "encoder/test_windows.py": (tiny_windows.FAMILIES, kinds.WINDOWED),
    "diffusion/test_hosts.py": (denoisers.MODELS, kinds.DENOISERS),
    "vlm/test_hosts.py": (hosts.HOSTS, kinds.VISION_LANGUAGE),
    "kv/test_laws.py": (kv.FAMILIES, kinds.CACHES),
}


@pytest.mark.parametrize("file", LAWS)
def test_no_host_is_lost(file, collected):
    table, common = LAWS[file]
    assert set(common) < set(table)
    asked: dict[bool, set[Any]] = {True: set(), False: set()}
    for item in collected:
        if item.path.as_posix().endswith(f"/tests/{file}") and hasattr(item, "callspec"):
            marked = item.get_closest_marker("hosts") is not None
            asked[marked].update(v for v in item.callspec.params.values() if isinstance(v, str))
    if not any(asked.values()):
        pytest.skip(f"this run has not collected {file}")
    assert set(table) <= asked[True] | asked[False]
    assert set(common) <= asked[False]


def test_no_law_is_under_the_marker_alone(collected):
    laws = defaultdict(set)
    for item in collected:
        # What is marked as a whole is no law over hosts: a browser, an empty environment, all drawings.
        if any(mark.name == "hosts" for mark in getattr(item.function, "pytestmark", ())):
            continue
        laws[item.nodeid.partition("[")[0]].add(item.get_closest_marker("hosts") is None)
    assert [law for law, everywhere in laws.items() if everywhere == {False}] == []


def test_each_keeps_all_cases_and_their_order():
    found = kinds.each(["a", ("b", 1), "c"], {"b": "a kind"})
    assert [p.values for p in found] == [("a",), ("b", 1), ("c",)]
    assert [[m.name for m in p.marks] for p in found] == [["hosts"], [], ["hosts"]]
    with pytest.raises(ValueError, match=r"none of \['a', 'c'\] is a host of every run: \['b'\]"):
        kinds.each(["a", "c"], {"b": "a kind"})
