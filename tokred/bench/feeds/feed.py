"""``Feed``: one kind of run, the way in which a model is given a batch and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

from tokred.bench.codes import named
from tokred.bench.read import samples
from tokred.core.site import STAGES


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Random numbers of torch that begin with a seed, and go on as before afterwards."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if used else []):
        torch.manual_seed(seed)
        yield


class Feed:
    """One kind of run.

    Attributes:
        name: as ``run`` of :func:`tokred.benchmark` names it.
        stages: whose methods can act in such a run.
        usual: the metric where none is asked for.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = STAGES
    usual: ClassVar[str] = "agreement"

    @property
    def kind(self) -> str | None:
        """The kind of output that metrics get, by the run's name; None: of any."""
        return self.name

    @property
    def settings(self) -> str:
        """Settings on which outputs depend beside model and data, as text."""
        return ""

    def prepare(self, item: Any, index: int = 0) -> Any:
        """The batch that an item of the data is; ``index`` counts them."""
        return item

    def around(self, model: Any) -> AbstractContextManager[None]:
        """The state of the model while it is measured, patched or not."""
        return nullcontext()

    def run(self, model: Any, batch: Any) -> Any:
        """The output of the model on a batch: what is timed."""
        raise NotImplementedError

    def finish(self, model: Any, output: Any, batch: Any) -> Any:
        """The output as metrics take it; not timed."""
        return output

    def probe(self, model: Any, batch: Any) -> int:
        """The least run of a patched model after which its report tells what was kept, and samples that it had."""
        self.run(model, batch)
        return samples(batch)

    def one(self, batch: Any) -> Any:
        """The first sample of a batch, where it can be cut out; else all of it."""
        return batch


class Own(Feed):
    """The user's own function ``run(model, batch) -> output``.

    Args:
        function: it is called with the model, patched or not, and an item of the data. Where it has a function
            ``probe`` of the same, that is called for reports of what was kept, and may run less.
    """

    name = "own"

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    @property
    def settings(self) -> str:
        """Name of the function, and its code."""
        return named(self.function)

    def run(self, model: Any, batch: Any) -> Any:
        return self.function(model, batch)

    def probe(self, model: Any, batch: Any) -> int:
        getattr(self.function, "probe", self.function)(model, batch)
        return samples(batch)
