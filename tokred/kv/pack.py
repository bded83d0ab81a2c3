"""``Packing`` and ``Unpacking``: what a cache holds as plain values and a list of tensors, for a file, and back.

Knows no format of files. Rows stay in the form in which a store holds them: codes are written as codes. Named tuples
and dataclasses are written field by field, or as their ``to_file()`` says; their class takes the fields, by
``from_file(**fields)`` where it has that. Objects of a class with ``of_empty = True`` belong to an empty cache, and are
not written.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.kv.stores.grown import Grown
from tokred.kv.stores.store import Shelf, Store


class Packing:
    """Tensors on their way into a file, each once, and the values around them.

    Attributes:
        tensors: on the CPU and contiguous, in the order in which they came.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._known: dict[Any, int] = {}
        self._held: list[Tensor] = []  # an address means one tensor only while that lives

    def packed(self, value: Any) -> Any:
        """``value`` as something that JSON holds, with numbers of tensors in it.

        Raises:
            TypeError: it is nothing that can be written, such as a function.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._number(value)}
        if isinstance(value, Grown):
            return {"grown": self.packed(value.rows)}  # room behind the rows belongs to memory, not to the cache
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": True}  # wherever the cache will be
        if isinstance(value, Store):
            return {"store": True}  # the policy has it
        if getattr(type(value), "of_empty", False):
            return {"given": True}
        if isinstance(value, Shelf):
            return {"shelf": self._named(value.snapshot())}
        if hasattr(value, "to_file"):
            return {"made": _name_of(value), "of": self._named(value.to_file())}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {"made": _name_of(value), "of": self._named(fields)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            names: tuple[str, ...] = value._fields
            return {"made": _name_of(value), "of": self._named(dict(zip(names, value, strict=True)))}
        if isinstance(value, dict):
            keys = [self.packed(k) for k in value]
            return {"dict": [list(pair) for pair in zip(keys, self._named(value).values(), strict=True)]}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.packed(x) for x in value]}
        raise TypeError(f"a {type(value).__name__} cannot be written to a file")

    def _named(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        found = {}
        for name, value in values.items():
            try:
                found[name] = self.packed(value)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        return found

    def _number(self, value: Tensor) -> int:
        x = value.detach()
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device) if x.numel() else id(value)
        if key not in self._known:
            self._known[key] = len(self.tensors)
            self._held.append(value)
            copy = x.cpu().contiguous()
            self.tensors.append(copy.clone() if copy.untyped_storage().nbytes() != copy.nbytes else copy)
        return self._known[key]


class Unpacking:
    """Values on their way out of a file.

    Args:
        tensors: in their order, on any device.
        device: where they are wanted.
        store: of the policy, which values may refer to.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, store: Store | None = None) -> None:
        self.tensors = tensors
        self.device = device
        self.store = store

    def unpacked(self, data: Any, given: Any = None) -> Any:
        """The value that :meth:`Packing.packed` wrote down.

        Args:
            data: as it was written.
            given: what stands in the same place of an empty cache; shelves, and what they have in common, are taken
                from there.

        Raises:
            ValueError: the data is no such thing, or does not fit what is ``given``.
        """
        if not isinstance(data, dict):
            if data is None or isinstance(data, bool | int | float | str):
                return data
            raise ValueError(f"{data!r} is no value of a cache")
        kind = str(next(iter(data), None))
        inner: Any = data.get(kind)
        if kind in ("store", "given", "shelf"):
            return self._of_empty(kind, inner, given)
        if kind == "tensor":
            return self.tensors[inner].to(self.device)
        if kind == "grown":
            return Grown.of(self.unpacked(inner))
        if kind == "dtype" and isinstance(getattr(torch, inner, None), torch.dtype):
            return getattr(torch, inner)
        if kind == "device":
            return self.device
        if kind == "made":
            cls: Any = _class_of(inner)
            return getattr(cls, "from_file", cls)(**self._fields(data["of"], {}))
        if kind == "dict":
            pairs = [(self.unpacked(k), v) for k, v in inner]
            return {k: self.unpacked(v, _at(given, k)) for k, v in pairs}
        if kind in ("tuple", "list"):
            values = [self.unpacked(v, _at(given, i)) for i, v in enumerate(inner)]
            return tuple(values) if kind == "tuple" else values
        raise ValueError(f"{kind!r} is no kind of value that a cache holds here")

    def _of_empty(self, kind: str, inner: Any, given: Any) -> Any:
        """A part of the empty cache, with the rows that it is to hold."""
        found: Any = self.store if kind == "store" else given
        if found is None or (kind == "shelf" and not isinstance(found, Shelf)):
            raise ValueError(f"the file refers to a {kind} that an empty cache does not have")
        if kind == "shelf":
            found.restore(self._fields(inner, found.snapshot()))
        return found

    def _fields(self, data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.unpacked(value, given.get(name)) for name, value in data.items()}


def _at(given: Any, index: Any) -> Any:
    try:
        return given[index] if isinstance(given, dict | list | tuple) else None
    except (KeyError, IndexError, TypeError):
        return None


def _name_of(value: Any) -> str:
    cls = type(value)
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_of(name: str) -> type:
    """A class of records that a file names: of tokred, or of a module that has been imported already.

    A file never has modules imported that are not tokred's, nor anything made but named tuples and dataclasses.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    if found is None and module.startswith("tokred."):
        found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not (dataclasses.is_dataclass(found) or _is_record(found)):
        raise ValueError(f"it holds a {name}, which is not known here")
    return found


def _is_record(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")
