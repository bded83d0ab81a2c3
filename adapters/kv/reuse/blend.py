"""``blend``: chunks that were computed apart become one cache, of which a share is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import attention_of, cache_of, members, terms, words
from tokred.adapters.kv.attention import PREFIX
from tokred.adapters.kv.cache import layers_of
from tokred.adapters.kv.hooks import CacheSettings
from tokred.adapters.kv.host import CacheHost
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.reasons import layer_kinds
from tokred.adapters.kv.reuse import joined
from tokred.adapters.kv.reuse.chunks import Chunk, forward, host_of, tokens
from tokred.adapters.kv.reuse.fingerprint import described, differences, fingerprint
from tokred.adapters.kv.reuse.joined import Joined, JoinedLayer, KnownError
from tokred.adapters.kv.reuse.layers import devices, plain_cache
from tokred.adapters.kv.reuse.turns import Turns, check_turns, refusal
from tokred.errors import TokredError
from tokred.kv.blend import Blend, chosen, count_of, deviation, visible

# Keys of layer 0 depend on token and position alone: moved ones are the model's own, up to rounding.
_ROUNDING = 0.05


class Blended(NamedTuple):
    """Joined chunks.

    Attributes:
        cache: of all their tokens, for a forward or for ``generate``; a policy's, where the model has one.
        ids: ``[1, N]`` of all tokens, which ``generate`` is given again, and what follows behind them.
        rows: of each layer, ``[m]`` the positions that were computed again, ascending.
    """

    cache: Any
    ids: Tensor
    rows: tuple[Tensor, ...]

    @property
    def share(self) -> float:
        """Rows that were computed again, of all rows of all layers."""
        return sum(len(r) for r in self.rows) / max(1, len(self.rows) * self.ids.shape[1])


def join(model: nn.Module, parts: Sequence[Chunk | Tensor], how: Blend, state: Any = None) -> Blended:
    """Blend chunks; see :func:`tokred.blend`.

    Args:
        model: that they were computed by.
        parts: chunks, and token ids of which nothing is known.
        how: which rows are computed again.
        state: of the policy on the model, or None.
    """
    host = host_of(model)
    depth = len(host.attentions)
    how.check(depth)
    parts = [_part(part, i) for i, part in enumerate(parts)]
    if not any(isinstance(part, Chunk) for part in parts):
        raise ValueError("parts holds no chunk: give at least one of tokred.ChunkStore")
    exact = len(parts) == 1 and isinstance(parts[0], Chunk) and parts[0].first == 0
    _check(host, parts, exact)
    ids = torch.cat([_ids(p).cpu() for p in parts], 1)
    known = torch.cat([torch.full((_ids(p).shape[1],), isinstance(p, Chunk)) for p in parts])
    foreseen = _foreseen(parts, known, how) if how.foreseen else None
    with torch.no_grad():
        cache = _moved(host, parts)
        run = _Run(host, how, cache, known, foreseen)
        # Nothing is missing, and nothing has seen less than it should: there is nothing to compute.
        if not exact and (count_of(how.shares[0], int(known.sum())) or not known.all()):
            with run.hooks():
                forward(host, ids, cache)
        made = _handed_over(host, cache, state)
    return Blended(made, ids.to(devices(host)[0]), run.computed(depth))


def _part(part: Any, index: int) -> Chunk | Tensor:
    return part if isinstance(part, Chunk) else tokens(part, f"part {index}")


def _ids(part: Chunk | Tensor) -> Tensor:
    return part.ids if isinstance(part, Chunk) else part


def _check(host: CacheHost, parts: Sequence[Chunk | Tensor], exact: bool) -> None:
    """Refuse chunks of another model; and where rows move, keys that cannot, and attention that takes no mask."""
    here = fingerprint(host.decoder, host.config)
    for i, part in enumerate(parts):
        if isinstance(part, Chunk) and differences(part.model, here):
            raise ValueError(
                f"part {i} was computed by another model ({described(part.model)}) than this one ({described(here)})"
            )
    if exact:
        return
    name = attention_of(host.config).removeprefix(PREFIX)
    if name not in (*terms.WRITTEN_OUT.names, *terms.FUSED_KERNEL.names):
        raise ValueError(
            f"the model's attention is {name!r}, which takes no mask of rows that stand apart: load it with "
            "attn_implementation='sdpa' or 'eager'"
        )
    check_turns(host)


def _foreseen(parts: Sequence[Chunk | Tensor], known: Tensor, how: Blend) -> Tensor:
    """``[m]`` int64: positions that are computed, by what their chunks know of them.

    Raises:
        ValueError: a chunk knows nothing.
    """
    found, before, exact = [], list[int](), True
    for i, part in enumerate(parts):
        ids = _ids(part)[0].tolist()
        if not isinstance(part, Chunk):
            deviations, exact = torch.zeros(len(ids)), False
        elif exact and list(part.behind) == before:
            deviations = torch.full((len(ids),), -1.0)  # stands behind what it was computed behind: after all others
        elif part.foreseen is None:
            raise ValueError(
                f"part {i} does not know which of its tokens depend on what stands before: "
                "measure='foreseen' takes chunks of tokred.ChunkStore(model, against=text)"
            )
        else:
            deviations, exact = part.foreseen, False
        found.append(deviations)
        before += ids
    return chosen(torch.cat(found), known, count_of(how.shares[0], int(known.sum())))


def _moved(host: CacheHost, parts: Sequence[Chunk | Tensor]) -> Joined:
    """All chunks at their places."""
    old, place = [], 0
    for part in parts:
        n = _ids(part).shape[1]
        first = part.first if isinstance(part, Chunk) else place  # where it was computed it stays as it is
        old.append(torch.arange(first, first + n))
        place += n
    at = torch.cat(old)
    turns, here = Turns(host, max(place, int(at.max()) + 1)), torch.arange(place)
    layers = []
    for i in range(len(host.attentions)):
        rows: list[tuple[Tensor, Tensor] | int] = [
            part.rows[i] if isinstance(part, Chunk) else part.shape[1] for part in parts
        ]
        keys, values = joined.in_a_row(rows)
        layers.append((turns.moved(i, keys, at, here), values))
    return joined.joined(layers)


class _Run:
    """One forward over joined rows, in which tokens leave after layers that are checked.

    Args:
        host: of the model.
        how: which rows are computed again.
        cache: of all rows.
        known: ``[N]`` bool, which have been stored.
        foreseen: ``[m]`` positions of the tokens that enter the first layer; None: all do.
    """

    def __init__(
        self, host: CacheHost, how: Blend, cache: Joined, known: Tensor, foreseen: Tensor | None = None
    ) -> None:
        self.host, self.how, self.cache, self.known = host, how, cache, known
        self.rows: Tensor | None = None  # [m] positions that go on; None: all
        self.foreseen = None if foreseen is None or len(foreseen) == len(known) else foreseen
        self.shares = {} if how.foreseen else dict(zip(how.check_layers, how.shares, strict=True))
        self.written: dict[int, Tensor] = {}
        self._asking = False
        self._stored: Tensor | None = None  # known keys of layer 0, until it has made its own
        kinds = layer_kinds(host.config)
        window = words.WINDOW.part(host.config)
        self.windows = [int(window) if k in terms.SLIDING.names and window else None for k in kinds]
        self._masks: dict[Any, Tensor] = {}

    def computed(self, depth: int) -> tuple[Tensor, ...]:
        """Positions that were computed again, of each layer."""
        none = torch.zeros(0, dtype=torch.long)
        return tuple(self.written.get(i, none) for i in range(depth))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Around the forward: each decoder layer is entered through :meth:`enter`."""
        around = {id(child): m for m in self.host.decoder.modules() for child in m.children()}
        handles = []
        try:
            for index, (_, attention) in enumerate(self.host.attentions.values()):
                handles.append(around[id(attention)].register_forward_pre_hook(self._hook(index), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            # The model may be at work for somebody else meanwhile.
            return self.enter(index, module, args, kwargs) if cache_of(kwargs) is self.cache else None

        return hook

    def enter(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a decoder layer: measure where that is due, and let only some tokens in."""
        if self._asking:
            return None
        layer: JoinedLayer = layers_of(self.cache)[index]
        share = self.shares.get(index)
        before = self.rows
        if index == 0:
            self.rows = self.foreseen
            self._stored = self._twice(layer)
        elif self._stored is not None:
            self._compare(self._stored, self._twice(layers_of(self.cache)[0]))
            self._stored = None
        if share is not None:
            fresh = self._known(layer, module, *self._gathered(args, kwargs, None, index))
            self._choose(layer, share, fresh)
            if self.how.fresh_at_check and self.rows is not None:
                layer.shown = self._all_fresh(layer, before, fresh)
        total = len(self.known)
        layer.places = None if self.rows is None else self.rows.to(layer.rows[0].device)
        self.written[index] = torch.arange(total) if self.rows is None else self.rows
        if self.rows is None:
            return None
        # Tokens leave once; what a layer is given besides is of all tokens every time.
        leaving = self.rows if before is None else torch.searchsorted(before, self.rows)
        return self._gathered(args, kwargs, None if self.rows is before else leaving, index)

    def _gathered(self, args: Any, kwargs: dict[str, Any], leaving: Tensor | None, index: int) -> Any:
        """Arguments of a decoder layer for the tokens that are left."""
        if self.rows is None and leaving is None:
            return args, kwargs
        args, kwargs = list(args), dict(kwargs)
        if leaving is not None:
            if args:
                args[0] = args[0].index_select(1, leaving.to(args[0].device))
            else:
                words.STATES.put(kwargs, _some(words.STATES.at(kwargs), leaving))
        if self.rows is not None:
            tables, positions = words.TABLES.of(kwargs), words.POSITIONS.of(kwargs)
            if tables is not None:
                words.TABLES.put(kwargs, tuple(_some(t, self.rows) for t in tables))
            if positions is not None:
                words.POSITIONS.put(kwargs, _some(positions, self.rows))
            device = (args[0] if args else words.STATES.at(kwargs)).device
            words.ATTENTION_MASK.put(kwargs, self._mask(index, device))
        return tuple(args), kwargs

    def _mask(self, index: int, device: torch.device) -> Tensor:
        """``[1, 1, m, N]`` as the model's attention takes it."""
        assert self.rows is not None
        window, key = self.windows[index], (self.windows[index], device, id(self.rows))
        if key not in self._masks:
            seen = visible(self.rows.to(device), len(self.known), window)[None, None]
            # Attention that is written out adds masks, and the fused one would make this of booleans in every layer.
            dtype = next(p.dtype for p in self.host.decoder.parameters() if p.is_floating_point())
            self._masks[key] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(
                ~seen, torch.finfo(dtype).min
            )
        return self._masks[key]

    def _known(self, layer: JoinedLayer, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, which runs until it has them and no further."""
        self._asking = layer.asking = True
        try:
            module(*args, **kwargs)
        except KnownError as known:
            return known.rows
        finally:
            self._asking = layer.asking = False
        raise TokredError(f"{type(module).__name__} has not added to its cache, so its tokens cannot be compared")

    def _choose(self, layer: JoinedLayer, share: float, fresh: tuple[Tensor, Tensor]) -> None:
        """Decide which tokens go on."""
        held, rows, known = layer.rows, self.rows, self.known
        device = held[0].device
        if rows is not None:
            held = held[0].index_select(2, rows.to(device)), held[1].index_select(2, rows.to(device))
            known = known[rows]
        which = {"key": (0,), "value": (1,), "both": (0, 1)}[self.how.measure]
        found = deviation([fresh[w] for w in which], [held[w] for w in which])
        count = count_of(share, int(self.known.sum()))
        some = chosen(found, known.to(device), count).cpu()
        if len(some) < len(self.known):
            self.rows = some if rows is None else rows[some]

    def _all_fresh(
        self, layer: JoinedLayer, before: Tensor | None, fresh: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rows that queries of a check layer are shown where they are to see what was computed."""
        if before is None:
            return fresh
        where = before.to(fresh[0].device)
        return layer.rows[0].index_copy(2, where, fresh[0]), layer.rows[1].index_copy(2, where, fresh[1])

    def _twice(self, layer: JoinedLayer) -> Tensor:
        """Keys of the tokens that were stored, and are computed in layer 0: ``[B, Hk, n, D]`` float32, a copy."""
        known = self.known.nonzero().view(-1) if self.rows is None else self.rows[self.known[self.rows]]
        return layer.rows[0].index_select(2, known.to(layer.rows[0].device)).float()

    def _compare(self, held: Tensor, fresh: Tensor) -> None:
        """Refuse a model whose keys are something else than rotated, by layer 0, where some are known twice."""
        if float((fresh - held).norm()) > _ROUNDING * float(fresh.norm()):
            raise refusal(self.host, "moved keys of its first layer are not those that it makes")


def _some(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(1, rows.to(x.device))


def _handed_over(host: CacheHost, cache: Joined, state: CacheSettings | None) -> Any:
    """The cache that goes on: transformers' own, or the policy's."""
    made = plain_cache(host.config) if state is None else state.cache()
    sources: list[JoinedLayer] = layers_of(cache)
    for layer, source in zip(layers_of(made), sources, strict=True):
        if isinstance(layer, TokLayer):
            layer.append(*source.rows)
            layer.settle(None)
        else:
            members.UPDATE.need(layer)(*source.rows)
    return made
