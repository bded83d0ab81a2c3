"""``Forward``: one forward a batch, of an encoder, a denoiser, or a model with vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokred.bench.feeds.batches import tensors
from tokred.bench.feeds.feed import Feed
from tokred.bench.read import arguments


class Forward(Feed):
    """One forward on tensors, ``(inputs, labels)``, or a dictionary of the forward's arguments.

    Args:
        more: arguments of every forward; those of a batch come first.
    """

    name = "forward"
    stages = ("block", "projector", "layer", "attention")

    def __init__(self, more: Mapping[str, Any] | None = None) -> None:
        self.more = dict(more or {})

    def prepare(self, item: Any, index: int = 0) -> Any:
        if not any(True for _ in tensors(item)):
            raise ValueError(
                "a batch of data is a tensor, (inputs, labels), or a dict of the forward's arguments, "
                f"got {type(item).__name__} without a tensor in it"
            )
        return item

    def run(self, model: Any, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            # Given labels, models of transformers compute a loss, which is none of the work that is compared.
            return model(**{**self.more, **arguments(batch)})
        return model(batch[0] if isinstance(batch, tuple | list) else batch)

    def finish(self, model: Any, output: Any, batch: Any) -> Any:
        """The output; of a denoiser its sample."""
        sample = getattr(output, "sample", None)
        return sample if isinstance(sample, Tensor) else output

    def one(self, batch: Any) -> Any:
        """The first sample of a batch of tensors that all count its samples in their first dimension."""
        found = [*tensors(batch)]
        if len({len(x) if x.ndim else 0 for x in found}) != 1 or not found[0].ndim:
            return batch
        return _cut(batch)


def _cut(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:1]
    if isinstance(batch, Mapping):
        return {name: _cut(value) for name, value in batch.items()}
    return type(batch)(_cut(value) for value in batch) if isinstance(batch, tuple | list) else batch
