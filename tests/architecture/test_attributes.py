"""Names that tokred hides on things of other people: each has one owner, and there are no others."""

from __future__ import annotations

import ast

from tests.architecture.imports import sources

# Name -> what it stands on.
HIDDEN = {
    "_tokred_patch": "the module that the user gave",
    "_tokred": "a module whose class was exchanged",
    "_tokred_host_class": "the class that it was given instead",
    "_tokred_state": "a tensor of tokens on its way from block to block",
    "_tokred_start": "the tensor that enters the first block",
    "_tokred_track": "a cache of a model whose visual tokens leave",
    "_tokred_prompt": "the same cache, while it is prepared for generation",
}


def test_no_other_hidden_attributes() -> None:
    found: dict[str, set[str]] = {}
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_tokred"):
                found.setdefault(node.value, set()).add(module)
    assert set(found) == set(HIDDEN)
    # Whoever else needs a name takes it from its owner.
    assert {name: len(modules) for name, modules in found.items()} == dict.fromkeys(HIDDEN, 1)
