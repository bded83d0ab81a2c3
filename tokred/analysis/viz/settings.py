"""Settings to draw side by side, each of one method or of several that act together."""

from __future__ import annotations

from collections.abc import Sequence

from tokred import api
from tokred.analysis.viz.recording import label_of
from tokred.core.method import Method
from tokred.core.settings import split_settings
from tokred.settings.given import typed

One = str | Method | tuple[Method, ...]
Several = One | Sequence[One]


def settings(given: Several) -> list[tuple[str, list[Method]]]:
    """Labels and the methods that act together under each; what comes twice is kept once.

    Args:
        given: ``"divprune budget=64"``, ``"divprune budget=64 + fastv layer=2"``, a method, a tuple of methods that act
            together, or a list of these.

    Raises:
        ValueError: there is none, or a setting is not ``name key=value``.
        UnknownMethodError, TypeError: a method or a parameter does not exist.
    """
    items = [given] if isinstance(given, str | Method | tuple) else list(given)
    found: dict[str, list[Method]] = {}
    for item in items:
        if isinstance(item, str):
            found[" + ".join(" ".join(part.split()) for part in split_settings(item))] = typed(item)
        else:
            made = [api.make(one) for one in (item if isinstance(item, tuple) else (item,))]
            found[" + ".join(map(label_of, made))] = made
    if not found:
        raise ValueError("no method is given; 'tome r=13' would be one")
    return list(found.items())
