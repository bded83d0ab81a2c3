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


PENALTIES = (1.0, 10.0, 100.0)


def fit(features: Tensor, labels: Tensor, *, penalty: float | None = None, steps: int = 200) -> Probe:
    """Fit on standardised features by L-BFGS; the same data gives the same probe.

    Args:
        features: ``(N, F)`` of the unpatched model.
        labels: ``(N,)``.
        penalty: weight of the squared weights, divided by ``N``, beside the mean cross entropy. None: the best of
            :data:`PENALTIES` on a fifth of the images, held out; then fitted on all.
        steps: at most.

    Raises:
        ValueError: there are fewer than two classes.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError("a probe needs images of at least two classes")
    classes = int(labels.max()) + 1
    if penalty is None:
        penalty = _best(features, labels, classes, steps)
    return _fit(features, labels, classes, penalty, steps)


def _best(features: Tensor, labels: Tensor, classes: int, steps: int) -> float:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    if not len(held):
        return PENALTIES[-1]

    def right(penalty: float) -> int:
        found = _fit(features[rest], labels[rest], classes, penalty, steps)
        return int((found.logits(features[held]).argmax(1) == labels[held]).sum())

    # The strongest of equals.
    return max(reversed(PENALTIES), key=right)


def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float, steps: int) -> Probe:
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
