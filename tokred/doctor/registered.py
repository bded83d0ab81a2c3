"""The laws with every method, each on the first tiny model that it runs on: methods of plug-ins too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import tokred
from tokred.core.method import Method
from tokred.core.registry import methods
from tokred.doctor import stores
from tokred.doctor.laws import Case, largest
from tokred.kv.keeping import Keeping

# The wings whose models offer a stage.
WING_OF = {
    "block": "encoder", "attention": "diffusion", "cache": "kv", "projector": "vlm", "layer": "vlm", "experts": "moe",
}  # fmt: skip


def with_methods(names: Iterable[str], cases: Iterable[Case]) -> Iterator[Case]:
    """A case for each method, by the settings that its class calls ``example`` and ``nothing``.

    Args:
        names: of methods; those that run on no model of the cases are left out.
        cases: models, by the order in which they are tried.
    """
    tried = tuple(dataclasses.replace(c, run=c.longer or c.run) for c in cases)
    for name in names:
        cls = methods.get(name)
        if issubclass(cls, Keeping):
            yield from (stores.alone(name, c) for c in [c for c in tried if c.wing == "kv"][:1])
            continue
        method = tokred.make(name, **cls.example)
        case = next((c for c in tried if WING_OF[cls.stage] == c.wing and _runs(method, c)), None)
        if case is not None:
            nothing = [] if cls.nothing is None else [tokred.make(name, **cls.nothing)]
            yield dataclasses.replace(
                case, family=f"{name} on {case.family}", nothing=nothing, reducing=[method], laws={}
            )


def _runs(method: Method, case: Case) -> bool:
    """True if a method can be applied to a model and removes something there; some need clips, for example."""
    model = case.build()
    try:
        tokred.apply(model, method)
        after = case.run(model)
    except (tokred.TokredError, ValueError):
        return False
    had, left = case.counts(model)
    # Prompts with padding count it as what had come, so that the output has to tell as well.
    return left < had and largest(after, case.before) > 0
