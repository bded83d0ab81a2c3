"""Laws of every method with weights on the tiny models of timm, and a training of a module alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tests.encoder.tiny_timm import build


def applied(model: nn.Module, name: str, *reads: str, **settings: Any) -> bool:
    """Apply a method; False where the host refuses it, for the lack of one of ``reads``."""
    try:
        tokred.apply(model, name, **settings)
    except tokred.MissingInputError as error:
        assert any(word in str(error) for word in reads)  # noqa: PT017
        return False
    return True


def check_found_again(model: nn.Module, x: Tensor, folder: Path) -> None:
    """A ``vit`` answers alike with what was saved from another; ``model`` is left in evaluation mode."""
    other = tokred.apply(build("vit"), tokred.load(tokred.save(model, folder)))
    with torch.no_grad():
        assert torch.equal(other(x), model.eval()(x))


def descended(optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
    """The loss of each step before the step is made."""
    found = []
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        found.append(float(value.detach()))
    return found
