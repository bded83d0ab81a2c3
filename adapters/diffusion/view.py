"""The attention module as its processor sees it: fewer tokens go into some projections, for some samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.adapters.contract.spelling import Word
from tokred.adapters.diffusion.flight import Plan
from tokred.errors import UnsupportedModelError


class Batch:
    """Which samples a processor is at: perturbed-attention guidance runs some of a batch in another way than the rest.

    Samples are found again by their values, which costs no waiting. Where two are equal, so are their tokens' plans.

    Args:
        given: ``(B, N, C)`` input of the processor.
        name: of the attention, for messages.

    Attributes:
        rows: of the samples that were projected last, ``(B',)``; None: all of them.
        keys: the tensor that keys were last made of.
    """

    def __init__(self, given: Tensor, name: str) -> None:
        self.given, self.name = given, name
        self.rows: Tensor | None = None
        self.last: Tensor | None = None
        self.keys: Tensor | None = None
        self.short: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Note the tensor ``x`` that the processor is about to project, and which samples it holds."""
        if self.last is not x:
            self.last, self.short = x, None
            self.rows = None if x.shape[0] == self.given.shape[0] else self._which(x)

    def _which(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.given.shape[1:]:
            raise UnsupportedModelError(
                f"the processor of {self.name} splits the batch of {tuple(self.given.shape)} into parts of "
                f"{tuple(x.shape)} whose samples cannot be told: call tokred.remove(model) first"
            )
        same = [(x == sample).flatten(1).all(1) for sample in self.given]
        return torch.stack(same, 1).to(torch.uint8).argmax(1)

    def at(self, plan: Plan, samples: int) -> Plan:
        """The plan for ``samples`` samples: all of them, or those that were projected last."""
        return plan if samples == self.given.shape[0] else plan.at(self.last_rows(samples))

    def last_rows(self, samples: int) -> Tensor:
        """Rows ``(samples,)`` of the batch that were projected last.

        Raises:
            UnsupportedModelError: another number of samples was projected last.
        """
        if self.rows is None or samples != len(self.rows):
            raise UnsupportedModelError(
                f"the processor of {self.name} works on {samples} of {self.given.shape[0]} samples that it has not "
                "projected before: call tokred.remove(model) first"
            )
        return self.rows

    def merge(self, x: Tensor, plan: Plan) -> Tensor:
        """Fewer tokens; queries, keys and values come from one tensor, which is merged once."""
        self.see(x)
        if self.short is None:
            self.short = self.at(plan, x.shape[0]).merge(x)
        return self.short


class Wrapped:
    """A layer that hosts and processors may ask for what it has, such as the type of its weights."""

    module: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class Watched(Wrapped):
    """A projection that tells the batch about its input."""

    def __init__(self, module: Any, batch: Batch) -> None:
        self.module, self.batch = module, batch

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.batch.see(x)
        return self.module(x, *args, **kwargs)


class Merging(Wrapped):
    """A projection that runs on fewer tokens.

    Args:
        module: the projection.
        plan: of the whole batch.
        batch: at which samples the processor is.
        side: ``"keys"``; ``"values"`` that are merged as the keys were; or ``""``.
    """

    def __init__(self, module: Any, plan: Plan, batch: Batch, side: str = "") -> None:
        self.module, self.plan, self.batch, self.side = module, plan, batch, side

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.batch.see(x)
        if self.side == "keys":
            self.batch.keys = x
        elif self.side == "values" and self.batch.rows is not None and self.batch.keys is not x:
            return self.module(x, *args, **kwargs)  # every token looks at itself: there are no keys to be fewer
        return self.module(self.batch.merge(x, self.plan), *args, **kwargs)


class Restoring(Wrapped):
    """The last layer of an attention, whose output gets its full length back."""

    def __init__(self, module: Any, plan: Plan, batch: Batch) -> None:
        self.module, self.plan, self.batch = module, plan, batch

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.module(x, *args, **kwargs)
        if y.shape[1] != self.plan.reduction.slots:
            return y  # no query was left out
        return self.batch.at(self.plan, y.shape[0]).restore(y)


class View:
    """An attention module as its processor sees it: itself, but for some projections."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self._module = module
        for name, part in replaced.items():  # one by one: older compilers do not follow an update of the dictionary
            setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def view(module: Any, plan: Plan, projections: tuple[Word, ...], restore: bool, batch: Batch) -> View:
    """``module`` with fewer tokens going into some of its projections.

    Raises:
        UnsupportedModelError: it has one of them under no name that is known. The others would run on fewer tokens
            than this one, which need not fail.
    """
    lost = [word.name for word in projections if word is not members.TO_ALL and not word.on(module)]
    if lost and not members.TO_ALL.on(module):
        raise UnsupportedModelError(f"{batch.name} ({type(module).__name__}) has no {' and no '.join(lost)}")
    replaced: dict[str, Any] = {}
    for word in projections:
        own = word.part(module)
        if own is not None:
            side = "keys" if word is members.TO_KEY else "values" if word is members.TO_VALUE else ""
            replaced[word.spelled(module)] = Merging(own, plan, batch, side if plan.part == "kv" else "")
    if restore:
        *before, last = members.TO_OUTPUT.need(module)
        replaced[members.TO_OUTPUT.spelled(module)] = (*before, Restoring(last, plan, batch))
    return View(module, replaced)


def watched(module: Any, batch: Batch) -> Any:
    """``module`` with a query projection that notes which samples it was called on."""
    queries = members.TO_QUERY.part(module)
    if queries is None:
        return module
    return View(module, {members.TO_QUERY.spelled(module): Watched(queries, batch)})


def perturbs(module: Any) -> bool:
    """True where the processor is one of perturbed-attention guidance."""
    return type(words.PROCESSOR.part(module)).__name__.startswith("PAG")
