"""The laws that every patch keeps, whatever the model: what they are called, and those that need no oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tokred
from tokred.core.method import Method

CLOSE = 1e-4  # of the largest value: sums in another order

# In the order of the columns: what is said of a law in tables and in reports.
LAWS: Mapping[str, str] = {
    "nothing": "with nothing to remove, the output is bit for bit the unpatched one",
    "fewer": "tokens really leave (of formats: fewer bytes are held), and the output is another one and finite",
    "dropped": "tokens (or rows of a cache, or pairs of token and expert) that were dropped are as if they were masked",
    "merged": "a merged token counts for as many as it stands for, and the sizes sum to all",
    "cropped": "tokens that a cache takes back are as if they had never come, and generation goes on",
    "removed": "after removal, output, repr, state_dict, classes and hooks are what they were",
}


class BrokenLawError(Exception):
    """A law does not hold; the message says what was seen."""


@dataclass(frozen=True)
class Case:
    """One tiny model. Every law gets a copy of its own, so that none suffers from what another has broken.

    Attributes:
        library: that it is of.
        wing: ``"encoder"``, ``"diffusion"``, ``"vlm"``, ``"kv"`` or ``"moe"``.
        family: label.
        make: builds the model.
        run: all tensors of a forward.
        nothing: methods that have nothing to remove; none where a method always removes something.
        reducing: methods that remove something.
        counts: tokens (or rows) before, and after, of the last forward.
        laws: those that need an oracle of the wing: what checks them.
        longer: a forward, or a generation, in which methods act that act late; None: ``run`` is one.
        since: the first version of the library that can build the model; "": all that tokred runs with.
    """

    library: str
    wing: str
    family: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], list[Tensor]]
    nothing: Sequence[Method]
    reducing: Sequence[Method]
    counts: Callable[[nn.Module], tuple[int, int]]
    laws: Mapping[str, Callable[[Case], None]]
    since: str = ""
    longer: Callable[[nn.Module], list[Tensor]] | None = None

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model as the host makes it, which no law touches."""
        return self.make()

    @functools.cached_property
    def before(self) -> list[Tensor]:
        """The output of the unpatched model."""
        return self.run(self.model)

    def build(self) -> nn.Module:
        """A copy to be patched."""
        return copy.deepcopy(self.model)

    @property
    def checks(self) -> Mapping[str, Callable[[Case], None]]:
        """The function that checks each law of this case, in the order of :data:`LAWS`."""
        known = {**COMMON, **self.laws}
        return {law: known[law] for law in LAWS if law in known and (self.nothing or law != "nothing")}


class Snapshot(NamedTuple):
    """Everything that a patch could leave behind."""

    text: str
    keys: list[str]
    classes: list[type]
    hooks: list[tuple[int, int]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The snapshot of a model as it is now."""
        return cls(
            repr(model),
            list(model.state_dict()),
            [type(m) for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        )


def check_nothing(case: Case) -> None:
    """Nothing to remove is bit-equal."""
    model = case.build()
    tokred.apply(model, case.nothing)
    check_equal(case.run(model), case.before, "nothing was to be removed")


def check_fewer(case: Case) -> None:
    """Tokens leave, and it is seen."""
    model = case.build()
    tokred.apply(model, case.reducing)
    after = case.run(model)
    had, left = case.counts(model)
    if not left < had:
        raise BrokenLawError(f"{left} of {had} tokens are left: none was removed")
    if not all(bool(one.isfinite().all()) for one in after):
        raise BrokenLawError("the output is not finite")
    if largest(after, case.before) == 0:
        raise BrokenLawError(f"{left} of {had} tokens are said to be left, but the output is the unpatched one")


def check_removed(case: Case) -> None:
    """Removal restores everything."""
    model = case.build()
    was = Snapshot.of(model)
    tokred.apply(model, case.reducing)
    if list(model.state_dict()) != was.keys:
        raise BrokenLawError("the patched model has other keys in its state_dict")
    case.run(model)
    tokred.remove(model)
    now = Snapshot.of(model)
    for name, old, new in zip(Snapshot._fields, was, now, strict=True):
        if old != new:
            raise BrokenLawError(f"after removal the model's {name} is not what it was")
    check_equal(case.run(model), case.before, "the patch was removed")


COMMON: Mapping[str, Callable[[Case], None]] = {
    "nothing": check_nothing,
    "fewer": check_fewer,
    "removed": check_removed,
}


def check_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], when: str) -> None:
    """Bit for bit.

    Raises:
        BrokenLawError: they differ.
    """
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise BrokenLawError(f"{when}, but the output differs by up to {largest(ours, theirs):.1e}")


def check_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    """Two outputs may differ by no more than sums in another order do.

    Raises:
        BrokenLawError: they are further apart.
    """
    for a, b in zip(ours, theirs, strict=True):
        scale = max(float(b.abs().max()), 1e-3) if b.numel() else 1.0
        gap = largest([a], [b]) / scale
        if not gap < CLOSE:
            raise BrokenLawError(f"{what} differ from those of the model as it is by {gap:.1e} of the largest value")


def largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference; infinite where shapes differ."""
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    return max((float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def run_law(case: Case, law: str) -> str:
    """``""`` where the law holds, else one line that says why not."""
    try:
        with torch.no_grad():
            case.checks[law](case)
    except BrokenLawError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever breaks in a host is what a report has to say
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    """An exception's class and text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
