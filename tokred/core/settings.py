"""Settings as text: ``"tome r=13"`` on the command line and in tables, ``ToMe(r=13)`` in Python."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any


def parse_value(text: str) -> Any:
    """A Python literal (``13``, ``0.7``, ``(16,-1)``, ``[8,4]``, ``True``), or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_pairs(texts: Iterable[str]) -> dict[str, Any]:
    """``["r=13", "metric=k"]`` as parameters.

    Raises:
        ValueError: a text is not ``key=value``, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip():
            raise ValueError(f"a setting is key=value, such as r=13 or kappa=0.7, got {text!r}")
        if key.strip() in found:
            raise ValueError(f"{key.strip()} is set twice")
        found[key.strip()] = parse_value(value.strip())
        further = re.search(r",\s*([A-Za-z_]\w*)=", value)
        if further is not None and isinstance(found[key.strip()], str):
            raise ValueError(f"settings are separated by spaces, not commas: {key.strip()}={value!r}")
    return found


def parse_setting(text: str) -> tuple[str, dict[str, Any]]:
    """``"evit kappa=0.7 blocks=(3, 6)"`` as a method's name and parameters.

    A value in quotes may be such a text itself: ``"restore base='fastvid context=0'"``.

    Raises:
        ValueError: something in it is not ``key=value``.
    """
    name, _, rest = text.strip().partition(" ")
    if not name or "=" in name:
        raise ValueError(f"a setting is a method and key=value pairs, such as 'tome r=13', got {text!r}")
    # Between pairs, and not inside quotes: behind the space all that are opened are closed.
    pairs = [p for p in re.split(r"\s+(?=[A-Za-z_]\w*=)(?=(?:[^'\"]|'[^']*'|\"[^\"]*\")*$)", rest.strip()) if p]
    return name, parse_pairs(pairs)


def call(made: Any, *, short: bool = True) -> str:
    """The call that makes an object of a dataclass, with what differs from its defaults: ``ToMe(r=13)``.

    Args:
        made: the object.
        short: whether objects among its parameters are written as what users give for them, as in ``r=13``.
    """
    if not dataclasses.is_dataclass(made):  # methods of users need not be
        return f"{type(made).__name__}()"
    fields = [f for f in dataclasses.fields(made) if f.init]
    required = any(f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING for f in fields)
    cls: Any = type(made)
    usual = None if required else cls()
    said = []
    for f in fields:
        value, default = getattr(made, f.name), f.default if usual is None else getattr(usual, f.name)
        # 1 and 1.0 are equal, but one is a count and the other a share.
        if type(value) is not type(default) or value != default:
            said.append(f"{f.name}={source(value) if short else repr(value)}")
    return f"{type(made).__name__}({', '.join(said)})"


def source(value: Any) -> str:
    """A parameter as Python source: what it was given as, where that is shorter than the object made of it."""
    short = getattr(value, "shorthand", None)
    if short is not None:
        return source(short)
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if type(value) is list:
        return f"[{', '.join(map(source, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(source, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def split_settings(text: str) -> list[str]:
    """``"divprune budget=64 + snapkv budget=0.5"``, methods that act together, as ``["divprune budget=64", ...]``.

    Raises:
        ValueError: a part is empty, or is no setting.
    """
    parts = [part.strip() for part in re.split(r"\s\+(?=\s|$)|^\+\s", text)]
    if not all(parts):
        raise ValueError(f"methods that act together stand with ' + ' between them, got {text!r}")
    for part in parts:
        parse_setting(part)
    return parts
