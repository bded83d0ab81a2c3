"""Caches in files: every layer's state as it is held, what it was made by, and a write that leaves all or nothing."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.kv.cache import Snapshot, TokCache, layers_of
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.reuse.fingerprint import described, differences
from tokred.core.folders import check_file
from tokred.core.versions import TOKRED
from tokred.errors import TokredError
from tokred.kv.pack import Packing, Unpacking

FORMAT = 1
_KEY = "tokred"
# Notes of a forward that is running: none is while a cache is written.
_PASSING = ("armed", "waiting", "lent", "view")


def write(path: str | Path, cache: Any, about: Mapping[str, Any]) -> Path:
    """Write a cache into one file, in place of one that may be there.

    Args:
        path: of the file; folders are made.
        cache: of transformers, ours or not.
        about: its model, and its policy, as plain values.

    Raises:
        ImportError: safetensors is not installed.
        TokredError: a store holds what no file can.
        OSError: it cannot be written; whatever stood at ``path`` is as it was, and nothing half written is left.
    """
    safetensors()  # before anything is copied
    packing, layers = Packing(), []
    for i, layer in enumerate(layers_of(cache)):
        try:
            layers.append([type(layer).__name__, packing.packed(_state(layer))])
        except TypeError as error:
            store = f"the store {layer.store.name!r}" if isinstance(layer, TokLayer) else type(layer).__name__
            raise TokredError(f"layer {i} cannot be saved: {store} holds something else than rows: {error}") from None
    session = packing.packed(cache.engine.state()) if isinstance(cache, TokCache) else None
    return write_packed(path, packing, {**about, "held": layers, "session": session})


def write_packed(path: str | Path, packing: Packing, about: Mapping[str, Any]) -> Path:
    """Write tensors, and what was packed around them, into one file; errors as those of :func:`write`."""
    safetensors()
    from safetensors.torch import save_file

    known = json.dumps({"format": FORMAT, "tokred": TOKRED, **about})
    tensors = {str(i): t for i, t in enumerate(packing.tensors)}
    whole(path, lambda part: save_file(tensors, part, {_KEY: known}))
    return Path(path)


def whole(path: str | Path, save: Any) -> None:
    """Let ``save(part)`` write a file beside ``path``, and rename it when it is complete.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    target = Path(path)
    check_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        save(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # a renamed file must not be empty after the power has gone
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)  # temporary files are private, and this one no longer is
        os.replace(part, target)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{target} could not be written: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)


class Saved:
    """A file of a cache, opened: what it says of itself; tensors are read when they are asked for.

    Args:
        path: of the file.
        what: it has to hold: the ``"held"`` of a cache, or a ``"chunk"``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no cache of tokred, holds the other, or is of a format that this one does not read.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is no file: give one that tokred.save_cache has written")
        safetensors()  # says what is missing
        try:
            with importlib.import_module("safetensors").safe_open(str(self.path), framework="pt") as file:
                self.known: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
                number = self.known["format"]
                self.count = len(list(file.keys()))
        except Exception as error:  # safetensors has an exception of its own for files that are cut off
            raise ValueError(f"{self.path} is not a cache of tokred: {type(error).__name__}: {error}") from None
        if number != FORMAT:
            raise ValueError(
                f"{self.path} has format {number!r}, written by tokred {self.known.get('tokred', '?')}; this is "
                f"tokred {TOKRED}, which reads format {FORMAT}: compute the cache again, or use that tokred"
            )
        if what not in self.known:
            other = "a chunk, and no cache" if what == "held" else "a cache, and no chunk"
            raise ValueError(f"{self.path} holds {other}: a chunk is read by tokred.ChunkStore, a cache by load_cache")

    def check(self, what: str, here: Any, said: str, there: str) -> None:
        """Refuse a file of something else.

        Args:
            what: of :attr:`known`, compared with ``here``.
            here: what this model has.
            said: how ``here`` is called in the message, and ``there`` what the file holds.

        Raises:
            ValueError: naming both.
        """
        if json.loads(json.dumps(here)) != self.known.get(what):
            raise ValueError(f"{self.path} holds the cache of {there}, and this is {said}: compute it again")

    def check_model(self, here: dict[str, str]) -> None:
        """Refuse the cache of another model.

        Raises:
            ValueError: naming both models, and what differs.
        """
        saved = self.known.get("model") or {}
        found = differences(saved, here)
        if found:
            raise ValueError(
                f"{self.path} holds the cache of another model ({described(saved)}) than this one "
                f"({described(here)}); different are {', '.join(found)}: compute it again"
            )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which they were written."""
        safetensors()
        from safetensors.torch import load_file

        found = load_file(str(self.path))
        return [found[str(i)] for i in range(self.count)]

    def fill(self, cache: Any, devices: Sequence[torch.device]) -> None:
        """Give an empty cache the state that was saved, each layer on its device.

        Raises:
            ValueError: the file holds layers of other kinds.
        """
        rows, layers, tensors = self.known["held"], layers_of(cache), self.tensors()
        kinds, own = [kind for kind, _ in rows], [type(layer).__name__ for layer in layers]
        if kinds != own:
            raise ValueError(f"{self.path} holds layers {', '.join(kinds)}; this model's are {', '.join(own)}")
        try:
            states = [
                Unpacking(tensors, device, getattr(layer, "store", None)).unpacked(state, _state(layer))
                for (_, state), layer, device in zip(rows, layers, devices, strict=True)
            ]
            session: Any = Unpacking(tensors, devices[0]).unpacked(self.known["session"])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.path} does not fit this tokred {TOKRED}: {error!r}") from None
        if isinstance(cache, TokCache):
            cache.restore(Snapshot(tuple(states), session))
        else:
            for layer, state in zip(layers, states, strict=True):
                layer.__dict__.update(state)


def _state(layer: Any) -> dict[str, Any]:
    state = layer.snapshot() if isinstance(layer, TokLayer) else dict(layer.__dict__)
    return {name: value for name, value in state.items() if name not in _PASSING}


def safetensors() -> None:
    """Look for the library that files are written by.

    Raises:
        ImportError: it is not installed.
    """
    try:
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "caches are kept by safetensors, which is not installed: pip install 'tokred[hub]'"
        ) from error
