"""Quality of outputs: the ready metrics of :func:`tokred.benchmark`, metrics of the user's own, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from tokred.bench.intervals import Estimate, Groups, estimate, paired
from tokred.core.checks import check_choice

Better = Literal["higher", "lower"]
Metric = str | Callable[[Any, Any], Any]
LABELS = ("labels", "label")
GROUP = "group"
REFERENCES = ("answers", "text", *LABELS)
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

    def against(self, batch: Any) -> str:
        """What the outputs are compared with: ``"labels"``, a key of the batch, ``"the unpatched model"``, or empty."""
        if self.own is not None or self.log:
            return ""
        return "labels" if self.name in ("top1", "top5") else "the unpatched model"

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
    return found.map(lambda v: min(1.0, max(least, v)))


def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward in a batch: what metrics alone read (labels, answers, groups) is left out."""
    aside = (*LABELS, GROUP, "answers")
    # The key "text" holds references as strings; as a tensor it is an argument of dual encoders.
    return {k: v for k, v in batch.items() if k not in aside and (k != "text" or isinstance(v, Tensor))}


def grouped(batch: Any, count: int) -> list[str]:
    """The key ``"group"`` of each of ``count`` values of a batch; empty where the batch has none.

    Raises:
        ValueError: there are as many keys as values only if each sample has a value.
    """
    found = batch.get(GROUP) if isinstance(batch, Mapping) else None
    if found is None:
        return []
    keys = [str(key) for key in (found.tolist() if isinstance(found, Tensor) else found)]
    if count == 1 and len(set(keys)) == 1:
        return keys[:1]
    if len(keys) != count:
        raise ValueError(
            f"batch[{GROUP!r}] has {len(keys)} keys and the metric {count} values: give a key a sample, and a metric "
            "that returns a number a sample"
        )
    return keys


@dataclass
class Tally:
    """Values of an arm and of the unpatched model, sample by sample.

    Attributes:
        values, base: of the arm and of the unpatched model.
        weights: of the samples.
        groups: a key a sample; empty where each stands for itself.
    """

    values: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def take(self, score: Scorer, output: Any, batch: Any, dense: Any) -> None:
        """Add the samples of a batch.

        Args:
            score: the metric.
            output: of the arm.
            batch: as the data yield it.
            dense: the unpatched model's output.

        Raises:
            TypeError, ValueError: the metric returned no numbers, or not as many for both; or some batches have groups.
        """
        values, weights = score(output, batch, dense)
        base = score(dense, batch, dense)[0]
        if len(values) != len(base):
            raise ValueError(f"metric returned {len(values)} values, and {len(base)} for the unpatched model")
        groups = grouped(batch, len(values))
        if self.values and bool(groups) != bool(self.groups):
            raise ValueError(f"some batches have {GROUP!r} and others have none")
        self.values += values
        self.base += base
        self.weights += weights
        self.groups += groups

    @property
    def keys(self) -> Groups:
        """The groups, or None."""
        return self.groups or None

    @staticmethod
    def _share(metric: Scorer) -> bool:
        return metric.own is None and metric.name in ("top1", "top5", "agreement")

    def record(self, metric: Scorer) -> dict[str, float]:
        """Fields of a record of results: the quality, and the difference to the unpatched model."""
        quality = estimate(self.values, self.weights, self.keys)
        difference = paired(self.values, self.base, self.weights, self.keys)
        if metric.log:
            quality, difference = quality.map(math.exp), difference.map(math.expm1)
        if self._share(metric):
            quality, difference = _within(quality, 0.0), _within(difference, -1.0)
        found: dict[str, float] = {f"{metric.field}_count": len(self.values), "difference_count": len(self.values)}
        for name, one in ((metric.field, quality), ("difference", difference)):
            ends = {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            found |= {k: v for k, v in ends.items() if v is not None}
        return found
