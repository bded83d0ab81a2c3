"""``Forward``: one forward a batch, of an encoder, a denoiser, or a model with vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokred.bench.feeds.batches import tensors
from tokred.bench.feeds.feed import Feed
from tokred.bench.scoring import arguments


class Forward(Feed):
    """One forward on tensors, ``(inputs, labels)``, or a dictionary of the forward's arguments."""

    name = "forward"
    stages = ("block", "projector", "layer", "attention")

    def prepare(self, item: Any) -> Any:
        if not any(True for _ in tensors(item)):
            raise ValueError(
                "a batch of data is a tensor, (inputs, labels), or a dict of the forward's arguments, "
                f"got {type(item).__name__} without a tensor in it"
            )
        return item

    def run(self, model: Any, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            # Given labels, models of transformers compute a loss, which is none of the work that is compared.
            return model(**arguments(batch))
        return model(batch[0] if isinstance(batch, tuple | list) else batch)
