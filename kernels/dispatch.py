"""Which path an operator takes, and why: the one place that reads the environment.

``TOKRED_KERNELS`` is ``auto`` (default: the Triton kernel where it can run, else torch), ``torch`` (always the torch
path) or ``triton`` (the kernel, or an error that says why it cannot run). ``TOKRED_AUTOTUNE=1`` times a few launch
configurations per rounded size instead of using the default one. ``TOKRED_DEBUG=1`` checks on every call that indices
are in range, which waits for the device. With ``TRITON_INTERPRET=1`` kernels also run on the
CPU, slowly, which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODES = ("auto", "torch", "triton")

# os.environ encodes and decodes at every look-up, which adds up at a dozen look-ups per reduction. The mapping
# beneath it holds what os.environ writes, as bytes on POSIX.
_RAW: dict[bytes, bytes] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None


def _read(name: str, default: str) -> str:
    if _RAW is None or torch.compiler.is_compiling():
        return os.environ.get(name, default)
    value = _RAW.get(name.encode())
    return default if value is None else value.decode()


def mode() -> str:
    """The value of ``TOKRED_KERNELS``.

    Raises:
        ValueError: the variable holds something else than auto, torch or triton.
    """
    value = _read("TOKRED_KERNELS", "auto")
    if value not in MODES:
        raise ValueError(f"TOKRED_KERNELS is {value!r}; allowed are {', '.join(MODES)}")
    return value


def autotune() -> bool:
    """True where ``TOKRED_AUTOTUNE=1`` asks for launch configurations to be timed."""
    return _read("TOKRED_AUTOTUNE", "0") == "1"


def debug() -> bool:
    """True where ``TOKRED_DEBUG=1`` asks for the values of indices to be checked, at the price of a device wait."""
    return _read("TOKRED_DEBUG", "0") == "1"


def interpreting() -> bool:
    """True where Triton runs kernels in its interpreter, on the CPU."""
    return _read("TRITON_INTERPRET", "0") == "1"


# Looked up once and without importing them; constants, so that the compiler need not trace the search.
_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_NUMBA_FOUND = importlib.util.find_spec("numba") is not None


class Refusal(NamedTuple):
    """One row of an operator's table: when ``applies`` is true, the kernel cannot run, for ``reason``."""

    applies: bool
    reason: str


def device_refusals(tensor: Tensor) -> list[Refusal]:
    """The rows that every operator shares: the device and the presence of triton."""
    return [
        Refusal(not _TRITON_FOUND, "triton is not installed (pip install tokred[triton])"),
        Refusal(
            not tensor.is_cuda and not interpreting(),
            f"the tensors are on {tensor.device.type}; kernels run on cuda, or anywhere under TRITON_INTERPRET=1",
        ),
    ]


def use_kernel(name: str, tensor: Tensor, refusals: Callable[[], Iterable[Refusal]]) -> bool:
    """True where the operator ``name`` runs its Triton kernel for this call.

    Args:
        name: the operator, for the message.
        tensor: any input; its device decides first.
        refusals: the operator's own table, evaluated only when the device allows a kernel.

    Raises:
        RuntimeError: ``TOKRED_KERNELS=triton`` and the kernel cannot run; the message has the reason.
    """
    if not tensor.is_cuda and not interpreting() and mode() != "triton":
        return False  # the usual CPU call: no table is built
    chosen = mode()
    if chosen == "torch":
        return False
    reason = why_not(tensor, refusals)
    if reason is None:
        return True
    if chosen == "triton":
        raise RuntimeError(f"TOKRED_KERNELS=triton, but {name} cannot run its kernel: {reason}")
    return False


def why_not(tensor: Tensor, refusals: Callable[[], Iterable[Refusal]]) -> str | None:
    """The first reason for which the kernel cannot run, or None."""
    for rows in (device_refusals(tensor), refusals()):
        for row in rows:
            if row.applies:
                return row.reason
    return None


def why_not_loops(x: Tensor, own: Iterable[Refusal] = ()) -> str | None:
    """Why loops that numba compiles for a CPU cannot run on a query or weights like ``x``, or None.

    Args:
        x: its device and dtype decide.
        own: rows of the operator's own.
    """
    table = (
        Refusal(x.device.type != "cpu", f"the tensors are on {x.device.type}"),
        Refusal(mode() == "torch", "TOKRED_KERNELS is torch"),
        Refusal(not _NUMBA_FOUND, "numba is not installed (pip install 'tokred[cpu]')"),
        *own,
        Refusal(x.dtype == torch.float64, "the loops work in float32, not float64"),
        Refusal(traced(), "operations are being traced"),
    )
    return next((row.reason for row in table if row.applies), None)


def round_up_bucket(n: int) -> int:
    """The next power of two (at least 16): tuning keys and launch shapes use it, so that close lengths share them."""
    return max(16, 1 << (max(int(n), 1) - 1).bit_length())


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_on(device: torch.device) -> bool:
    """True where autocast is on for a device; never on ``meta``, of which torch knows none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(x: Tensor | torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast leaves float32 products alone.

    Args:
        x: where they are made, or a tensor that is there.
    """
    device = x.device if isinstance(x, Tensor) else x
    return torch.autocast(device.type, enabled=False) if autocast_on(device) else contextlib.nullcontext()


def traced() -> bool:
    """True while operations are written down (torch.compile, torch.export, torch.jit.trace) to run on other values, or
    run on many at once (torch.func.vmap): nothing may then be decided by looking at values, nor by whether gradients
    are recorded at the moment, and nothing is written into memory that was there before."""
    return torch.compiler.is_compiling() or bool(torch._C._is_tracing()) or mapped()


def mapped() -> bool:
    """True inside of ``torch.func.vmap``, whose tensors mean nothing outside."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return False
    return any(one.key() == functorch.TransformType.Vmap for one in functorch.get_interpreter_stack() or ())


def of_one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating-point tensors of one type: as they are, or, where autocast has left them in several, in autocast's, as
    PyTorch's own attention takes them; without autocast in the type that they promote to."""
    first, types = tensors[0], {t.dtype for t in tensors}
    if len(types) == 1:
        return tensors
    if autocast_on(first.device):
        dtype = torch.get_autocast_dtype(first.device.type)
    else:
        dtype = functools.reduce(torch.promote_types, types)
    return tuple(t.to(dtype) for t in tensors)
