"""Rows of data from files and from Hugging Face's ``datasets``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("test", "validation", "train")  # the first that is there


class Rows(NamedTuple):
    """Rows of a table, read when they are asked for.

    Attributes:
        rows: a mapping each.
        columns: their names.
        name: of the table.
        folder: that paths in it are relative to, or None.
        classes: names of the classes, by columns that have some.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    name: str
    folder: Path | None = None
    classes: Mapping[str, tuple[str, ...]] = {}

    def column(self, wanted: Sequence[str], what: str) -> str:
        """The first of some names that is a column.

        Raises:
            ValueError: none is.
        """
        found = next((name for name in wanted if name in self.columns), None)
        if found is None:
            raise ValueError(
                f"{self.name} has no column for the {what} ({', '.join(wanted)}); it has {', '.join(self.columns)}"
            )
        return found

    def has(self, wanted: Sequence[str]) -> str | None:
        """The first of some names that is a column, or None."""
        return next((name for name in wanted if name in self.columns), None)


def is_table(spec: str) -> bool:
    """True if :func:`rows` reads it."""
    return spec.startswith("hfds:") or Path(spec).suffix.lower() in FILES


def rows(spec: str) -> Rows:
    """Rows of a file (JSON lines, a JSON list, CSV, parquet), or of ``hfds:NAME[:CONFIG][:SPLIT]``.

    Args:
        spec: where they are. ``hfds:`` takes names of the hub, local folders and files. The split is ``test``, or else
            ``validation``, or else ``train``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no row.
        ImportError: ``datasets`` is not installed.
    """
    if spec.startswith("hfds:"):
        found = _hub(spec.removeprefix("hfds:"))
    else:
        path = Path(spec)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
        if path.suffix.lower() == ".parquet":
            found = _hub(spec)
        else:
            try:
                read = _csv(path) if path.suffix.lower() == ".csv" else _json(path)
            except (ValueError, UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            found = Rows(read, tuple(read[0]) if read else (), path.name, path.parent)
    if not len(found.rows):
        raise ValueError(f"{spec} holds no row")
    return found


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def _json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf8")
    if text.lstrip().startswith("["):
        read = json.loads(text)
    else:
        read = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in read):
        raise ValueError("every row has to be a JSON object")
    return list(read)


def _hub(rest: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hfds:{rest} needs datasets: pip install 'tokred[eval]'") from error
    name, *more = rest.split(":")
    config = more[0] if len(more) > 1 else None
    split = more[-1] if more else None
    path = Path(name)
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            kind = {".jsonl": "json"}.get(path.suffix.lower(), path.suffix.lower().lstrip("."))
            found = datasets.load_dataset(kind, data_files=str(path))
        else:
            found = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"hfds:{name} cannot be had: {why}") from error
    if split is None:
        split = next((s for s in SPLITS if s in found), next(iter(found)))
    if split not in found:
        raise ValueError(f"hfds:{name} has no split {split!r}; it has {', '.join(found)}")
    part = found[split]
    classes = {k: tuple(f.names) for k, f in part.features.items() if hasattr(f, "names")}
    return Rows(
        part, tuple(part.column_names), f"{path.name or name} ({split})", path if path.is_dir() else None, classes
    )
