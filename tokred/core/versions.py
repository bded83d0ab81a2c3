"""Versions of each library that tokred was tested with, and a warning for others.

The versions are data: ``data/tested.json``, written by ``.ci/refresh`` from pyproject's floors and from an environment
with the newest of everything.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from importlib import resources
from typing import Literal, NamedTuple

from tokred.core import environment
from tokred.errors import UntestedVersionWarning

# Of tokred itself.
TOKRED = "0.2.0"

Standing = Literal["tested", "older", "newer", "missing", "unknown"]


class Bounds(NamedTuple):
    """The oldest and the newest version of a library that tests have run with."""

    floor: str
    newest: str


@functools.cache
def tested() -> dict[str, Bounds]:
    """Tested versions by the name that a library is imported under."""
    text = resources.files("tokred.core").joinpath("tested.json").read_text("utf8")
    return {name: Bounds(row["floor"], row["newest"]) for name, row in json.loads(text)["libraries"].items()}


def release(version: str) -> tuple[int, int, int]:
    """Major, minor and micro number; what a version leaves out, or marks as a build of its own, counts as zero."""
    match = re.match(r"\s*v?(?:\d+!)?(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if match is None:
        return 0, 0, 0
    major, minor, micro = (int(part or 0) for part in match.groups())
    return major, minor, micro


def standing(library: str, installed: str) -> Standing:
    """Standing of an installed version among those that were tested.

    Args:
        library: by the name that it is imported under.
        installed: its version; "": it is not installed.
    """
    if not installed:
        return "missing"
    known = tested().get(library)
    if known is None:
        return "unknown"
    found = release(installed)
    if found < release(known.floor):
        return "older"
    return "newer" if found > release(known.newest) else "tested"


@functools.cache
def check_tested(library: str) -> None:
    """Warn, once in a process, if the installed version of a library was not tested.

    Args:
        library: by the name that it is imported under, such as ``"transformers"``.
    """
    installed = environment.version(environment.package(library))
    found = standing(library, installed)
    if found not in ("older", "newer"):
        return
    known = tested()[library]
    bound = f"{known.floor}, the oldest" if found == "older" else f"{known.newest}, the newest"
    warnings.warn(
        f"{library} {installed} is {found} than {bound} version that tokred was tested with; "
        "`tokred doctor` checks whether everything works with it",
        UntestedVersionWarning,
        stacklevel=3,
    )
