"""That checkpointing changes no gradient of a patched model, nor of what its method learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tokred


def check_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Compare all gradients of ``loss``, which runs the model, with checkpointing and without; it stays on."""
    every, found = [*model.parameters(), *tokred.parameters(model)], []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        loss().backward()
        found.append([p.grad.clone() for p in every])
        for p in every:
            p.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
