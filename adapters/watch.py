"""Sites that a patch promised against sites that ran: a patch that is passed by is an error, never silence.

A compiled graph runs no Python, so there the comparison happens while it is traced: the compiler calls functions whose
result it may assume constant, with names for the watch and the site, and leaves no trace of them in the graph.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tokred.adapters import contract
from tokred.adapters.changes import Changes
from tokred.adapters.contract import members
from tokred.adapters.swap import Hook, host_class, is_swapped
from tokred.errors import BypassedError

_KEYS = itertools.count()
_WATCHES: weakref.WeakValueDictionary[str, Watch] = weakref.WeakValueDictionary()


class Watch:
    """The sites of one patched part of a model, and those of them that have run in the forward in flight, by thread.

    Args:
        family: for messages.
        names: of the modules that are sites, within the patched part, by site.

    Sites and keys are strings: the compiler takes numbers that differ from model to model for variables.
    """

    def __init__(self, family: str = "", names: dict[str, str] | None = None) -> None:
        self.family = family
        self.names = names or {}
        self.key = str(next(_KEYS))
        self.traced: set[str] = set()  # sites that run in a graph of their own, where nobody notes them any more
        self.model: weakref.ref[nn.Module] | None = None
        self._local = threading.local()
        _WATCHES[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"family": self.family, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin(self) -> None:
        """Start to note the sites of a forward of the patched part."""
        self._local.seen = set()

    def ran(self, site: str) -> None:
        """A site took part. Outside of a forward of the part (a block that is run by itself) nobody asks."""
        if torch.compiler.is_compiling():
            _ran(self.key, site)
        else:
            self.note(site)

    def note(self, site: str) -> None:
        """Note that a site took part, outside of a compiled graph."""
        seen = getattr(self._local, "seen", None)
        if seen is not None:
            seen.add(site)

    def check_ran(self, site: str) -> None:
        """Complain where a later site runs, and this one, which leads to it, has not.

        Raises:
            BypassedError: with its name.
        """
        seen = getattr(self._local, "seen", None)
        if seen is not None and site in self.names and site not in seen | self.traced:
            raise BypassedError(
                f"{self.names[site]} did not run through the patch of {self.family}: its forward was replaced, or it "
                "was replaced or left out since. Call tokred.apply again after such a change, or tokred.remove(model) "
                "to run without the patch"
            )

    def passed_by(self) -> list[str]:
        """Sites that did not run in the forward that has ended."""
        seen = self._local.__dict__.pop("seen", None)
        return [] if seen is None else [site for site in self.names if site not in seen]


class EnterWatched(Hook):
    """Before the patched part's forward: begins to note the sites that run."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not is_swapped(module):
            return  # the patch is off for the moment
        if torch.compiler.is_compiling():
            _begin(self.watch.key)
        else:
            self.watch.begin()


class LeaveWatched(Hook):
    """Behind the patched part's forward: raises if sites were passed by."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_swapped(module):
            return
        if torch.compiler.is_compiling():
            _end(self.watch.key)
            return
        missing = self.watch.passed_by()
        if missing:
            check_passed_by(module, self.watch, missing)


class Call(Hook):
    """Behind the forward of the model that a user patched: calls a function of theirs with the model.

    A compiled forward runs no Python and calls nothing. Copies of the model call the same function.
    """

    def __init__(self, called: Callable[[nn.Module], object]) -> None:
        self.called = called

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.called(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        return Call(self.called)


def _begin(key: str) -> int:
    _WATCHES[key].begin()
    return 0


def _ran(key: str, site: str) -> int:
    _WATCHES[key].note(site)
    _WATCHES[key].traced.add(site)
    return 0


def _end(key: str) -> int:
    watch = _WATCHES[key]
    missing = watch.passed_by()
    if missing:
        model = None if watch.model is None else watch.model()
        check_passed_by(model, watch, missing)
    return 0


_functions: tuple[Any, ...] = (_begin, _ran, _end)
for _function in _functions:
    # What torch.compiler.assume_constant_result sets; that would import the compiler here.
    setattr(_function, members.CONSTANT.name, True)


def hang(model: nn.Module, watch: Watch, changes: Changes) -> None:
    """Watch the forwards of ``model``."""
    watch.model = weakref.ref(model)  # for messages; a copy of the model gives none while it is compiled
    changes.before(model, EnterWatched(watch))
    changes.after(model, LeaveWatched(watch))


def check_passed_by(model: nn.Module | None, watch: Watch, missing: Iterable[str]) -> None:
    """Raise for sites that something stands in front of, or where not a single one ran.

    Hosts leave out blocks of their own accord (guidance by skipped layers, caches of features): a site that did not run
    and that nothing hides is theirs to skip, as long as others have run.

    Raises:
        BypassedError: with the site, what stands in the way, and what to do.
    """
    missing = list(missing)
    for site in missing:
        why = None if model is None else obstacle(model, watch.names[site])
        if why is not None:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BypassedError(
                f"the patch of {watch.family} was passed by at {watch.names[site]}{others}: {why}. Call tokred.apply "
                "again after such a change, or tokred.remove(model) to run without the patch"
            )
    own_graphs = not watch.traced.isdisjoint(missing)  # where nobody notes that they run
    if len(missing) == len(watch.names) and not own_graphs and not (model is not None and contract.skips_layers(model)):
        raise BypassedError(
            f"the patch of {watch.family} was passed by: none of its {len(missing)} sites ran in this forward, which "
            f"took another way than through {watch.names[missing[0]]}. Apply tokred to the model that really runs, or "
            "call tokred.remove(model)"
        )


def obstacle(model: nn.Module, name: str) -> str | None:
    """The reason for which a site did not run: it was exchanged or left out, or its forward replaced; None: no such."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return f"there is no {name} any more"
    if not is_swapped(module):
        return f"it has been replaced since by another {host_class(module).__name__}, which is not patched"
    parts = name.split(".") if name else []
    for i in range(len(parts), 0, -1):
        outer = ".".join(parts[:i])
        found = contract.foreign_forward(model.get_submodule(outer))
        if found is not None:
            return f"the forward of {outer} was replaced since (by {found}), and that does not call the one before"
    return None
