"""Reference pages that are written from the code: the classes of all methods, wing by wing, and the command line.

    python .ci/reference.py            # writes docs/reference/methods/*.md and docs/reference/command-line.md
    python .ci/reference.py --check    # fails where one is out of date

tokred has to be importable, with the command line's extra.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
WRITTEN = "<!-- Written by .ci/reference.py, and not by hand. -->"
WINGS = {
    "encoder": (
        "Methods for encoders",
        "They act at the stage `block`: in the blocks of encoders of images, sound and text.",
    ),
    "diffusion": (
        "Methods for denoisers",
        "They act at the stage `attention`: around a sub-layer, which gives all tokens back.",
    ),
    "vlm": (
        "Methods for vision-language models",
        "They act at the stage `projector`, before the language model, or at the stage `layer`, inside it.",
    ),
    "kv": (
        "Policies for caches",
        "They act at the stage `cache`: rows leave the keys and values of a language model.",
    ),
    "moe": (
        "Methods for mixtures of experts",
        "They act at the stage `experts`: between a router and its experts, which run on fewer tokens.",
    ),
}
ABOUT = "Every command with every option. What they are for: [the command line](../command-line.md)."
NO_VALUE = "-"
WIDTH = 84  # columns of code that a page shows without a scroll bar
# In our words: typer's change with its version.
COMPLETION = {
    "--install-completion": "Teach the shell to complete commands, models and methods.",
    "--show-completion": "Print what teaches the shell.",
}


def page_of(wing: str, name: str) -> str:
    """Where a method is explained, seen from its reference page."""
    if name != "kv" and (ROOT / "docs" / "methods" / wing / f"{name}.md").exists():
        return f"../../methods/{wing}/{name}.md"
    return f"../../methods/kv/kv.md#{name}" if wing == "kv" else "../../methods/vlm/random_visual.md"


def scores() -> Iterator[str]:
    """Paths of the scores that policies brought, which are names of ``tokred.kv`` too."""
    from tokred import kv

    for name in kv.__all__:
        owner = getattr(kv, name)
        if owner.__module__.startswith("tokred.methods."):
            yield f"{owner.__module__}.{name}"


def methods() -> dict[Path, str]:
    """The pages of the methods' classes."""
    from tokred.methods import TARGETS

    pages = {}
    for wing, (title, about) in WINGS.items():
        lines = [WRITTEN, f"# {title}", about]
        classes: dict[str, list[str]] = {}
        for name, target in TARGETS.items():
            if target.split(".")[2] == wing:
                classes.setdefault(target.partition(":")[2], []).append(name)
        for owner in sorted(classes, key=str.lower):
            links = ", ".join(f"[`{name}`]({page_of(wing, name)})" for name in classes[owner])
            lines.append(f"::: tokred.{owner}\n    options: {{members: false, heading_level: 2}}")
            lines.append(f"By name: {links}, whose page says when it fails.")
        if wing == "kv":
            lines += ["## Scores", "Parts of policies, for policies of one's own; names of `tokred.kv` as well."]
            lines += [f"::: {path}\n    options: {{members: false}}" for path in sorted(scores())]
        pages[FOLDER / "methods" / f"{wing}.md"] = "\n\n".join(lines) + "\n"
    return pages


def plain(text: str) -> str:
    """A cell of a table: one line, whose bars do not end the cell."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def value_of(parameter: Any, annotation: Any) -> str:
    """The word for an option's value; empty for flags."""
    bare = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    kinds = (
        [k for k in typing.get_args(bare) if k is not type(None)]
        if typing.get_origin(bare) in (typing.Union, types.UnionType)
        else [bare]
    )
    kind = kinds[0]
    if kind is bool or parameter.opts[0] in COMPLETION:
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def rows(command: Any) -> Iterator[str]:
    """Rows of the table of a command's arguments and options."""
    hints = typing.get_type_hints(command.callback, include_extras=True)
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        annotation = hints.get(parameter.name)
        text = COMPLETION.get(parameter.opts[0], plain(parameter.help or ""))
        if parameter.param_type_name == "argument":
            yield f"| `{parameter.metavar or parameter.name.upper()}` | {NO_VALUE} | {text} |"
            continue
        value = value_of(parameter, annotation)
        spelled = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        # An option's own words say what happens without it where the default is no value.
        said = re.search(r"\s*\[default: (.+)\]$", text)
        if said:
            text, default = text[: said.start()], said[1]
        elif parameter.default in (None, "") or parameter.multiple:
            default = NO_VALUE
        elif isinstance(parameter.default, bool):
            default = ("on" if parameter.default else "off") if value == "" else str(parameter.default)
        else:
            default = f"`{parameter.default}`"
        # Brackets of a help text are no links.
        yield f"| {spelled}{f' `{value}`' if value else ''} | {default} | {text.replace('[', chr(92) + '[')} |"


def shell(lines: Sequence[str]) -> Iterator[str]:
    """Lines of examples as they fit a page: what stands behind a command goes before it, long commands are broken."""
    for line in lines:
        command, _, said = line.strip().partition("   ")
        if not command.startswith(("tokred ", "--")):
            yield f"# {line.strip()}"
            continue
        if said and len(command) + len(said.strip()) > WIDTH - 4:
            yield f"# {said.strip()}"
            said = ""
        indent = "" if command.startswith("tokred ") else "    "
        for piece in broken(command):
            yield f"{indent}{piece}"
            indent = "    "
        if said:
            yield f"  # {said.strip()}"


def broken(command: str) -> list[str]:
    """A command on as many lines as it needs, broken before an option."""
    if len(command) <= WIDTH:
        return [command]
    cut = max(m.start() for m in re.finditer(r" -", command) if m.start() <= WIDTH - 2)
    return [f"{command[:cut]} \\", *broken(command[cut + 1 :])]


def prose(text: str) -> Iterator[str]:
    """A command's help as Markdown: paragraphs, and what the help does not wrap as code."""
    for part in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if not part.startswith("\b"):
            yield plain(part).replace("\\|", "|")
            continue
        lines = part.lstrip("\b\n").splitlines()
        if not any(line.strip().startswith("tokred ") for line in lines):
            listed = any(line.startswith(" ") for line in lines)
            yield f"```text\n{chr(10).join(lines)}\n```" if listed else plain(" ".join(lines)).replace("\\|", "|")
            continue
        body = "\n".join(shell(lines[1:] if lines[0] == "Examples:" else lines)).replace("\n  # ", "  # ")
        yield f"```bash\n{body}\n```"


def section(name: str, command: Any, level: int) -> list[str]:
    """The part of the page that one command has, and those of the commands inside it."""
    lines = [f"{'#' * level} {name}", *prose(command.help or "")]
    table = list(rows(command))
    if table:
        lines.append("\n".join(["| argument or option | default | what it is |", "| --- | --- | --- |", *table]))
    for inside, one in getattr(command, "commands", {}).items():
        lines += section(f"{name} {inside}", one, 2)
    return lines


def commands() -> dict[Path, str]:
    """The page of the command line."""
    import typer

    app = typer.main.get_command(importlib.import_module("tokred.cli.main").app)
    top = section("tokred", app, 2)
    lines = [WRITTEN, "# Command line", ABOUT, "`-h` or `--help` behind any command prints this.", *top]
    return {FOLDER / "command-line.md": "\n\n".join(lines) + "\n"}


def pages() -> dict[Path, str]:
    """All of them, as they have to be."""
    return {**methods(), **commands()}


if __name__ == "__main__":
    for path, wanted in pages().items():
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != wanted:
            sys.exit(f"{path} is out of date: run python .ci/reference.py")
