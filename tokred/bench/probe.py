"""A linear probe: scikit-learn's logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRENGTHS = (0.5, 0.05, 0.005)  # scikit-learn's C: the inverse of the penalty on the weights


@dataclass(frozen=True)
class Probe:
    """``logits = features @ weight.T + bias``, ``weight`` ``(classes, F)``."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``(N, F)`` to ``(N, classes)``."""
        return features @ self.weight.T + self.bias


class Seen(NamedTuple):
    """A batch's fingerprint, with features ``(B, F)`` and labels ``(B,)`` of it."""

    key: str
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Crossed:
    """Two probes, each of which answers for the samples that it was not fitted on.

    Attributes:
        probes: fitted on the samples of even and of odd numbers.
        starts: by a batch's fingerprint, the number of its first sample.
    """

    probes: tuple[Probe, Probe]
    starts: Mapping[str, int]

    def right(self, seen: Seen) -> Tensor:
        """Which samples of a batch are answered rightly ``(B,)``, by features of any model."""
        found = torch.stack([p.logits(seen.features).argmax(1) == seen.labels for p in self.probes])
        number = self.starts[seen.key] + torch.arange(len(seen.labels))
        return found[1 - number % 2, torch.arange(len(seen.labels))]


def crossed(seen: Sequence[Seen]) -> Crossed:
    """Fit on what the unpatched model made of all batches; their order does not matter.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two classes in a half.
    """
    order = sorted({one.key: one for one in seen}.values(), key=lambda one: one.key)
    starts, count = {}, 0
    for one in order:
        starts[one.key] = count
        count += len(one.labels)
    features, labels = torch.cat([one.features for one in order]), torch.cat([one.labels for one in order])
    even, odd = (fit(features[half::2], labels[half::2]) for half in (0, 1))
    return Crossed((even, odd), starts)


def linear_models() -> Any:
    """The module ``sklearn.linear_model``, imported when a probe is first needed.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install 'tokred[bench]'") from error
    return linear_model


def fit(features: Tensor, labels: Tensor, *, strength: float | None = None) -> Probe:
    """Fit on standardised features; the same data gives the same probe.

    Args:
        features: ``(N, F)`` of the unpatched model.
        labels: ``(N,)``.
        strength: scikit-learn's ``C``. None: the best of :data:`STRENGTHS` on a fifth of the images, held out; then
            fitted on all.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two classes.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError("a probe needs images of at least two classes")
    return _fit(features, labels, _best(features, labels) if strength is None else strength)


def _best(features: Tensor, labels: Tensor) -> float:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    if not len(held) or len(set(labels[rest].tolist())) < 2:
        return STRENGTHS[-1]

    def right(strength: float) -> int:
        found = _fit(features[rest], labels[rest], strength)
        return int((found.logits(features[held]).argmax(1) == labels[held]).sum())

    # The most penalised of equals.
    return max(reversed(STRENGTHS), key=right)


def _fit(features: Tensor, labels: Tensor, strength: float) -> Probe:
    x = features.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    model = linear_models().LogisticRegression(C=strength, max_iter=1000)
    found = model.fit(((x - mean) / std).numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(v).double() for v in (found.coef_, found.intercept_))
    if len(bias) == 1:
        # Two classes have one row of weights in scikit-learn.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    seen = torch.from_numpy(found.classes_)
    # One row for every label up to the highest; a class that was not seen is never answered.
    rows = torch.zeros(int(seen.max()) + 1, x.shape[1], dtype=torch.float64)
    offsets = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
    rows[seen], offsets[seen] = weight / std, bias - (weight / std) @ mean
    return Probe(rows.float(), offsets.float())
