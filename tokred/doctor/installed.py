"""Libraries that are installed, which versions were tested, and where operators run their kernels."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import platform
from typing import Any, NamedTuple

import torch

from tokred import kernels
from tokred.core import environment, versions
from tokred.kernels import dispatch

# Libraries that an extra of tokred installs.
EXTRAS = ("timm", "transformers", "diffusers", "open_clip", "triton")


class Library(NamedTuple):
    """One library and its versions.

    Attributes:
        name: that it is imported under.
        installed: version, or "".
        floor, newest: the versions that were tested.
        standing: ``"tested"``, ``"older"``, ``"newer"`` or ``"missing"``.
    """

    name: str
    installed: str
    floor: str
    newest: str
    standing: str

    @property
    def hint(self) -> str:
        """The command that installs it."""
        package = environment.package(self.name)
        return f"pip install 'tokred[{self.name}]'" if self.name in EXTRAS else f"pip install {package}"


def libraries() -> list[Library]:
    """torch, then hosts and what changes them."""
    found = []
    for name, known in versions.tested().items():
        installed = torch.__version__ if name == "torch" else environment.version(environment.package(name))
        found.append(Library(name, installed, known.floor, known.newest, versions.standing(name, installed)))
    return found


def machine() -> dict[str, Any]:
    """The machine that this runs on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": environment.device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "",
        "devices": [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())],
    }


class Operator(NamedTuple):
    """The path of one operator on one device.

    Attributes:
        name: of the operator.
        device: such as ``"cpu"`` or ``"cuda:0"``.
        path: ``"torch"`` or ``"triton"``.
        reason: why not the kernel, where it is torch.
    """

    name: str
    device: str
    path: str
    reason: str


def operators() -> list[Operator]:
    """Every operator on every device that there is, for tensors of usual types and shapes."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__) if info.ispkg]
    return [_path(name, device) for name in names for device in devices]


def _path(name: str, device: str) -> Operator:
    module = importlib.import_module(f"tokred.kernels.{name}")
    why_not = getattr(module, "why_not_kernel", None) or module.why_not
    needed = [p for p in inspect.signature(why_not).parameters.values() if p.default is p.empty]
    shape = (1, 2, 16, 64) if needed[0].name == "q" else (1, 16, 16)
    reason = why_not(*(torch.empty(shape, device=device) for _ in needed))
    try:
        chosen = dispatch.mode()
    except ValueError as error:
        return Operator(name, device, "", str(error))
    if chosen == "torch":
        reason = "TOKRED_KERNELS=torch"
    return Operator(name, device, "torch" if reason else "triton", reason or "")
