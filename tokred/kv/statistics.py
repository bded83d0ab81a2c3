"""Files of what was measured of a model once, for policies that need it: safetensors, with what the model was."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokred.core.folders import check_file
from tokred.core.learned import Facts
from tokred.core.versions import TOKRED

FORMAT = 1
_HEADER = "tokred"


def file_name(given: Any, what: str) -> str:
    """The name of a file as text.

    Raises:
        TypeError: it is neither text nor a path.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{what} must be the name of a file, got {given!r}")
    return str(os.fspath(given))


class Statistics(NamedTuple):
    """Numbers that were measured of a model.

    Attributes:
        kind: what of, such as ``"queries"``.
        facts: of the model.
        tensors: by name.
        about: plain values: how, and on what.
    """

    kind: str
    facts: Facts
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a file; an older one stays until this one is complete.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        save_file, target = _safetensors().save_file, Path(path)
        known = {
            "format": FORMAT,
            "tokred": TOKRED,
            "kind": self.kind,
            "host": self.facts.to_dict(),
            "about": self.about,
        }
        check_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            plain = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
            save_file(plain, str(beside), metadata={_HEADER: json.dumps(known)})
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        return target


def read(path: str | Path, kind: str, command: str) -> Statistics:
    """The statistics of a file, kept for as long as it does not change.

    Args:
        path: of the file.
        kind: of the statistics that are wanted.
        command: that makes such a file, for messages.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else, or is of a newer tokred.
        ImportError: safetensors is not installed.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} with statistics of a model; make one with: {command}")
    state = target.stat()
    found = _read(str(target), state.st_mtime_ns, state.st_size)
    if found.kind != kind:
        raise ValueError(f"{path} holds statistics of {found.kind}, not of {kind}; make such a file with: {command}")
    return found


@functools.lru_cache(maxsize=16)
def _read(path: str, time: int, size: int) -> Statistics:
    """Statistics of a file as it was at some ``time``."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            number, kind, facts, about = header["format"], header["kind"], Facts(**header["host"]), header["about"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except Exception as error:  # safetensors' own errors derive from Exception alone
        raise ValueError(f"{path} holds no statistics of tokred: {type(error).__name__}: {error}") from None
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(f"{path} has format {number!r}; this tokred reads formats up to {FORMAT}: update it")
    return Statistics(str(kind), facts, tensors, dict(about))


def check_model(path: str | Path, made: Facts, model: Facts) -> None:
    """Refuse statistics of another model.

    Raises:
        ValueError: with what they were made on, and what this is.
    """
    differing: Mapping[str, tuple[Any, Any]] = {
        name: (a, b)
        for name, a, b in (
            ("query heads", made.heads, model.heads),
            ("key/value heads", made.key_heads, model.key_heads),
        )
        if a != b
    }
    if made.fits(model) and not differing:
        return
    more = "".join(f", {a} {name} (not {b})" for name, (a, b) in differing.items())
    raise ValueError(f"the statistics in {path} were made on {made}{more}, but this model is {model}")


def _safetensors() -> Any:
    try:
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "statistics are kept by safetensors, which is not installed: pip install safetensors"
        ) from error
    return _Library


class _Library:
    """Names of safetensors that are needed, which stand in two of its modules."""

    @staticmethod
    def save_file(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        importlib.import_module("safetensors.torch").save_file(tensors, path, metadata=metadata)

    @staticmethod
    def safe_open(path: str, framework: str) -> Any:
        return importlib.import_module("safetensors").safe_open(path, framework=framework)
