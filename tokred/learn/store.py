"""Settings, and what was learned for them, in a folder: ``tokred.json`` and, where need be, ``weights.safetensors``."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tokred.core.folders import check_folder
from tokred.core.learned import Facts, Weights
from tokred.core.method import Method, from_dict
from tokred.core.origin import Origin
from tokred.core.versions import TOKRED, release
from tokred.errors import SettingWarning, UnknownMethodError

SETTINGS, WEIGHTS = "tokred.json", "weights.safetensors"
FORMAT = 1


class Entry(NamedTuple):
    """One method, with its module and the model's facts where it has weights, and the place where it acted."""

    method: Method
    module: nn.Module | None = None
    facts: Facts | None = None
    origin: Origin | None = None


def write(folder: str | Path, entries: Sequence[Entry]) -> Path:
    """Write a folder; files of an earlier setting in it are replaced.

    Args:
        folder: made where it is not there.
        entries: one a method.

    Raises:
        ImportError: there are weights, and safetensors is not installed.
        OSError: the folder cannot be written.
    """
    path = Path(folder)
    tensors = {
        f"{one.method.name}.{name}": t.detach().cpu().contiguous().clone()
        for one in entries
        if one.module is not None
        for name, t in one.module.state_dict().items()
    }
    rows = [
        {
            **one.method.to_dict(),
            "host": None if one.facts is None else one.facts.to_dict(),
            "origin": None if one.origin is None else one.origin.to_dict(),
        }
        for one in entries
    ]
    found = {"format": FORMAT, "tokred": TOKRED, "methods": rows, "weights": WEIGHTS if tensors else None}
    text = json.dumps(found, indent=2) + "\n"
    save_file = _safetensors().save_file if tensors else None
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    if (path / SETTINGS).exists():  # else a file of this name is somebody else's
        (path / WEIGHTS).unlink(missing_ok=True)
    elif save_file is not None and (path / WEIGHTS).exists():
        raise FileExistsError(f"{path / WEIGHTS} is there, and of no setting of tokred: give another folder")
    if save_file is not None:
        save_file(tensors, str(path / WEIGHTS), metadata={"format": str(FORMAT)})
    (path / SETTINGS).write_text(text, "utf-8")
    return path


def read(folder: str | Path) -> list[Method]:
    """The methods of a folder, with their weights.

    Raises:
        FileNotFoundError: the folder holds no setting, or its weights are gone.
        ValueError: the file is broken, or was written by a newer tokred or for a newer version of a method.
        UnknownMethodError: a method is not known here.
        ImportError: there are weights, and safetensors is not installed.
    """
    path = Path(folder)
    if not (path / SETTINGS).exists():
        raise FileNotFoundError(f"{path} holds no {SETTINGS}: give a folder that tokred.save has written")
    try:
        found: dict[str, Any] = json.loads((path / SETTINGS).read_text("utf-8"))
        if isinstance(found, dict) and "method" in found:  # the dict of one method, as users wrote it themselves
            found = {"format": FORMAT, "methods": [found]}
        number, rows = found["format"], found["methods"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / SETTINGS} is not a setting of tokred: {error!r}") from None
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(
            f"{path / SETTINGS} has format {number!r}, written by tokred {found.get('tokred', '?')}; this is tokred "
            f"{TOKRED}, which reads formats up to {FORMAT}: update it"
        )
    tensors: dict[str, Any] = {}
    if found.get("weights"):
        if not (path / WEIGHTS).exists():
            raise FileNotFoundError(f"{path / SETTINGS} has weights, but {path / WEIGHTS} is not there")
        library = _safetensors()
        try:
            tensors = library.load_file(str(path / WEIGHTS))
        except Exception as error:  # safetensors' own errors derive from Exception alone
            raise ValueError(f"{path / WEIGHTS} holds no weights of a setting of tokred: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path / SETTINGS} is not a setting of tokred: its methods are {rows!r}")
    return methods_of(found, tensors, str(path / SETTINGS))


def methods_of(found: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> list[Method]:
    """The methods of what a ``tokred.json`` holds, with their weights among ``tensors``.

    Raises:
        ValueError, UnknownMethodError: as :func:`read`; the message names ``where``, and both versions of tokred.
    """
    version = str(found.get("tokred", TOKRED))
    if release(version) > release(TOKRED):
        text = f"{where} was written by tokred {version}, and this is the older {TOKRED}: update it if anything is odd"
        warnings.warn(text, SettingWarning, stacklevel=4)
    return [_method(row, tensors, where, version) for row in found["methods"]]


def _method(row: dict[str, Any], tensors: Mapping[str, Any], where: str, version: str) -> Method:
    try:
        method = from_dict(row)
        # The class is frozen, and where it was saved is no parameter of it.
        object.__setattr__(method, "origin", Origin.from_dict(row.get("origin") or {}, version))
        facts = None if row.get("host") is None else Facts(**row["host"])
    except UnknownMethodError as error:
        raise UnknownMethodError(f"{where}, written by tokred {version}; this is tokred {TOKRED}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}, written by tokred {version}, does not fit the {row.get('method')!r} of this tokred {TOKRED}: "
            f"{error}"
        ) from None
    start = f"{method.name}."
    own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if facts is None:
        return method
    # The class is frozen, and what was learned is no parameter of it.
    object.__setattr__(method, "loaded", Weights(own, facts))
    return method


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("weights are kept by safetensors, which is not installed: pip install safetensors") from error
