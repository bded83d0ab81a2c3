"""Fingerprints of code that a user gives (metrics, runs, methods), so that rows of what it was before are told apart.

Code of tokred is known by its name, that of installed packages by name and version, and all other code by what it does:
its instructions and constants, its defaults, what it closes over, and what it names outside of itself.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
WHOLE = 2**24  # bytes of a tensor that are all looked at; of larger ones some values
INSTALLED = tuple(
    str(Path(path).resolve())
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def code_of(*found: Any) -> str:
    """Letters that change with the code of functions, classes or objects.

    Empty: all of it is tokred's. What cannot be read, such as an open file that a function closes over, is another one
    each time: what was measured by it is measured again.
    """
    reader = _Reader()
    try:
        for x in found:
            reader.read(x)
    except Exception:  # whatever an object's own reduction fails by
        return "x" + os.urandom(8).hex()
    return reader.letters if reader.foreign else ""


def named(function: Any) -> str:
    """Name of a function or of an object that is called, and its code."""
    return f"{getattr(function, '__qualname__', type(function).__name__)} {code_of(function)}"


def model_of(modules: Iterable[nn.Module]) -> str:
    """Text that changes with the structure of modules, as they print themselves, and the code of their classes.

    Of their attributes fractions count, such as the scale of an attention; whole numbers may be a cache's size.
    """
    held = list(modules)
    parts = [part for one in held for part in one.modules()]
    shown = [ADDRESS.sub("", repr(one)) for one in held]
    shown += [f"{name}={value}" for part in parts for name, value in vars(part).items() if type(value) is float]
    letters = hashlib.sha256("\n".join(shown).encode("utf8", "backslashreplace")).hexdigest()[:16]
    return f"{letters} {code_of(*dict.fromkeys(map(type, parts)))}"


def _home(name: str, file: str | None) -> str:
    """Whose code a module holds: ``"tokred"``, ``"installed"``, or ``"own"``."""
    if name.partition(".")[0] == "tokred":
        return "tokred"
    if file is None:
        return "installed" if name.partition(".")[0] in sys.stdlib_module_names else "own"
    if file.startswith("<frozen"):
        return "installed"
    path = os.path.realpath(file)
    inside = path.startswith(INSTALLED) or "site-packages" in path or "dist-packages" in path
    return "installed" if inside else "own"


def _version(name: str) -> str:
    return str(getattr(sys.modules.get(name.partition(".")[0]), "__version__", ""))


def _names(code: CodeType) -> Iterator[str]:
    """Names outside of a function that it and those inside of it use."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


class _Reader:
    """Reads objects into one digest.

    Attributes:
        foreign: True as soon as something is not tokred's.
    """

    def __init__(self) -> None:
        self.foreign = False
        self._digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an object that is gone would leave its id to another

    @property
    def letters(self) -> str:
        return "x" + self._digest.hexdigest()[:16]

    def _say(self, *texts: Any) -> None:
        self._digest.update(repr(texts).encode("utf8", "backslashreplace"))

    def read(self, x: Any) -> None:
        """Add an object, each once.

        Raises:
            Exception: it cannot be read.
        """
        if type(x) in PLAIN:
            self._say(type(x).__name__, x)
            return
        if id(x) in self._seen:
            self._say("again", self._seen[id(x)])
            return
        self._seen[id(x)] = len(self._seen)
        self._alive.append(x)
        if isinstance(x, FunctionType):
            self._function(x)
        elif isinstance(x, type):
            self._class(x)
        elif isinstance(x, ModuleType):
            self._module(x)
        elif isinstance(x, CodeType):
            self._code(x)
        elif isinstance(x, nn.Module):
            self._say("model", model_of([x]))
            self._all(x.state_dict())
        elif isinstance(x, Tensor):
            self._tensor(x)
        else:
            self._object(x)

    def _object(self, x: Any) -> None:
        kind = type(x)
        if kind in (tuple, list, dict):
            self._all(x)
        elif kind in (set, frozenset):
            self._say(kind.__name__, sorted(_letters(one) for one in x))
        elif kind is MethodType:
            self._all((x.__func__, x.__self__))
        elif kind is functools.partial:
            self._all((x.func, x.args, x.keywords))
        elif kind is property:
            self._all((x.fget, x.fset, x.fdel))
        elif kind is functools.cached_property:
            self.read(x.func)
        elif callable(x) and hasattr(x, "__wrapped__"):
            self.read(x.__wrapped__)
        elif hasattr(x, "__func__"):  # static and class methods
            self.read(x.__func__)
        else:
            self._reduced(x)

    def _all(self, found: Any) -> None:
        self._say(type(found).__name__, len(found))
        for one in found.items() if isinstance(found, dict) else found:
            if isinstance(found, dict):
                self.read(one[0])
                self.read(one[1])
            else:
                self.read(one)

    def _reduced(self, x: Any) -> None:
        """An object by what it would be pickled as."""
        own = copyreg.dispatch_table.get(type(x))
        found = x.__reduce_ex__(4) if own is None else own(x)
        self.read(type(x))
        if isinstance(found, str):
            self._say(found)
            return
        for part in found:
            self.read(list(part) if isinstance(part, Iterator) else part)

    def _tensor(self, x: Tensor) -> None:
        self._say("tensor", tuple(x.shape), str(x.dtype))
        flat = x.detach().reshape(-1)
        some = flat if x.nbytes <= WHOLE else flat[:: len(flat) // 2**16]
        self._digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _code(self, x: CodeType) -> None:
        self._say(x.co_code, x.co_names, x.co_varnames, x.co_freevars, x.co_flags)
        for one in x.co_consts:
            self.read(one)

    def _function(self, x: FunctionType) -> None:
        name = str(x.__globals__.get("__name__", ""))
        home = _home(name, x.__code__.co_filename)
        self.foreign |= home != "tokred"
        self._say("function", name, x.__qualname__, _version(name) if home == "installed" else "")
        if home == "own":
            self._code(x.__code__)
            self.read(x.__defaults__)
            self.read(x.__kwdefaults__)
            for used in dict.fromkeys(_names(x.__code__)):
                if used in x.__globals__:
                    self._say(used)
                    self.read(x.__globals__[used])
        # A decorator of whomever closes over what it decorates.
        for cell in x.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.read(inside)

    def _class(self, x: type) -> None:
        module = sys.modules.get(x.__module__)
        home = _home(x.__module__, getattr(module, "__file__", None))
        self.foreign |= home != "tokred"
        self._say("class", x.__module__, x.__qualname__, _version(x.__module__) if home == "installed" else "")
        if home != "own":
            return
        for name, value in vars(x).items():
            special = name.startswith("__") and not callable(value) and not hasattr(value, "__func__")
            if special or name in ("_abc_impl", "__annotate__", "__annotate_func__", "__weakref__"):
                continue
            if not isinstance(value, GetSetDescriptorType | MemberDescriptorType):
                self._say(name)
                self.read(value)
        for base in x.__bases__:
            self.read(base)

    def _module(self, x: ModuleType) -> None:
        file = getattr(x, "__file__", None)
        home = _home(x.__name__, file)
        self.foreign |= home != "tokred"
        self._say("module", x.__name__, _version(x.__name__) if home == "installed" else "")
        if home == "own" and file is not None:
            self._digest.update(Path(file).read_bytes())


def _letters(x: Any) -> str:
    reader = _Reader()
    reader.read(x)
    return reader.letters
