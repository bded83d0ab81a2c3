"""What every host must keep: a patch leaves nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a patch could leave behind."""
    return {
        "repr": repr(model),
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots of one model are equal."""
    for key in ("repr", "classes", "attributes", "hooks"):
        assert before[key] == after[key], key
    assert list(before["state"]) == list(after["state"])
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key]), key


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    """Two lists of tensors are equal bit for bit."""
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
