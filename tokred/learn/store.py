"""Settings, and what was learned for them, in a folder: ``tokred.json`` and, where need be, ``weights.safetensors``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tokred.core.learned import Facts, Weights
from tokred.core.method import Method, from_dict

SETTINGS, WEIGHTS = "tokred.json", "weights.safetensors"
FORMAT = 1


class Entry(NamedTuple):
    """One method of a patched model, with its module and the model's facts where it has weights."""

    method: Method
    module: nn.Module | None = None
    facts: Facts | None = None


def write(folder: str | Path, entries: Sequence[Entry], version: str) -> Path:
    """Write a folder; files of an earlier setting in it are replaced.

    Args:
        folder: made where it is not there.
        entries: one a method.
        version: of tokred, for the record.

    Raises:
        ImportError: there are weights, and safetensors is not installed.
    """
    path = Path(folder)
    tensors = {
        f"{one.method.name}.{name}": t.detach().cpu().contiguous().clone()
        for one in entries
        if one.module is not None
        for name, t in one.module.state_dict().items()
    }
    rows = [{**one.method.to_dict(), "host": None if one.facts is None else one.facts.to_dict()} for one in entries]
    found = {"format": FORMAT, "tokred": version, "methods": rows, "weights": WEIGHTS if tensors else None}
    text = json.dumps(found, indent=2) + "\n"
    save_file = _safetensors().save_file if tensors else None
    path.mkdir(parents=True, exist_ok=True)
    (path / WEIGHTS).unlink(missing_ok=True)
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
        number, rows = found["format"], found["methods"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / SETTINGS} is not a setting of tokred: {error!r}") from None
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(
            f"{path / SETTINGS} has format {number!r}, written by tokred {found.get('tokred', '?')}; this tokred reads "
            f"formats up to {FORMAT}: update it"
        )
    tensors: dict[str, Any] = {}
    if found.get("weights"):
        if not (path / WEIGHTS).exists():
            raise FileNotFoundError(f"{path / SETTINGS} has weights, but {path / WEIGHTS} is not there")
        tensors = _safetensors().load_file(str(path / WEIGHTS))
    return [_method(row, tensors, path) for row in rows]


def _method(row: dict[str, Any], tensors: dict[str, Any], path: Path) -> Method:
    try:
        method = from_dict(row)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / SETTINGS} does not fit this tokred's {row.get('method')!r}: {error}") from None
    start = f"{method.name}."
    own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if row.get("host") is None:
        return method
    # The class is frozen, and what was learned is no parameter of it.
    object.__setattr__(method, "loaded", Weights(own, Facts(**row["host"])))
    return method


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("weights are kept by safetensors, which is not installed: pip install safetensors") from error
