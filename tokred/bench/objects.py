"""Metric objects of torchmetrics as metrics of :func:`tokred.benchmark`: a value a batch, each by an empty copy."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from tokred.bench.read import DENSE, LABELS, answer, images, key_of_references, labels, references, texts
from tokred.bench.ready import Better

# Metrics of these modules are about a whole set: the mean over batches is none of theirs.
WHOLE = ("fid", "kid", "inception", "mifid", "perceptual_path_length", "mean_ap", "bleu", "sacre_bleu")


def is_object(metric: Any) -> bool:
    """True of a metric object of torchmetrics; its library is not imported for it."""
    return any(cls.__module__.split(".")[0] == "torchmetrics" for cls in type(metric).__mro__)


class Object:
    """A metric object, called as ``object(output, batch, dense)``.

    Args:
        metric: of torchmetrics; it stays as it is.

    Raises:
        ValueError: it is about a whole set of samples, such as FID, or is updated with other things than outputs and
            what is right.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.__name__ = type(metric).__name__
        module = type(metric).__module__.rsplit(".", 1)[-1]
        asked = [
            p
            for p in inspect.signature(metric.update).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if module in WHOLE or len(asked) != 2 or asked[1].name == "real":
            why = "is about a whole set of samples" if module in WHOLE else f"takes {', '.join(p.name for p in asked)}"
            raise ValueError(
                f"metric {self.__name__} {why}, so that batches have no values of it to make intervals of: give a "
                "metric of outputs and what is right, such as Accuracy, or a function of (output, batch)"
            )

    @property
    def better(self) -> Better | None:
        """The direction that is good, if the metric says it."""
        higher = getattr(self.metric, "higher_is_better", None)
        return None if higher is None else "higher" if higher else "lower"

    def against(self, batch: Any) -> str:
        """Its references in a batch: the batch's labels or texts, else the unpatched model's output."""
        if key := key_of_references(batch):
            return key
        try:
            labels(batch)
        except ValueError:
            return DENSE
        return LABELS[0]

    def __call__(self, output: Any, batch: Any, dense: Any) -> Any:
        """The metric's value of a batch."""
        fresh = self.metric.clone()
        fresh.reset()
        given: Any
        right: Any
        if key_of_references(batch):
            given = texts(output)
            several = references(batch, len(given)) or []
            # Most take one reference a sample.
            right = [one[0] for one in several] if all(len(one) == 1 for one in several) else several
        elif self.against(batch) == DENSE:
            given, right = _alike(output, dense)
        else:
            given, right = answer(output), labels(batch)
        if isinstance(given, Tensor):
            fresh, right = fresh.to(given.device), right.to(given.device)
        fresh.update(given, right)
        return fresh.compute()


def _alike(output: Any, dense: Any) -> tuple[Any, Any]:
    """Images, texts or tensors of two outputs."""
    for read in (images, texts):
        try:
            return read(output), read(dense)
        except (TypeError, ValueError):
            continue
    return answer(output), answer(dense)
