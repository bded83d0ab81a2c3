"""Amounts: one share ``keep`` of the multiply-adds as settings of any method, and parameters as controls."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any, Literal, NamedTuple

from tokred import api
from tokred.bench import arms
from tokred.bench.arms import STEPS, Arm
from tokred.bench.models import Subject
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting, source

KEEP = 0.6  # of the multiply-adds, at first
Kind = Literal["flag", "choice", "text"]


class Control(NamedTuple):
    """A parameter of a method as a control of a page.

    Attributes:
        name: of the parameter.
        kind: a flag, one of ``choices``, or text that is read as Python.
        value: a bool, one of the choices, or text.
        choices: of a choice, else empty.
        about: its lines of the method's documentation, or empty.
    """

    name: str
    kind: Kind
    value: Any
    choices: tuple[str, ...] = ()
    about: str = ""


def settle(subject: Subject, name: str, keep: float) -> str | None:
    """Parameters with which a method leaves about a share of the model's multiply-adds, such as ``"r=12"``.

    Args:
        subject: the model.
        name: of the method.
        keep: the share, in (0, 1].

    Returns:
        The parameters as text; None where no single number decides how much the method removes, or where that cannot
        be told without running it.
    """
    try:
        parameter, share = arms.knob(name)
    except ValueError:
        return None
    full = arms.unpatched(subject.model, subject.shape)
    top = STEPS if share else max(2, full.tokens_in // 2)
    allowed = [step for step in range(top + 1) if _allowed(name, parameter, _value(step, share))]
    if not allowed:
        return None

    def build(step: int) -> Arm:
        return arms.arm(subject.model, subject.shape, name, **{parameter: _value(step, share)})

    low, high = allowed[0], allowed[-1]
    if build(low).macs == build(high).macs:
        return None
    return arms.nearest(build, low, high, int(keep * full.macs)).setting


def _value(step: int, share: bool) -> float:
    return step / STEPS if share else step


def _allowed(name: str, parameter: str, value: float) -> bool:
    try:
        api.make(name, **{parameter: value})
    except (ValueError, TypeError):
        return False
    return True


def usual(name: str, depth: int) -> str:
    """Parameters for a method whose amount is no single number: none, or its example where it removes nothing then."""
    cls = registered.get(name)
    try:
        acts = api.make(name).removes(depth)
    except (ValueError, TypeError):
        acts = False
    return "" if acts else typed(dict(cls.example))


def setting(name: str, parameters: str) -> str:
    """A method and the parameters that were typed for it, as one setting.

    Raises:
        ValueError: the text names a method, or is not ``key=value``.
    """
    words = parameters.split()
    if words and words[0] == name:  # the whole setting was typed
        words = words[1:]
    elif words and "=" not in words[0]:
        raise ValueError(
            f"parameters are key=value, such as r=13, got {words[0]!r}; the method is chosen above, and is {name}"
        )
    found = " ".join([name, *words])
    parse_setting(found)
    return found


def controls(text: str) -> list[Control]:
    """The parameters of a setting as controls, with the values that the setting has.

    Raises:
        UnknownMethodError, TypeError, ValueError: the setting is wrong.
    """
    name, parameters = parse_setting(text)
    method = api.make(name, **parameters)
    cls = type(method)
    hints, about = typing.get_type_hints(cls), _documented(cls)
    found = []
    for one in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not one.init:
            continue
        value, hint = parameters.get(one.name, getattr(method, one.name)), hints[one.name]
        said = about.get(one.name, "")
        if hint is bool:
            found.append(Control(one.name, "flag", bool(value), (), said))
        elif typing.get_origin(hint) is Literal and all(isinstance(v, str) for v in typing.get_args(hint)):
            found.append(Control(one.name, "choice", value, typing.get_args(hint), said))
        else:
            found.append(Control(one.name, "text", _text(value), (), said))
    return found


def changed(text: str, parameter: str, value: Any) -> str:
    """The parameters of a setting after one of them was given another value; defaults are left out.

    Args:
        text: the whole setting.
        parameter: that changes.
        value: as a control gives it.

    Raises:
        UnknownMethodError, TypeError, ValueError: the setting is wrong, or would be.
    """
    name, parameters = parse_setting(text)
    wished = f"{name} {typed({**parameters, parameter: value})}"
    cls = type(api.make(name, **parse_setting(wished)[1]))
    usual_values = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kept = {key: v for key, v in parse_setting(wished)[1].items() if not _same(v, usual_values.get(key))}
    return typed(kept)


def _same(value: Any, default: Any) -> bool:
    # 1 and 1.0 are equal, but one is a count and the other a share.
    return type(value) is type(default) and bool(value == default)


def typed(parameters: dict[str, Any]) -> str:
    """Parameters as they are typed: ``"r=13 metric=k"``."""
    return " ".join(f"{key}={_text(value)}" for key, value in parameters.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else source(value)


def _documented(cls: type) -> dict[str, str]:
    """Lines about parameters from the documentation of a class and its bases, as plain text."""
    found: dict[str, str] = {}
    for one in cls.__mro__:
        text = inspect.getdoc(one) or ""
        part = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE)
        for name, about in re.findall(r"^    (\w+): ((?:.+)(?:\n        .+)*)", part[1] if part else "", re.MULTILINE):
            plain = re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", lambda m: m[1] or m[2], " ".join(about.split()))
            found.setdefault(name, plain)
    return found
