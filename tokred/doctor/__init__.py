"""``tokred doctor``: what is installed, what was tested, and the laws on one tiny random model of every family.

:func:`examine` runs the laws and answers with a row a family; :func:`document` puts everything into one document for
reports of issues. The command line prints both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tokred.adapters import contract
from tokred.api import list_methods
from tokred.core import environment, versions
from tokred.doctor import installed
from tokred.doctor.laws import LAWS, Case, one_line, run_law

Tick = Callable[[str], None]
SCHEMA = 1


class Row(NamedTuple):
    """The result of one family.

    Attributes:
        library, wing, family: which.
        broken: for each law that was checked ``""`` where it holds, else why not.
        error: why no model of the family could be built, or run unpatched; then no law was checked.
        skipped: the library is too old for the family, in words; then neither.
    """

    library: str
    wing: str
    family: str
    broken: dict[str, str]
    error: str = ""
    skipped: str = ""

    @property
    def healthy(self) -> bool:
        return not self.error and not any(self.broken.values())

    @property
    def complaints(self) -> list[tuple[str, str]]:
        """Law and reason of each that does not hold; the law is ``"build"`` where there was no model."""
        found = [(law, why) for law, why in self.broken.items() if why]
        return [("build", self.error)] if self.error else found


def names() -> tuple[str, ...]:
    """Libraries and wings that can be examined alone."""
    from tokred.doctor.cases import CASES, WINGS

    return (*CASES, *dict.fromkeys(wing for wings in WINGS.values() for wing in wings))


def present(library: str) -> bool:
    """True if a library can be imported."""
    return library in sys.modules or importlib.util.find_spec(library) is not None


def choose(only: Sequence[str] = (), methods: str = "") -> list[Case]:
    """Models of the libraries that are installed.

    Args:
        only: libraries and wings, see :func:`names`; none: all of them.
        methods: a pattern as :func:`tokred.list_methods` has it. Each of these methods is asked on the first model that
            it runs on, instead of one method on every model.

    Raises:
        ValueError: there is no such library or wing, or no such method.
    """
    from tokred.doctor.cases import CASES
    from tokred.doctor.registered import with_methods

    unknown = [name for name in only if name not in names()]
    if unknown:
        raise ValueError(f"there is nothing called {', '.join(unknown)} to examine; there are {', '.join(names())}")
    found = []
    for library, wings in _wanted(only).items():
        if present(library):
            found += [case for case in CASES[library]() if case.wing in wings]
    if not methods:
        return found
    chosen = list_methods(methods)
    if not chosen:
        raise ValueError(f"no method's name fits {methods!r}")
    with quiet():
        return list(with_methods(chosen, [case for case in found if not too_old(case)]))


def missing(only: Sequence[str] = ()) -> list[str]:
    """Libraries that would be examined, were they installed."""
    return [library for library in _wanted(only) if not present(library)]


def _wanted(only: Sequence[str]) -> dict[str, set[str]]:
    """Libraries to be examined, and the wings of each."""
    from tokred.doctor.cases import CASES, WINGS

    libraries = [name for name in CASES if name in only] or list(CASES)
    asked = [name for name in only if name not in CASES]
    found = {library: {wing for wing in WINGS[library] if not asked or wing in asked} for library in libraries}
    return {library: wings for library, wings in found.items() if wings}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, hosts say nothing and torch takes one thread, which is fastest for tensors of this size."""
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(level)


def examine(chosen: Sequence[Case], tick: Tick | None = None) -> list[Row]:
    """The laws on every model, in order.

    Args:
        chosen: the models.
        tick: called with what was examined, after each.
    """
    rows = []
    with quiet():
        for case in chosen:
            rows.append(examine_one(case))
            if tick is not None:
                tick(f"{case.library} {case.family}")
    return rows


def too_old(case: Case) -> str:
    """Why the installed library cannot build a case's model, in words; "" where it can."""
    there = environment.version(environment.package(case.library))
    if case.since and versions.release(there) < versions.release(case.since):
        return f"{case.library} {there} cannot build it, {case.since} and later can"
    return ""


def examine_one(case: Case) -> Row:
    """The laws on one model."""
    if why := too_old(case):
        return Row(case.library, case.wing, case.family, {}, skipped=why)
    try:
        with torch.no_grad():
            _ = case.before
    except Exception as error:  # whatever the host answers with
        return Row(case.library, case.wing, case.family, {}, one_line(error))
    return Row(case.library, case.wing, case.family, {law: run_law(case, law) for law in case.checks})


def document(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """The whole result, for the report of an issue."""
    return {
        "schema": SCHEMA,
        "tokred": environment.version("tokred"),
        "commit": environment.commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": installed.machine(),
        "libraries": [row._asdict() for row in installed.libraries()],
        "operators": [row._asdict() for row in installed.operators()],
        "names": [row._asdict() for row in contract.kept()],
        "laws": dict(LAWS),
        "families": [{**row._asdict(), "healthy": row.healthy} for row in rows],
        "broken": sum(not row.healthy for row in rows),
        "seconds": round(seconds, 1),
    }
