"""Quality of outputs: the ready metrics of :func:`tokred.benchmark`, metrics of the user's own, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tokred.bench.results import NORMAL, wilson
from tokred.core.checks import check_choice

Better = Literal["higher", "lower"]
Metric = str | Callable[[Any, Any], Any]
LABELS = ("labels", "label")
# Fields of a host's output, the most telling first.
FIELDS = ("logits", "pooler_output", "image_embeds", "image_features", "text_embeds", "last_hidden_state")


def answer(output: Any) -> Tensor:
    """The tensor of an output that ready metrics compare: logits, else pooled features, else all tokens' features.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in FIELDS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output:
        return answer(output[0])
    raise TypeError(
        f"the model returns {type(output).__name__}, in which there is none of {', '.join(FIELDS)}: "
        "give metric=a function of (output, batch)"
    )


def labels(batch: Any) -> Tensor:
    """Labels ``(B,)`` of a batch.

    Raises:
        ValueError: it has none.
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise ValueError(
            "the batches of data have no labels, which this metric needs: give (inputs, labels) or a dict with "
            f"{LABELS[0]!r}, or metric='agreement', which needs none"
        )
    return found


def _same_shape(output: Any, dense: Any) -> tuple[Tensor, Tensor]:
    a, b = answer(output), answer(dense)
    if a.shape != b.shape:
        raise ValueError(
            f"the output is {tuple(a.shape)} and the unpatched model's {tuple(b.shape)}, which no value-by-value "
            "metric compares: give metric=a function of (output, batch)"
        )
    return a, b


def _classes(x: Tensor) -> int:
    """The dimension of the classes: the second of maps ``(B, C, H, W)``, else the last."""
    return 1 if x.ndim == 4 else -1


def _each(x: Tensor) -> Tensor:
    """``(B,)`` mean over all but the first dimension."""
    return x.double().flatten(1).mean(1) if x.ndim > 1 else x.double()


def _top(k: int) -> Callable[[Any, Any, Any], Tensor]:
    def hits(output: Any, batch: Any, dense: Any) -> Tensor:
        logits, right = answer(output), labels(batch)
        best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
        return (best == right.to(best.device).unsqueeze(-1)).any(-1).double()

    return hits


def _agreement(output: Any, batch: Any, dense: Any) -> Tensor:
    a, b = _same_shape(output, dense)
    return _each(a.argmax(_classes(a)) == b.argmax(_classes(b)))


def _cosine(output: Any, batch: Any, dense: Any) -> Tensor:
    a, b = _same_shape(output, dense)
    return _each(F.cosine_similarity(a.double(), b.double(), dim=_classes(a)))


def _loss(output: Any, batch: Any, dense: Any) -> Tensor:
    """``(B,)`` mean negative log-likelihood of the last tokens of the batch, which the logits are about."""
    logits = answer(output).float()
    target = batch["input_ids"][:, -logits.shape[1] :].to(logits.device)
    return _each(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target))


READY: dict[str, Callable[[Any, Any, Any], Tensor]] = {
    "top1": _top(1),
    "top5": _top(5),
    "agreement": _agreement,
    "cosine": _cosine,
    "perplexity": _loss,
}


class Estimate(NamedTuple):
    """A mean and its 95 % interval; the ends are None where a single value tells of none."""

    value: float
    low: float | None
    high: float | None


# Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(freedom: int) -> float:
    """Half of a 95 % interval in standard errors, when these come from few values themselves."""
    # Beyond the table the first term of the expansion is exact to three digits.
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else NORMAL + (NORMAL**3 + NORMAL) / (4 * freedom)


def estimate(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Weighted mean with its interval: Wilson's for rights and wrongs, else by the standard error."""
    total = sum(weights)
    mean = sum(w * v for v, w in zip(values, weights, strict=True)) / total
    n = len(values)
    if _counted(values, weights):
        return Estimate(mean, *wilson(mean, n))
    if n < 2:
        return Estimate(mean, None, None)
    squares = sum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    half = student(n - 1) * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(mean, mean - half, mean + half)


def paired(values: Sequence[float], base: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The mean difference to the base on the same samples, with its interval.

    Of rights and wrongs it is Agresti and Min's, which adds half a sample to each kind of disagreement: a few samples
    without any are no proof that there is none.
    """
    differences = [v - b for v, b in zip(values, base, strict=True)]
    if not (_counted(values, weights) and _counted(base, weights)):
        return estimate([*differences], weights) if len(differences) > 1 else Estimate(differences[0], None, None)
    n, won, lost = len(differences), differences.count(1.0), differences.count(-1.0)
    middle = (won - lost) / (n + 2)
    half = NORMAL * math.sqrt((won + lost + 1) - (won - lost) ** 2 / (n + 2)) / (n + 2)
    return Estimate((won - lost) / n, max(-1.0, middle - half), min(1.0, middle + half))


def _counted(values: Sequence[float], weights: Sequence[float]) -> bool:
    return all(v in (0.0, 1.0) for v in values) and all(w == 1 for w in weights)


@dataclass(frozen=True)
class Scorer:
    """A metric with its name.

    Attributes:
        name: of a ready metric, or of the user's function.
        better: which direction is good.
        own: the user's function; None: a ready metric.
    """

    name: str
    better: Better
    own: Callable[[Any, Any], Any] | None = None

    @property
    def log(self) -> bool:
        """True if values are logs of what is shown, and differences are relative to the unpatched model's."""
        return self.own is None and self.name == "perplexity"

    @property
    def field(self) -> str:
        """Name of the value in the table of results."""
        return "quality" if self.own is not None else self.name

    def __call__(self, output: Any, batch: Any, dense: Any) -> tuple[list[float], list[float]]:
        """Values of the samples of a batch, and their weights.

        Raises:
            TypeError, ValueError: the metric returned no number.
        """
        if self.own is None:
            found = READY[self.name](output, batch, dense)
            weight = float(answer(output).shape[1]) if self.log else 1.0
            return self._checked(found.tolist()), [weight] * len(found)
        found = self.own(output, batch)
        if isinstance(found, Tensor) and found.ndim <= 1 and found.numel() and not found.is_complex():
            values = found.detach().double().reshape(-1).tolist()
            single = found.ndim == 0
        elif isinstance(found, Real) or (getattr(found, "shape", None) == () and hasattr(found, "item")):
            values, single = [float(found)], True
        else:
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise TypeError(
                f"metric must return a number, or a tensor of one number a sample: {self.name!r} returned "
                f"{type(found).__name__}{shape}"
            )
        # One number stands for its whole batch, which the last batch of a loader may have fewer samples of.
        return self._checked(values), [float(samples(batch))] if single else [1.0] * len(values)

    def _checked(self, values: list[float]) -> list[float]:
        bad = next((v for v in values if not math.isfinite(v)), None)
        if bad is not None:
            raise ValueError(f"metric {self.name!r} returned {bad}, which is no number to average")
        return values


def samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor; 1 where there is none."""
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return next((len(x) for x in items if isinstance(x, Tensor) and x.ndim), 1)


def scorer(metric: Metric, run: str | None, better: Better) -> Scorer:
    """The metric that the user names or gives.

    Args:
        metric: a name, or a function.
        run: the kind of run that it scores; None: not known yet.
        better: direction of a function's values.

    Raises:
        TypeError, ValueError: it is neither, or does not fit the run.
    """
    check_choice(better, "better", ("higher", "lower"))
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__).strip("<>")
        return Scorer(name, better, metric)
    if not isinstance(metric, str):
        raise TypeError(f"metric must be a name or a function of (output, batch), got {type(metric).__name__}")
    if metric not in READY:
        raise ValueError(f"metric is {metric!r}; allowed are {', '.join(map(repr, READY))}, or a function")
    fits = {"forward": set(READY) - {"perplexity"}, "text": {"agreement", "cosine", "perplexity"}}.get(str(run), READY)
    if metric not in fits:
        raise ValueError(
            f"metric={metric!r} does not fit the run {run!r}, whose ready metrics are "
            f"{', '.join(repr(name) for name in READY if name in fits)}"
        )
    return Scorer(metric, "lower" if metric == "perplexity" else "higher")


def _within(found: Estimate, least: float) -> Estimate:
    """An estimate whose interval ends where shares do, or differences of shares."""
    return Estimate(*(None if v is None else min(1.0, max(least, v)) for v in found))  # type: ignore[arg-type]


@dataclass
class Tally:
    """Values of an arm and of the unpatched model, sample by sample."""

    values: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @staticmethod
    def _share(metric: Scorer) -> bool:
        return metric.own is None and metric.name in ("top1", "top5", "agreement")

    def record(self, metric: Scorer) -> dict[str, float]:
        """Fields of a record of results: the quality, and the difference to the unpatched model."""
        quality, difference = estimate(self.values, self.weights), paired(self.values, self.base, self.weights)
        if metric.log:
            quality = Estimate(*(None if v is None else math.exp(v) for v in quality))  # type: ignore[arg-type]
            difference = Estimate(*(None if v is None else math.expm1(v) for v in difference))  # type: ignore[arg-type]
        if self._share(metric):
            quality, difference = _within(quality, 0.0), _within(difference, -1.0)
        found: dict[str, float] = {f"{metric.field}_count": len(self.values), "difference_count": len(self.values)}
        for name, one in ((metric.field, quality), ("difference", difference)):
            ends = {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            found |= {k: v for k, v in ends.items() if v is not None}
        return found
