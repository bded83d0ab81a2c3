"""A linear probe: logistic regression on frozen features, with torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """``logits = features @ weight.T + bias``, ``weight`` ``(classes, F)``."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``(N, F)`` to ``(N, classes)``."""
        return features @ self.weight.T + self.bias


def fit(features: Tensor, labels: Tensor, *, penalty: float = 0.3, steps: int = 200) -> Probe:
    """Fit on standardised features by L-BFGS; the same data gives the same probe.

    Args:
        features: ``(N, F)`` of the unpatched model.
        labels: ``(N,)``.
        penalty: weight of the squared weights, divided by ``N``, beside the mean cross entropy.
        steps: at most.

    Raises:
        ValueError: there are fewer than two classes.
    """
    classes = int(labels.max()) + 1
    if len(set(labels.tolist())) < 2:
        raise ValueError("a probe needs images of at least two classes")
    x = features.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum() / len(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    w = weight.detach() / std
    return Probe(w.float(), (bias.detach() - w @ mean).float())
