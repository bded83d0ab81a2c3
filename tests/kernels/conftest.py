"""Shared by the operators' tests: one thread, NaN in fresh memory, and runs under Triton's interpreter.

Tests marked ``interpret`` launch Triton kernels on the CPU. The variable ``TRITON_INTERPRET=1`` must be set before
triton is imported, so they run only in a process that has it; each file has one test that starts such a process with
the fixture ``interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import skip_without

# Helpers that several of these files share are imported by their plain names.
sys.path.insert(0, str(Path(__file__).parent))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip kernel runs where no interpreter was asked for, and all other tests where it was."""
    folder = Path(__file__).parent
    for item in items:
        if folder not in item.path.parents:
            continue
        if item.get_closest_marker("interpret") is not None:
            if not INTERPRETING:
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, set before triton is imported"))
        elif INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="not an interpreter test"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: test processes may run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (integers: a large number), so that an element nobody wrote shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool or out.is_complex() else out.fill_(torch.iinfo(out.dtype).max // 2)

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def interpreted() -> Callable[[str], None]:
    """Run the ``interpret`` tests of a file in a process of their own: ``interpreted(__file__)``."""

    def run(path: str) -> None:
        skip_without()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "interpret", "-p", "no:cacheprovider", path]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "TOKRED_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text[-8000:]
        assert " passed" in text, text[-2000:]

    return run


@pytest.fixture
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loops of the module's ``OPERATOR`` as Python runs them, before numba compiles them."""
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    monkeypatch.setenv("TOKRED_KERNELS", "auto")
    _forget_loops(request.module.OPERATOR)
    yield
    _forget_loops(request.module.OPERATOR)


def _forget_loops(operator: str) -> None:
    sys.modules.pop("tokred.kernels.loops", None)  # whose pieces the loops take in
    for part in ("cpu", "by_byte"):
        sys.modules.pop(f"{operator}.{part}", None)
        sys.modules[operator].__dict__.pop(part, None)


@pytest.fixture
def ptx() -> Callable[[Any, dict[str, Any], dict[str, str]], str]:
    """Assembly of a kernel for a GPU of compute capability 9.0, made on any machine: ``ptx(kernel, constants, kinds)``.

    ``kinds`` are the types of arguments that are no constants; those that it does not name are ``i32``.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def build(kernel: Any, constants: dict[str, Any], kinds: dict[str, str]) -> str:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        return str(built.asm["ptx"])

    return build


@pytest.fixture(params=["values seen", "stand-ins"])
def drops_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of dropping: looking at the values, and stand-ins as under a trace or on a device."""
    if request.param == "stand-ins":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param
