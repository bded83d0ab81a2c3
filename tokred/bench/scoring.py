"""Quality of outputs: the ready metrics of :func:`tokred.benchmark`, metrics of the user's own, and their tallies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from torch import Tensor

from tokred.bench.intervals import Estimate, Groups, estimate, paired
from tokred.bench.objects import Object, is_object
from tokred.bench.read import DENSE, GROUP, arguments, groups, samples
from tokred.bench.ready import READY, Better, Ready, Scores
from tokred.core.checks import check_choice

__all__ = [
    "FITS", "READY", "Better", "Estimate", "Metric", "Scorer", "Tally", "arguments", "estimate", "paired", "samples",
    "scorer", "scorers",
]  # fmt: skip

Metric = str | Callable[..., Any]
Metrics = Metric | Sequence[Metric] | Mapping[str, Metric]
# Metrics that say something of each kind of run; of others, an output that a metric cannot read is refused.
FITS = {
    "features": ("cosine", "probe"),
    "forward": ("top1", "top5", "agreement", "cosine", "probe", "miou", "psnr", "ssim", "lpips"),
    "text": ("agreement", "cosine", "perplexity"),
    "generate": ("agreement", "exact", "contains", "contains_all", "overlap", "wer"),
    "pipeline": ("psnr", "ssim", "lpips", "cosine"),
}


@dataclass(frozen=True)
class Scorer:
    """A metric with its name.

    Attributes:
        name: of a ready metric, or of the user's function.
        better: which direction is good.
        own: the user's function, or a metric object; None: a ready metric.
        fitted: of a ready metric that is fitted, its scores; None: not yet, or it is none of these.
    """

    name: str
    better: Better
    own: Callable[..., Any] | Object | None = None
    fitted: Callable[[Any, Any, Any], Scores] | None = None

    @property
    def ready(self) -> Ready | None:
        """The ready metric, or None."""
        return READY[self.name] if self.own is None else None

    @property
    def whole(self) -> bool:
        """True if it is the user's own and reads the unpatched model's output, of whatever kind."""
        return self.own is not None and not isinstance(self.own, Object) and wants_dense(self.own)

    @property
    def log(self) -> bool:
        """True if values are logs of what is shown, and differences are relative to the unpatched model's."""
        return self.own is None and self.name == "perplexity"

    @property
    def field(self) -> str:
        """Name of the value in the table of results."""
        return "quality" if self.own is not None else self.name

    def against(self, batch: Any) -> str:
        """References of a batch: ``"labels"``, a key of it, ``"the unpatched model"``, or empty."""
        if self.ready is not None:
            return self.ready.compared(batch)
        if isinstance(self.own, Object):
            return self.own.against(batch)
        return DENSE if wants_dense(self.own) else ""

    def __call__(self, output: Any, batch: Any, dense: Any) -> tuple[list[float], list[float]]:
        """Values of the samples of a batch, and their weights.

        Raises:
            TypeError, ValueError: the metric returned no number.
        """
        if self.own is None:
            scores = (self.fitted or READY[self.name].each)(output, batch, dense)
            return self._checked([*scores.values]), [*(scores.weights or [1.0] * len(scores.values))]
        own: Callable[..., Any] = self.own
        found: Any = own(output, batch, dense) if wants_dense(own) else own(output, batch)
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


def wants_dense(own: Any) -> bool:
    """True of metric objects, and of functions of three: ``(output, batch, dense)``."""
    if isinstance(own, Object):
        return True
    try:
        asked = inspect.signature(own).parameters.values()
    except (TypeError, ValueError):  # of callables without a signature
        return False
    places = [p for p in asked if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in places if p.default is p.empty]) == 3


def scorers(metrics: Metrics, run: str | None, better: Better | Mapping[str, Better]) -> tuple[Scorer, ...]:
    """The metrics that the user names or gives: one, several, or functions and objects by the names that they get.

    Args:
        metrics: as :func:`scorer` takes one; a list of these; or a dict of them by names. Ready ones keep theirs.
        run: the kind of run that they score; None: not known yet.
        better: direction of values of one's own, for all alike or by name.

    Raises:
        TypeError, ValueError: as :func:`scorer`; or there is none, or two have one name.
        ImportError: a library that one needs is not installed.
    """
    if isinstance(metrics, Mapping):
        found = [_named(name, one, run, _direction(better, name)) for name, one in metrics.items()]
    else:
        several: Sequence[Any] = metrics if isinstance(metrics, list | tuple) else [metrics]
        found = [scorer(one, run, _direction(better, _name(one))) for one in several]
    names = [one.name for one in found]
    if not names or len(set(names)) < len(names):
        why = f"names one twice: {', '.join(names)}; give a dict of names" if names else "names none"
        raise ValueError(f"metric {why}")
    if isinstance(better, Mapping) and (unknown := [name for name in better if name not in names]):
        raise ValueError(f"better has {unknown[0]!r}; the metrics are {', '.join(map(repr, names))}")
    return tuple(found)


def _direction(better: Better | Mapping[str, Better], name: str) -> Better:
    return better.get(name, "higher") if isinstance(better, Mapping) else better


def _named(name: str, metric: Metric, run: str | None, better: Better) -> Scorer:
    if name in READY and metric != name:
        raise ValueError(f"metric has {name!r}, the name of a ready metric, for another one: choose another name")
    if isinstance(metric, str) and metric != name:
        raise ValueError(f"metric has {name!r} for {metric!r}: ready metrics keep their names")
    return replace(scorer(metric, run, better), name=name)


def _name(metric: Metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__).strip("<>")


def scorer(metric: Metric, run: str | None, better: Better) -> Scorer:
    """The metric that the user names or gives.

    Args:
        metric: a name, a metric object of torchmetrics, or a function of ``(output, batch)`` or of ``(output, batch,
            dense)``, whose last one is the unpatched model's output.
        run: the kind of run that it scores; None: not known yet.
        better: direction of a function's values.

    Raises:
        TypeError, ValueError: it is none of these, or does not fit the run.
        ImportError: a library that it needs is not installed.
    """
    check_choice(better, "better", ("higher", "lower"))
    if is_object(metric):
        found = Object(metric)
        return Scorer(found.__name__, found.better or better, found)
    if callable(metric):
        return Scorer(_name(metric), better, metric)
    if not isinstance(metric, str):
        raise TypeError(f"metric must be a name or a function of (output, batch), got {type(metric).__name__}")
    if metric not in READY:
        raise ValueError(f"metric is {metric!r}; allowed are {', '.join(map(repr, READY))}, or a function")
    fits = FITS.get(str(run), (*READY,))
    if metric not in fits:
        raise ValueError(
            f"metric={metric!r} does not fit {'read' if run == 'features' else 'the run'} {run!r}, whose ready metrics "
            f"are {', '.join(map(repr, fits))}"
        )
    READY[metric].check()
    return Scorer(metric, READY[metric].better)


def _within(found: Estimate, low: float, high: float) -> Estimate:
    """An estimate whose interval ends where the metric's values do, or their differences."""
    return found.map(lambda v: min(high, max(low, v)))


@dataclass
class Tally:
    """Values of an arm and of the unpatched model, sample by sample.

    Attributes:
        values, base: of the arm and of the unpatched model.
        weights: of the samples.
        groups: a key a sample; empty where each stands for itself.
        against: what the outputs were compared with; empty where the metric does not say.
        log: True if values are logs of what is shown.
    """

    values: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    against: str = ""
    log: bool = False

    def take(self, score: Scorer, output: Any, batch: Any, dense: Any) -> None:
        """Add the samples of a batch.

        Args:
            score: the metric.
            output: of the arm.
            batch: as the data yield it.
            dense: the unpatched model's output.

        Raises:
            TypeError, ValueError: the metric returned no numbers, or not as many for both; or some batches alone have
                groups, or what is right.
        """
        values, weights = score(output, batch, dense)
        base = score(dense, batch, dense)[0]
        if len(values) != len(base):
            raise ValueError(f"metric returned {len(values)} values, and {len(base)} for the unpatched model")
        keys = groups(batch, len(values))
        if self.values and bool(keys) != bool(self.groups):
            raise ValueError(f"some batches have {GROUP!r} and others have none")
        against = score.against(batch)
        if self.values and against != self.against:
            raise ValueError(f"some batches of data are compared with {self.against}, and others with {against}")
        self.against, self.log = against, score.log
        self.values += values
        self.base += base
        self.weights += weights
        self.groups += keys

    @classmethod
    def joined(cls, parts: Iterable[Tally]) -> Tally:
        """The samples of several, one after another.

        Raises:
            ValueError: some alone have groups, or are compared with something else than the others.
        """
        found = [part for part in parts if part.values]
        if len({(part.against, bool(part.groups)) for part in found}) > 1:
            raise ValueError(f"some parts of data have {GROUP!r}, or what is right, and others have none")
        out = cls(against=found[0].against, log=found[0].log) if found else cls()
        for part in found:
            out.values += part.values
            out.base += part.base
            out.weights += part.weights
            out.groups += part.groups
        return out

    @property
    def keys(self) -> Groups:
        """The groups, or None."""
        return self.groups or None

    def record(self, metric: Scorer) -> dict[str, float]:
        """Fields of a record of results: the quality, and the difference to the unpatched model."""
        quality = estimate(self.values, self.weights, self.keys)
        difference = paired(self.values, self.base, self.weights, self.keys)
        if metric.log:
            quality, difference = quality.map(math.exp), difference.map(math.expm1)
        if metric.ready is not None:
            low, high = metric.ready.ends
            quality = _within(quality, low, high)
            difference = _within(difference, low - high if not metric.log else -1.0, high - low)
        found: dict[str, float] = {f"{metric.field}_count": len(self.values), "difference_count": len(self.values)}
        for name, one in ((metric.field, quality), ("difference", difference)):
            ends = {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            found |= {k: v for k, v in ends.items() if v is not None}
        return found
