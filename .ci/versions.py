"""Versions: the floors that pyproject.toml declares, the pins of constraints.txt, and what tests have run with.

    python3 .ci/versions.py floors             the floors of the hosts as pins, for `pip install`
    .venv/bin/python .ci/versions.py pin       write constraints.txt and tokred/core/tested.json from this environment
    python3 .ci/versions.py outcome A.xml ...  a table of test results by folder, with the versions of this environment

pyproject.toml is the only place where floors are typed; the environment is the only place where pins come from.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, TESTED = ROOT / "constraints.txt", ROOT / "tokred" / "core" / "tested.json"
# By the names that libraries are imported under; the others are installed under that name.
PACKAGES = {"open_clip": "open_clip_torch"}
LIBRARIES = ("torch", "triton", "timm", "transformers", "diffusers", "open_clip", "accelerate", "peft")
# torch pins what it needs of these itself, and other builds of torch need others. tokred is what is being installed.
LEFT_OUT = re.compile(r"(nvidia|cuda)[-_]|tokred$|pip$")
MARKERS = {"triton": "sys_platform == 'linux'"}
# What is needed on other systems alone, so that no environment of ours holds it.
ELSEWHERE = {"appnope": "appnope==0.1.4; sys_platform == 'darwin'"}
HEAD = """\
# What the tests ran with, for `pip install -c constraints.txt`: so that a release of tomorrow cannot break a set-up of
# today. It installs nothing; a package that is not needed on a platform is not installed there. torch brings its own
# versions of CUDA's libraries. Written by .ci/refresh.
"""


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))


def requirements() -> Iterator[str]:
    """All that the base and every extra ask for, tokred's own extras aside."""
    table = project()["project"]
    for group in (table["dependencies"], *table["optional-dependencies"].values()):
        yield from (r for r in group if not r.startswith("tokred["))


def floor(library: str) -> tuple[str, str]:
    """The oldest version that pyproject.toml allows, and where (a marker, or "")."""
    package = PACKAGES.get(library, library)
    for requirement in requirements():
        match = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)\s*(?:;\s*(.*))?", requirement)
        if match and match[1] == package:
            return match[2], match[3] or ""
    raise SystemExit(f"pyproject.toml has no floor for {package}")


def floors() -> list[str]:
    """The floors as pins."""
    found = []
    for library in LIBRARIES:
        version, marker = floor(library)
        found.append(f"{PACKAGES.get(library, library)}=={version}" + (f"; {marker}" if marker else ""))
    return found


def public(version: str) -> str:
    """A version without what a builder has added to it (2.14.1+cpu)."""
    return version.partition("+")[0]


def marker(one: metadata.Distribution) -> str:
    """Where a pin holds: on the package's platforms, and on Pythons that it runs on where those are not all of ours."""
    found = [MARKERS[one.name]] if one.name in MARKERS else []
    needs = re.search(r">=\s*([\d.]+)", one.metadata.get("Requires-Python") or "")
    oldest = re.search(r">=\s*([\d.]+)", project()["project"]["requires-python"])
    if needs and oldest and _numbers(needs[1]) > _numbers(oldest[1]):
        found.append(f"python_full_version >= '{needs[1]}'")
    return " and ".join(found)


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.strip(".").split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def pins() -> list[str]:
    """Every package of this environment."""
    found = dict(ELSEWHERE)
    for one in metadata.distributions():
        if not LEFT_OUT.match(one.name.lower()):
            where = marker(one)
            pin_of = f"{one.name}=={public(one.version)}" + (f"; {where}" if where else "")
            found[one.name.lower().replace("_", "-")] = pin_of
    return [found[key] for key in sorted(found)]


def tested() -> str:
    """The floors, and the versions of this environment, as the package's data."""
    rows = []
    for library in LIBRARIES:
        newest = public(metadata.version(PACKAGES.get(library, library)))
        rows.append(f'    "{library}": {json.dumps({"floor": floor(library)[0], "newest": newest})}')
    return '{\n  "libraries": {\n' + ",\n".join(rows) + "\n  }\n}\n"


def pin() -> None:
    """Write what this environment holds, and let the build take its setuptools and no later major."""
    CONSTRAINTS.write_text(HEAD + "\n".join(pins()) + "\n", "utf8")
    TESTED.write_text(tested(), "utf8")
    path = ROOT / "pyproject.toml"
    bound = int(metadata.version("setuptools").partition(".")[0]) + 1
    path.write_text(re.sub(r'"setuptools>=(\d+),<\d+"', rf'"setuptools>=\1,<{bound}"', path.read_text("utf8")), "utf8")


def outcome(files: Sequence[str]) -> list[str]:
    """Results by folder of tests, below the versions that they ran with."""
    lines = [f"{'library':<14} {'floor':>9} {'here':>11}"]
    for library in LIBRARIES:
        try:
            here = public(metadata.version(PACKAGES.get(library, library)))
        except metadata.PackageNotFoundError:
            here = "-"
        lines.append(f"{library:<14} {floor(library)[0]:>9} {here:>11}")
    lines += ["", f"{'tests':<20} {'passed':>7} {'failed':>7} {'skipped':>7}"]
    for file in files:
        counts = _counts(Path(file))
        text = "did not run" if counts is None else " ".join(f"{count:>7}" for count in counts)
        lines.append(f"{Path(file).stem:<20} {text}")
    return lines


def _counts(file: Path) -> tuple[int, int, int] | None:
    """Tests that passed, failed (or could not start) and were skipped; None without results."""
    try:
        suites = ElementTree.parse(file).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    run = bad = skipped = 0
    for suite in suites:
        run += int(suite.get("tests", 0))
        bad += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return run - bad - skipped, bad, skipped


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    match arguments:
        case ["floors"]:
            print("\n".join(floors()))
        case ["pin"]:
            pin()
        case ["outcome", *files] if files:
            print("\n".join(outcome(files)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
