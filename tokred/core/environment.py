"""The circumstances that a measurement has to carry with it: device, threads, versions and commit."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

# Libraries that change what tokred does or how fast, by the names that they are imported and installed under.
LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "open_clip": "open_clip_torch",
    "triton": "triton",
    "accelerate": "accelerate",
    "peft": "peft",
}


def describe(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """One flat record of where and with what something ran."""
    device = torch.device(device)
    record: dict[str, str | int] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name, package in LIBRARIES.items():
        record[name] = version(package)
    record["tokred"] = version("tokred")
    record["commit"] = commit()
    record["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return record


def package(library: str) -> str:
    """The name that a library is installed under, by the one that it is imported under."""
    return LIBRARIES.get(library, library)


@functools.cache
def version(package: str) -> str:
    """The installed version, or an empty text; read once, since what is imported stays."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """The model name of a GPU or CPU, as its driver or the operating system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def checkout() -> Path | None:
    """The root of the git checkout that tokred is imported from; None where it is installed as a package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "pyproject.toml").exists() else None


def commit() -> str:
    """Commit of the checkout, with ``+`` where tokred's own code was changed since; empty outside a checkout."""
    root = checkout()
    if root is None:
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "tokred", "adapters", "kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
