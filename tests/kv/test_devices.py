"""Models whose layers lie on two devices: caches, policies and formats answer bit for bit as on one.

There is one device to run on; others are pretended, and whatever meets across two of them fails (``pretended``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tokred
from tests.kv import pretended
from tests.kv.test_composition import ROUNDED
from tests.kv.test_store_models import policies
from tests.kv.tiny import build, padded, prompt
from tokred.core.registry import methods

FIRST = torch.device(pretended.KIND, 0)
# What looks at all layers, every format, and what keeps rows elsewhere.
CASES: dict[str, Any] = {
    **{name: lambda name=name: policies("flat")[name] for name in policies("flat")},
    **{f"snapkv in {name}": lambda name=name: policies(ROUNDED[name])["snapkv"] for name in ROUNDED},
    "kvzip in kivi": lambda: policies(ROUNDED["kivi"])["kvzip"],
    "global_merge in turbo": lambda: policies(ROUNDED["turbo"])["global_merge"],
    "cake in tight": lambda: policies(ROUNDED["tight"])["cake"],
    "limit": lambda: tokred.Limited(tokred.make("knorm", store=ROUNDED["kivi"]), "60 KiB", 32),
    "rdkv": lambda: tokred.make("rdkv", budget=0.5),
    **{n: lambda n=n: tokred.make(n, **(methods.get(n).example or {})) for n in ("shadowkv", "tokenselect")},
    "offloaded": lambda: tokred.make("offloaded", block=3),
}
FEW = ("kvzip", "snapkv in kivi", "snapkv in turbo")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


def course(model: Any, place: torch.device) -> list[Tensor]:
    """Logits of a padded prompt, steps, a second turn and steps, and what the cache holds."""
    ids, mask, _ = padded((29, 17))
    cache, found = tokred.kv_cache(model), []
    for n in (0, 1, 1, 5, 1):
        tokens = prompt(n, len(ids), seed=n + 30) if n else ids
        mask = torch.cat([mask, torch.ones_like(tokens)], 1) if n else mask
        out = model(tokens.to(place), attention_mask=mask.to(place), past_key_values=cache).logits
        assert out.device == place
        found.append(pretended.own(out))
    return [*found, torch.tensor([row.rows for row in cache.layer_rows()])]


def test_what_meets_across_devices_fails() -> None:
    with pretended.Devices():
        a, b = (torch.ones(2).to(torch.device(pretended.KIND, i)) for i in range(2))
        assert (a + a).tolist() == [2, 2]
        assert (a + b.to(a.device)).device == a.device
        with pytest.raises(RuntimeError, match="on several devices"):
            a + b


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.hosts) for n in CASES])
def test_layers_on_two_devices(name: str) -> None:
    found = []
    for devices in ([0, 0, 0], [0, 1, 0]):
        model = build("llama")
        pretended.spread(model, list(model.model.layers), devices)
        with pretended.Devices():
            tokred.apply(model, CASES[name]())
            found.append(course(model, FIRST))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
