"""The console: what the commands share to print, to refuse bad input and to show progress."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tokred.errors import TokredError

try:
    import typer
    from rich.console import Console
except ImportError as error:  # a script's entry point has no better place to say this
    raise SystemExit(f"tokred's command line needs {error.name}: pip install 'tokred[cli]'") from error


# A pipe has no width of its own: wide enough for every table.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)

err = Console(stderr=True)
INTERRUPTED = 130  # the exit status of what Ctrl-C ended
EVERY = 5.0  # seconds between two lines of progress where there is no terminal


def columns(least: int, most: int) -> int:
    """Columns that a table may take: those of ``COLUMNS``, or else of the terminal, within bounds."""
    given = os.environ.get("COLUMNS", "")
    return max(least, min(int(given) if given.isdigit() else out.width, most))


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Say what is wrong with the input in one line, and leave with code 2."""
    from tokred.bench.sources import NoModelError

    known = (TokredError, NoModelError, ValueError, TypeError, OSError, ImportError)
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        # Of an error of the user's model the benchmark notes where it came up; others are tokred's own mistakes.
        if os.environ.get("TOKRED_DEBUG") == "1" or not (isinstance(error, known) or notes):
            raise
        name = "" if isinstance(error, known) else f"{type(error).__name__}: "
        text = "; ".join([f"{name}{error}" if str(error) else type(error).__name__, *notes])
        print(f"tokred: {' '.join(text.split())}", file=sys.stderr)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def progress(total: int, text: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, elsewhere a line now and then; the function that it hands out moves it on by one."""
    if not err.is_terminal:
        yield _lines(total, text)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def _lines(total: int, text: str) -> Callable[[], None]:
    """A function that says how far things are: at once, then every few seconds, and at the end."""
    started = said = time.monotonic()
    done = 0

    def move() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if done in (1, total) or now - said >= EVERY:
            said = now
            print(f"{text}: {done} of {total} ({now - started:.0f} s)", file=sys.stderr, flush=True)

    return move


def set_threads(threads: int | None) -> None:
    """Threads of torch on the CPU."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def written(paths: Sequence[Path]) -> None:
    print(f"Written to {paths[0].parent.resolve()}: {', '.join(p.name for p in paths)}")
