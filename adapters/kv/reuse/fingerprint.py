"""Fingerprints: whether a cache was made by this model. A few numbers of every tensor stand for all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.swap import host_class

# Numbers of a tensor that are read. Training changes nearly all of them.
_SAMPLES = 64
# Of a configuration: what changes keys and values, or who sees them, and leaves no trace in tensors.
_SETTINGS = (
    words.DEPTH, words.HEADS, words.KEY_HEADS, words.KINDS, words.WINDOW, words.ROPE, words.CAP, words.SHARING,
)  # fmt: skip


def fingerprint(decoder: nn.Module, config: Any) -> dict[str, str]:
    """A model as a few short texts, by which two are compared.

    Args:
        decoder: the module whose forward takes the cache.
        config: of the decoder.

    Returns:
        ``class``, ``dtype``, ``settings``, ``shapes`` and ``weights``; the last is empty where weights are not at hand
        (on the device ``meta``, or in a form of their own), and then says nothing.
    """
    named = [*decoder.named_parameters(), *decoder.named_buffers()]
    settings = {word.role: _plain(word.part(config)) for word in _SETTINGS}
    shapes = [(name, tuple(x.shape), str(x.dtype)) for name, x in named]
    first = next((str(x.dtype) for x in decoder.parameters() if x.is_floating_point()), "")
    return {
        "class": host_class(decoder).__qualname__,
        "dtype": first.removeprefix("torch."),
        "settings": _digest([json.dumps(settings, sort_keys=True, default=str).encode()]),
        "shapes": _digest([repr(shapes).encode()]),
        "weights": numbers(x for _, x in named),
    }


def numbers(tensors: Iterable[Tensor]) -> str:
    """A digest of some numbers of each of ``tensors``; empty where one cannot be read as it is."""
    found = []
    for x in tensors:
        if x.is_meta or type(x) not in (Tensor, nn.Parameter):
            return ""
        found.append(_sample(x.detach()))
    return _digest(found)


def _sample(x: Tensor) -> bytes:
    n = x.numel()
    if n == 0:
        return b""
    index = torch.arange(min(n, _SAMPLES), device=x.device) * (n // min(n, _SAMPLES))
    # A copy is made of what does not lie in order, which weights do.
    some = x.reshape(-1).index_select(0, index).cpu().contiguous()
    return some.view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def _plain(value: Any) -> Any:
    # Configurations inside of a configuration print what they hold.
    return value if value is None or isinstance(value, bool | int | float | str | list | tuple | dict) else str(value)


def differences(saved: dict[str, str], here: dict[str, str]) -> list[str]:
    """Names of what differs between two fingerprints."""
    unknown = not (saved.get("weights") and here["weights"])
    return [name for name, value in here.items() if saved.get(name) != value and not (name == "weights" and unknown)]


def described(found: dict[str, str]) -> str:
    """A fingerprint in a message: ``LlamaModel, float32, weights 0123456789abcdef``."""
    return f"{found.get('class')}, {found.get('dtype')}, weights {found.get('weights') or 'unknown'}"
