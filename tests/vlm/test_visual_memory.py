"""No method before the language model makes a matrix of all pairs of more than 2,048 tokens."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokred
from tests.vlm.visual import visual

GRID = (45, 47)
SOME: dict[str, dict[str, Any]] = {
    "cat": {"selector": "divprune", "n_max": 20},
    "vispruner": {"budget": 64, "step": 256},
    "vscan": {"shallow": 0, "budget": 64},
    "saint_visual": {"layer": 1, "q": 4, "budget": 64},
}
KINDS = {name: tokred.make(name) for name in tokred.list_methods()}
# Those of clips look at frames, not at all tokens together: see test_clip_methods; these sites have no pixels.
NAMES = [
    name
    for name, m in KINDS.items()
    if m.stage == "projector" and not getattr(m, "clips", False) and "pixels" not in m.reads
]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, storage counted."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.most = max(self.most, min(size, leaf.numel()))
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_all_pairs(name):
    site = visual(1, GRID, c=6, tower=4)
    n = site.shape[1]
    settings = SOME.get(name, {"budget": 64} if hasattr(tokred.make(name), "budget") else {})
    method = tokred.make(name, **settings)
    with Largest() as seen:
        found = method.reduce(site)
    assert not found.trivial
    assert seen.most < n * n // 2, f"{seen.most} elements for {n} tokens"


def test_the_check_can_fail():
    with Largest() as seen:
        tokred.DivPrune(budget=4).reduce(visual(1, (20, 20)))
    assert seen.most >= 400 * 400
