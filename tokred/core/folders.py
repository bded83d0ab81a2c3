"""Folders that results are to be written into: asked for before the work that leads to the results begins."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be written, or made. Leaves nothing behind, and makes nothing.

    Args:
        folder: need not be there; then the nearest one above it is asked.

    Raises:
        OSError: of the class that writing fails by, with the folder and the reason in one line.
    """
    wanted = Path(folder)
    there = wanted.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"nothing can be written into {wanted}: {there} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"nothing can be written into {wanted}: {there} refuses files ({reason})") from error


def check_file(file: str | Path) -> None:
    """Refuse a file that cannot be written, because it is a folder or its folder takes none, as :func:`check_folder`.

    Raises:
        OSError: with the reason.
    """
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder: a file's name is wanted")
    check_folder(Path(file).parent)
    if Path(file).exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"{file} is there and cannot be written")
