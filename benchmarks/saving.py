"""Options of every benchmark for the file that its rows go to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokred.bench import results


def saving(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--out`` and ``--overwrite``."""
    parser.add_argument("--out", type=Path, required=required, help="table of results; rows are added as they come")
    parser.add_argument("--overwrite", action="store_true", help="replace rows of the same settings in that table")


def save(records: Iterable[Mapping[str, Any]], scenario: str, options: argparse.Namespace) -> None:
    """Add records to the table that the options name, if they name one.

    Where rows are there already and it was not asked to overwrite them, this and what follows goes into a new file
    beside it, so that nothing that was measured is lost.
    """
    if options.out is None:
        return
    found = list(records)
    try:
        results.write(options.out, found, scenario, overwrite=options.overwrite)
    except ValueError as error:
        options.out = results.free(options.out.parent, [options.out.name])[options.out.name]
        print(f"{error} (--overwrite). They go into {options.out}", file=sys.stderr, flush=True)
        results.write(options.out, found, scenario)
