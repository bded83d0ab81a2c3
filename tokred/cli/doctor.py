"""``tokred doctor``: whether tokred works with what is installed here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from tokred.doctor import Row
    from tokred.doctor.installed import Library

WIDE = 60  # columns that tables fit into
NAMED = 5  # families that are named for one reason
KINDS = {
    "encoder": "encoders",
    "kv": "caches of language models",
    "vlm": "models with vision",
    "moe": "mixtures of experts",
    "diffusion": "denoisers",
}
HEADS = {
    "nothing": "same",
    "fewer": "fewer",
    "dropped": "drop",
    "merged": "merge",
    "cropped": "crop",
    "removed": "undo",
}


def doctor_command(
    only: Annotated[
        str | None,
        typer.Option(
            help="Libraries or wings, with commas: timm, open_clip, transformers, diffusers, encoder, kv, ..."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="A pattern such as tome or '*': these methods, each on one model, plug-ins included."),
    ] = None,
    versions: Annotated[bool, typer.Option("--versions", help="What is installed alone, no laws.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for a report of an issue.")] = False,
) -> None:
    """Say whether tokred works here: what is installed and was tested, and the laws on a tiny model of every family.

    The models are random and made on the spot; nothing is downloaded. Takes a minute or two. The exit status is 1 where
    a law is broken, and the last lines say which.

    \b
    Examples:
      tokred doctor
      tokred doctor --versions
      tokred doctor --only timm,transformers
      tokred doctor --only kv
      tokred doctor --methods '*'
      tokred doctor --json > doctor.json
    """
    from tokred import doctor
    from tokred.cli.console import refusing

    wanted = [name.strip() for name in (only or "").split(",") if name.strip()]
    with refusing():
        if only is not None and not wanted:
            raise ValueError(f"--only names nothing; there are {', '.join(doctor.names())}")
        chosen = [] if versions else doctor.choose(wanted, methods or "")
    if not as_json:
        show_installed()
    started = time.monotonic()
    with steps(len(chosen)) as tick:
        rows = doctor.examine(chosen, tick)
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps(doctor.document(rows, seconds), indent=2))
    elif not versions:
        show_laws(rows, doctor.missing(wanted))
        for line in summary(rows, seconds):
            say(line)
    if any(not row.healthy for row in rows) or gone():
        raise typer.Exit(1)


@contextlib.contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; where there is none, a line now and then."""
    from tokred.cli.console import err, progress

    if err.is_terminal and total:
        with progress(total, "examining") as move:
            yield lambda name: move()
        return
    done, said = 0, time.monotonic()

    def say(name: str) -> None:
        nonlocal done, said
        done += 1
        if done == total or time.monotonic() - said >= 5:
            said = time.monotonic()
            print(f"{done} of {total} families, last {name}", file=sys.stderr, flush=True)

    yield say


def table(title: str, *columns: str) -> Table:
    """A table that fits into 60 columns; the first column folds."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, overflow="fold", no_wrap=i > 0)
    return made


def width() -> int:
    """Columns of a terminal; elsewhere 60, or as many as the environment says."""
    from tokred.cli.console import out

    return out.width if out.is_terminal or "COLUMNS" in os.environ else WIDE


def show(made: Table) -> None:
    """A table, on as many columns as there are."""
    from tokred.cli.console import out

    out.print(made, width=width())


def say(text: str) -> None:
    """A sentence, on as many columns as there are."""
    print("\n".join(textwrap.wrap(text, width(), subsequent_indent="  ", break_on_hyphens=False)) or text)


def show_installed() -> None:
    """Versions, devices and operators."""
    from tokred import __version__
    from tokred.core import environment
    from tokred.doctor import installed

    about = installed.machine()
    commit = environment.commit()
    say(f"tokred {__version__}{f' ({commit})' if commit else ''}")
    say(f"Python {about['python']}, {about['system']}")
    made = table("Libraries", "library", "installed", "tested", "")
    made.columns[0].no_wrap = True
    for row in installed.libraries():
        made.add_row(row.name, row.installed or "no", f"{row.floor} to {row.newest}", _standing(row))
    show(made)
    for row in installed.libraries():
        if row.standing == "missing":
            say(f"{row.name} is not installed: {row.hint}")
    print()
    say(f"cpu: {about['cpu']}, {about['threads']} threads")
    for line in about["devices"]:
        say(line.replace(" ", ": ", 1))
    _show_operators()
    lost = gone()
    say(f"names of hosts that tokred counts on: {len(lost)} missing" if lost else "names of hosts: all there")
    for line in lost:
        say(f"  {line}")


def gone() -> list[str]:
    """Names of hosts that are not there any more, in words."""
    from tokred.adapters import contract

    return [f"{row.library} {row.version}: {row.role} ({row.spelling})" for row in contract.kept() if not row.found]


def _standing(row: Library) -> str:
    return f"{row.standing} than tested" if row.standing in ("older", "newer") else ""


def _show_operators() -> None:
    """Operators by their path, one line for each device and path."""
    from tokred.doctor import installed

    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in installed.operators():
        groups.setdefault((row.device, row.path, row.reason), []).append(row.name)
    for (device, path, reason), names in groups.items():
        say(f"operators on {device}: {path or 'none'} for {', '.join(names)}{f' ({reason})' if reason else ''}")


def show_laws(rows: Sequence[Row], missing: Sequence[str]) -> None:
    """A table for each kind of model of each library: a row a family, a column a law."""
    from tokred.doctor.installed import Library
    from tokred.doctor.laws import LAWS

    for part in dict.fromkeys((row.library, row.wing) for row in rows):
        made = table(f"\n{part[0]}, {KINDS[part[1]]}", "family", *(HEADS[law] for law in LAWS))
        for row in rows:
            if (row.library, row.wing) == part:
                made.add_row(row.family, *(_mark(row, law) for law in LAWS))
        show(made)
    for row in rows:
        if row.skipped:
            say(f"{row.library} {row.family}: not asked: {row.skipped}")
    for library in missing:
        print()
        say(f"{library}: not installed: {Library(library, '', '', '', 'missing').hint}")
    print("\nok: the law holds; NO: it does not; nothing: not asked here\n")
    for law, text in LAWS.items():
        say(f"{HEADS[law]}: {text}")


def _mark(row: Row, law: str) -> str:
    if row.error:
        return "[red]-[/]"
    if law not in row.broken:
        return ""
    return "[red]NO[/]" if row.broken[law] else "[green]ok[/]"


def summary(rows: Sequence[Row], seconds: float) -> list[str]:
    """The broken laws, one line for each reason, and a last line with the verdict."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for law, why in row.complaints:
            reasons.setdefault(why, {}).setdefault(f"{row.library}/{row.wing} {row.family}", []).append(law)
    lines = []
    for why, families in reasons.items():
        named = [f"{family} ({', '.join(laws)})" for family, laws in list(families.items())[:NAMED]]
        more = len(families) - len(named)
        lines.append(f"{', '.join(named)}{f' and {more} more' if more else ''}: {why}")
    asked = [row for row in rows if not row.skipped]
    broken, laws = sum(not row.healthy for row in asked), sum(len(row.broken) for row in asked)
    if not asked:
        verdict = "no family was examined"
    elif broken:
        verdict = f"{broken} of {len(asked)} families are broken: give `tokred doctor --json` with an issue"
    else:
        verdict = f"all {laws} laws hold on {len(asked)} families"
    return ["", *lines, f"{verdict} ({seconds:.0f} s)"]
