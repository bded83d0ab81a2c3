"""Options of every benchmark: the file that its rows go to, and names out of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokred.bench import results


def saving(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--out`` and ``--overwrite``."""
    parser.add_argument("--out", type=Path, required=required, help="table of results; rows are added as they come")
    parser.add_argument("--overwrite", action="store_true", help="replace rows of the same settings in that table")


def known(parser: argparse.ArgumentParser, what: str, names: Iterable[str], among: Collection[str]) -> None:
    """End with an error that says what there is, where an option names something else."""
    unknown = [name for name in names if name not in among]
    if unknown:
        parser.error(f"unknown {what}: {', '.join(unknown)}; known are {', '.join(among)}")


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
