"""Chunks: texts that were computed once, each by itself, and are kept in memory or in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import cache_name, terms, with_cache, words
from tokred.adapters.kv.cache import layers_of
from tokred.adapters.kv.host import CacheHost, match
from tokred.adapters.kv.reasons import layer_kinds
from tokred.adapters.kv.reuse import joined, saved
from tokred.adapters.kv.reuse.fingerprint import fingerprint
from tokred.adapters.kv.reuse.layers import devices
from tokred.adapters.kv.reuse.turns import Turns, check_turns, refusal
from tokred.adapters.swap import host_class
from tokred.kv.blend import deep, deviation, smoothed
from tokred.kv.pack import Packing, Unpacking

# Keys and values ``[1, Hk, n, D]`` of each layer.
Rows = tuple[tuple[Tensor, Tensor], ...]


class Chunk(NamedTuple):
    """A text that was computed by itself.

    Attributes:
        ids: ``[1, n]`` of its tokens.
        rows: keys and values ``[1, Hk, n, D]`` of each layer, keys rotated for positions from :attr:`first` on.
        model: fingerprint of the model.
        behind: token ids that it was computed behind.
        foreseen: ``[n]`` float32, how far each token's keys, deep in the model, are from those behind another text;
            None: nobody asked.
    """

    ids: Tensor
    rows: tuple[tuple[Tensor, Tensor], ...]
    model: dict[str, str]
    behind: tuple[int, ...] = ()
    foreseen: Tensor | None = None

    @property
    def first(self) -> int:
        """Position of the first token."""
        return len(self.behind)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for both in self.rows for x in both)


class ChunkStore:
    """Chunks of one model, by their tokens: what has been computed, or lies in the folder, is not computed again.

    Args:
        model: a language model of transformers, of which all layers keep rows. Its policy, if it has one, takes no
            part: chunks are whole.
        folder: keeps a file for each chunk; None: chunks live as long as this object.
        behind: ``[1, m]`` or ``[m]`` token ids that every chunk is computed behind, such as a system prompt or the
            token that texts begin with; None: nothing. Models attend much to the first token there is, and a chunk
            that was computed behind another one has none of its own.
        against: ``[1, m]`` or ``[m]`` token ids of another text of the same kind. Each chunk is computed once more,
            behind it, and keeps in mind which of its tokens depend on what stands before: ``measure="foreseen"`` of
            :func:`tokred.blend`. None: that is not known.

    Attributes:
        prefix: the chunk of ``behind``, which stands first in a blend; None without one.

    Raises:
        UnsupportedModelError: the model's caches cannot be joined, or its keys not be moved, which ``against`` needs;
            the message says why.

    Example:
        >>> store = tokred.ChunkStore(model, "chunks")
        >>> made = tokred.blend(model, [store.add(a), store.add(b)])
        >>> model.generate(torch.cat([made.ids, question], 1), **tokred.cache_kwargs(made.cache))
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path | None = None,
        behind: Tensor | None = None,
        against: Tensor | None = None,
    ) -> None:
        self.host = host_of(model)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            saved.safetensors()  # says now what is missing, and not after the first chunk has been computed
        self.model = fingerprint(self.host.decoder, self.host.config)
        self._chunks: dict[str, Chunk] = {}
        self.prefix: Chunk | None = None
        self._behind, self._against = list[int](), list[int]()
        if against is not None:
            check_turns(self.host)
        if behind is not None:
            self.prefix = self.add(behind)
            self._behind = self.prefix.ids[0].tolist()
        if against is not None:
            self._against = tokens(against, "against")[0].tolist()

    def add(self, ids: Tensor) -> Chunk:
        """The chunk of some tokens, computed where it is not there yet.

        Args:
            ids: ``[1, n]`` or ``[n]`` int64.

        Raises:
            ValueError: it is no text of one sample, or a file in the folder is of another model.
            OSError: the folder cannot be written.
        """
        ids = tokens(ids, "ids")
        text, behind = ids[0].tolist(), self._behind
        known = (behind, text, self._against) if self._against else (behind, text)
        name = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
        if name not in self._chunks:
            # A name may be another's by chance or by hand, so that the file says again which tokens it is of.
            path = None if self.folder is None else self.folder / f"{name}.safetensors"
            if path is not None and path.is_file():
                self._chunks[name] = self._read(path, ids)
            else:
                rows = compute(self.host, ids, behind)
                chunk = Chunk(ids, rows, self.model, tuple(behind), self._foreseen(ids, rows))
                if path is not None:
                    packing = Packing()
                    about = {"model": self.model, **self._said(ids), "chunk": packing.packed(chunk.rows)}
                    about["foreseen"] = packing.packed(chunk.foreseen)
                    saved.write_packed(path, packing, about)
                self._chunks[name] = chunk
        return self._chunks[name]

    def _said(self, ids: Tensor) -> dict[str, list[int]]:
        """The tokens that a chunk's file is of."""
        return {"behind": self._behind, "ids": ids[0].tolist(), "against": self._against}

    def _foreseen(self, ids: Tensor, rows: Rows) -> Tensor | None:
        """``[n]`` float32: how far each token's keys are from those behind the other text; None without one."""
        if not self._against:
            return None
        first, more = len(self._behind), len(self._against)
        layer = deep(len(rows))
        other = compute(self.host, ids, [*self._behind, *self._against])[layer][0]
        at = torch.arange(first, first + ids.shape[1])
        here = Turns(self.host, first + more + ids.shape[1]).moved(layer, other, at + more, at)
        return smoothed(deviation([here], [rows[layer][0]]).cpu())

    def _read(self, path: Path, ids: Tensor) -> Chunk:
        file = saved.Saved(path, "chunk")
        file.check_model(self.model)
        said = self._said(ids)
        if {name: file.known.get(name, []) for name in said} != said:
            raise ValueError(f"{path} holds other tokens than its name says: delete it")
        found = Unpacking(file.tensors(), torch.device("cpu"))
        rows = found.unpacked(file.known["chunk"])
        rows = tuple((k.to(d), v.to(d)) for (k, v), d in zip(rows, devices(self.host), strict=True))
        return Chunk(ids, rows, self.model, tuple(self._behind), found.unpacked(file.known.get("foreseen")))

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in memory."""
        return sum(chunk.nbytes for chunk in self._chunks.values())

    def __len__(self) -> int:
        """Chunks in memory."""
        return len(self._chunks)


def host_of(model: nn.Module) -> CacheHost:
    """The host record of a model whose caches can be joined.

    Raises:
        TypeError: it is no language model of transformers.
        UnsupportedModelError: some of its layers keep no rows, or the rows of chunks.
    """
    host = match(model, bounded=True)
    if host is None:
        raise TypeError(f"model must be a language model of transformers, got a {type(model).__name__}")
    kinds = set(layer_kinds(host.config))
    odd = kinds - {*terms.kinds(terms.FULL, terms.SLIDING)}
    if host.states or odd or host.latents:
        what = "latents" if host.latents else ", ".join(sorted(odd)) or "states"
        raise refusal(host, f"some of its layers ({what}) keep other things than rows of single tokens")
    return host


def tokens(ids: Any, name: str) -> Tensor:
    """``[1, n]`` int64 of one sample.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of token ids, got {type(ids).__name__}")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"{name} must be [1, n] or [n] token ids of one sample, got {tuple(ids.shape)}")
    found: Tensor = ids.long()
    return found


def compute(host: CacheHost, ids: Tensor, behind: list[int]) -> Rows:
    """Keys and values of every layer, of tokens behind some others and nothing else."""
    cache, first = joined.empty(len(host.attentions)), len(behind)
    forward(host, torch.cat([torch.tensor([behind], dtype=torch.long), ids.cpu()], 1), cache)
    layers: list[joined.JoinedLayer] = layers_of(cache)
    rows = (layer.rows for layer in layers)
    # Copies, so that what stood in front is not kept alive.
    return tuple((k[:, :, first:].clone(), v[:, :, first:].clone()) if first else (k, v) for k, v in rows)


def forward(host: CacheHost, ids: Tensor, cache: joined.Joined) -> None:
    """One forward of the decoder over all tokens, without the head behind it."""
    if host.decoder.training:
        raise ValueError("the model is in training, where dropout makes every computation another: call model.eval()")
    given = {words.INPUT_IDS.name: ids.to(devices(host)[0]), words.CACHED.name: True}
    with torch.no_grad():
        host.decoder(**with_cache(given, cache_name(host_class(host.decoder).forward), cache))
