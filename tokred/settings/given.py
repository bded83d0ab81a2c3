"""Methods as users give them: a name, a setting as text, a class, an object, a dict, a folder, or a list of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokred.core.method import Method
from tokred.core.names import MethodName
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting, split_settings
from tokred.patch import compose
from tokred.settings import share

OneMethod = MethodName | str | type[Method] | Method
Setting = OneMethod | Mapping[str, Any] | Path
MethodLike = Setting | Sequence[Setting]


def _makes_methods(cls: Any) -> bool:
    """True of a class of methods."""
    return isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)


def make(method: OneMethod, **parameters: Any) -> Method:
    """The method object of a name, or of a class of methods, and its parameters.

    Args:
        method: a registered name, also as papers write it (``"ToMe"``); a class such as :class:`tokred.ToMe`; or an
            object, which comes back as it is.
        parameters: of the method.

    Raises:
        UnknownMethodError: no method has this name; the message has the nearest ones.
        TypeError: a parameter that the method does not have; the message has those that it has.
    """
    if isinstance(method, Method):
        if parameters:
            raise TypeError(
                f"{type(method).__name__} already has its parameters; {', '.join(parameters)} cannot be given beside it"
            )
        return method
    # Whatever users give: the annotation is no promise.
    cls = cast(Any, registered.get(method) if isinstance(method, str) else method)
    if not _makes_methods(cls):
        raise TypeError(f"a method is a name, a class of methods or a Method object, got {method!r}")
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    unknown = [p for p in parameters if p not in known]
    if unknown:
        why = "".join(f"; {cls.name!r} has {cls.lacks[p]}" for p in unknown if p in cls.lacks)
        raise TypeError(
            f"{cls.name!r} has no parameter {', '.join(map(repr, unknown))}; it has {', '.join(known)}{why}"
        )
    made: Method = cls(**parameters)
    return made


def typed(text: str) -> list[Method]:
    """The methods of a setting as text: ``"tome r=13"``, several that act together with ``" + "`` between them.

    Raises:
        ValueError: a part is not ``name key=value``.
        UnknownMethodError, TypeError: as :func:`make`.
    """
    return [make(name, **parameters) for name, parameters in map(parse_setting, split_settings(text))]


def _made(setting: Setting, parameters: dict[str, Any]) -> list[Method]:
    """The methods of one setting: several, where a saved one holds so many."""
    as_folder = isinstance(setting, str) and setting not in registered and Path(setting).is_dir()
    if isinstance(setting, Mapping | Path) or as_folder:
        if parameters:
            raise TypeError(f"the setting has its parameters; {', '.join(parameters)} cannot be given beside it")
        assert not isinstance(setting, type | Method)
        return share.given(setting)
    if isinstance(setting, str) and ("=" in setting or " + " in setting):
        if parameters:
            raise TypeError(f"{setting!r} has its parameters; {', '.join(parameters)} cannot be given beside it")
        return typed(setting)
    return [make(setting, **parameters)]


def several(method: MethodLike, parameters: dict[str, Any]) -> list[Method]:
    """The methods that a user gives to ``tokred.apply``, one a stage, in the order of the stages.

    Args:
        method: a name, a setting as text (``"tome r=13"``, several with ``" + "`` between them), a class, an object, a
            dict, a folder, or a list of these.
        parameters: of the method, where it is a single name or class.

    Raises:
        TypeError, ValueError, UnknownMethodError, FileNotFoundError: it is none, or its parameters are wrong.
    """
    if isinstance(method, str | type | Method | Mapping | Path):
        made = _made(method, parameters)
    elif isinstance(method, Sequence):
        made = [one for m in method for one in _made(m, {})]
        if made and parameters:
            raise TypeError("parameters go with a single method's name; build the methods of a list as objects")
    else:
        raise TypeError(f"a method is a name, a class, an object, a dict, a folder, or a list of these, got {method!r}")
    for one in made:
        for member in one.members if one.origin is not None else ():
            object.__setattr__(member, "origin", one.origin)
    return compose([member for one in made for member in one.members])
