"""Files that a run leaves behind: never over an older one unless told to."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def free(folder: Path, names: Sequence[str], *, force: bool = False) -> dict[str, Path]:
    """Paths for a set of files that belong together, numbered alike so that none of them exists yet.

    Args:
        folder: made if it is not there.
        names: such as ``["demo.csv", "demo.png"]``; a second run gets ``demo-2.csv`` and ``demo-2.png``.
        force: the plain names, even if they exist.

    Returns:
        From each name to its path.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        tail = "" if number == 1 else f"-{number}"
        paths = {n: folder / f"{Path(n).stem}{tail}{Path(n).suffix}" for n in names}
        if force or not any(p.exists() for p in paths.values()):
            return paths
        number += 1


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(c for row in rows for c in row))


def same_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a CSV file that these rows can be added to."""
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf8") as f:
        return next(csv.reader(f), []) == _columns(rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> Path:
    """Write rows as CSV; with ``append``, behind those that are there.

    Raises:
        ValueError: the file to append to has other columns, or is not there.
    """
    if append and not same_columns(path, rows):
        raise ValueError(f"{path} is no CSV file with these columns: {', '.join(_columns(rows))}")
    with path.open("a" if append else "w", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, _columns(rows), restval="")
        if not append:
            writer.writeheader()
        writer.writerows({k: _plain(v) for k, v in row.items()} for row in rows)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that :func:`write_rows` wrote, numbers as numbers, empty fields left out; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf8") as f:
        return [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(f)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _plain(value: Any) -> Any:
    """Numbers to six significant digits; None as an empty field."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
