"""A context that is fed to the model again, piece by piece, so that its rows are judged by how it is reconstructed.

Nothing here knows a host: it says which tokens to feed (:func:`pieces`, :func:`tokens_of`) and reads the attention of
the forwards that a host then runs (:class:`Probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.kv.newest import with_sink
from tokred.kv.site import CacheSite
from tokred.kv.values import value_lengths

# The state of a layer's rows that holds what they received from the tokens that repeat.
REPEATED = "repeated"
# The note of a layer that holds the tokens which will be repeated.
CONTEXT = "context"
# Attention is at most one: rows that are not repeated stand above all others.
UNREPEATED = 2.0
# Queries whose attention is held at once.
_BLOCK = 64


class Repeats(NamedTuple):
    """The way in which a context is repeated.

    Attributes:
        chunk: tokens of a piece.
        sinks: first tokens, which are not repeated.
        first: token ids of the instruction before the first piece.
        later: token ids of the instruction before each other piece.
        overlap: tokens of the piece before that follow the later instruction.
        plus: each weight is divided by the length of what its query was made of, and multiplied by that of what its
            value adds to the stream.
        keep: queries of the tokens that repeat, at most, which are kept for a fit; 0: none.
    """

    chunk: int
    sinks: int
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    overlap: int = 8
    plus: bool = False
    keep: int = 0


class Piece(NamedTuple):
    """Tokens that one forward repeats.

    Attributes:
        slots: for each sample the repeated tokens, as places in the recorded context; empty where it has none left.
        before: for each sample the tokens of the piece before that come first, likewise.
        instruction: token ids in front of both.
    """

    slots: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    instruction: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens that each sample is fed."""
        lead = len(self.instruction)
        return tuple(lead + len(b) + len(s) if len(s) else 0 for s, b in zip(self.slots, self.before, strict=True))


def pieces(repeats: Repeats, real: Tensor, lengths: tuple[int, ...]) -> Iterator[Piece]:
    """Cut the recorded context of every sample.

    Args:
        repeats: how.
        real: ``[B, R]`` bool, which of the recorded slots are tokens.
        lengths: tokens that each sample has seen, recorded ones included.
    """
    found = []
    for row, n in zip(real, lengths, strict=True):
        slots = row.nonzero().view(-1)
        found.append(slots[max(0, repeats.sinks - (n - len(slots))) :])
    most, size = max(len(slots) for slots in found), repeats.chunk
    for start in range(0, most, size):
        yield Piece(
            tuple(slots[start : start + size] for slots in found),
            tuple(slots[max(0, start - repeats.overlap) : start] for slots in found),
            repeats.later if start else repeats.first,
        )


def tokens_of(piece: Piece, context: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tokens that a forward is fed.

    Args:
        piece: of the context.
        context: ``[B, R]`` recorded token ids, or their embeddings ``[B, R, C]``.
        embed: makes embeddings of ids.

    Returns:
        Ids ``[B, M]`` or embeddings ``[B, M, C]``, and ``[B, M]`` bool, False on padding behind shorter samples; None:
        no padding.
    """
    lead = torch.tensor(piece.instruction, dtype=torch.int64, device=context.device)
    lead = lead if context.ndim == 2 else embed(lead).to(context.dtype)
    fed = piece.fed
    out = context.new_zeros(len(fed), max(fed), *context.shape[2:])
    for i, (slots, before, n) in enumerate(zip(piece.slots, piece.before, fed, strict=True)):
        if n:
            out[i, :n] = torch.cat([lead, context[i].index_select(0, torch.cat([before, slots]))])
    if len(set(fed)) == 1:
        return out, None
    return out, torch.arange(max(fed), device=context.device) < torch.tensor(fed, device=context.device)[:, None]


class Probe:
    """The attention of a forward that repeats: for every row of the context the largest weight that it received.

    Args:
        repeats: how the context is repeated.
        recorded: slots ``R`` of the recorded context, the newest rows of the cache before the forward.

    Attributes:
        best: for each compressed layer ``[B, Hk, K]`` float32, zero where nothing was repeated yet.
    """

    def __init__(self, repeats: Repeats, recorded: int) -> None:
        self.repeats = repeats
        self.recorded = recorded
        self.piece: Piece | None = None
        self.best: dict[int, Tensor] = {}
        self.queries: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(self, site: CacheSite) -> None:
        """Take note of one layer's attention in a forward that repeats :attr:`piece`."""
        piece = self.piece
        assert piece is not None  # set before the forward
        m = site.q.shape[2]
        rows = site.k.shape[2] - m
        best = self.best.get(site.layer)
        if best is None or best.shape[2] != rows:
            best = self.best[site.layer] = torch.zeros(*site.k.shape[:2], rows, device=site.device)
        if self.repeats.keep:
            meant = torch.arange(m, device=site.device) < torch.tensor(piece.fed, device=site.device)[:, None]
            self.queries.setdefault(site.layer, []).append((site.q, meant))
            return
        sinks = _sink_rows(site, self.repeats.sinks, rows)
        uniform = site.padding is None and not site.ragged
        for i in range(1) if uniform else range(len(piece.fed)):
            n = piece.fed[i]
            if not n:
                continue
            some = slice(None) if uniform else slice(i, i + 1)
            chunk = piece.slots[i].to(site.device) + (rows - self.recorded)
            own = torch.arange(rows, rows + n, device=site.device)
            index = torch.cat([sinks[i], chunk, own])
            k = site.k[some].index_select(2, index)
            q, first = site.q[some, :, :n], len(sinks[i])
            if site.sinks is not None:
                assert site.scale is not None  # since the site was made
                q, k, _, _ = with_sink(q, k, site.sinks, site.scale, None, None)
                first += 1
            if self.repeats.plus:
                rows_of = slice(first, first + len(chunk))
                found = _weighed(site, some, q, k)[:, :, rows_of] * value_lengths(site)[some, :, chunk]
                found = found.view(found.shape[0], site.heads, -1, found.shape[2]).amax(2)
                best[some, :, chunk] = found.to(best.dtype)
                continue
            attention = Attention(q, k, scale=site.scale, softcap=site.softcap, causal=True)
            found = attention.statistics(group="max").max
            best[some, :, chunk] = found[:, :, first : first + len(chunk)].to(best.dtype)

    def reference(self, layer: int) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, n, D]`` of a layer, evenly chosen if there are many, and ``[B, n]`` bool, which are some."""
        found = self.queries[layer]
        q, meant = torch.cat([one for one, _ in found], 2), torch.cat([one for _, one in found], 1)
        if q.shape[2] > self.repeats.keep:
            some = torch.linspace(0, q.shape[2] - 1, self.repeats.keep, device=q.device).round().long()
            q, meant = q.index_select(2, some), meant.index_select(1, some)
        return q, meant

    def scores(self, layer: int, site: CacheSite, before: Tensor | None) -> Tensor:
        """``[B, Hk, K]`` float32 for the rows of a layer.

        Args:
            layer: which of the compressed layers.
            site: it, before the forwards.
            before: the scores of its rows from an earlier call, zero in rows that came since; None: there was none.
        """
        shape = site.k.shape[:3]
        found = self.best.get(layer)
        found = torch.zeros(shape, device=site.device) if found is None else found
        found = found if before is None else torch.maximum(found, before)
        # Products with lengths have no bound.
        return found.masked_fill(site.token < self.repeats.sinks, torch.inf if self.repeats.plus else UNREPEATED)


def _sink_rows(site: CacheSite, sinks: int, rows: int) -> list[Tensor]:
    """For each sample the rows of its first tokens, which every head holds at the same places."""
    first = site.token[:, 0, :rows] < sinks
    if site.real is not None:
        first = first & site.real[:, 0, :rows]
    if first.shape[0] == 1:
        return [first[0].nonzero().view(-1)] * site.shape[0]
    return [row.nonzero().view(-1) for row in first]


def _weighed(site: CacheSite, some: slice, q: Tensor, k: Tensor) -> Tensor:
    """``[b, H, S]`` float32: for each row the largest weight, divided by the length of what its query was made of.

    Args:
        site: of the forward that repeats.
        some: samples.
        q: ``[b, H, M, D]`` queries of the tokens that they are fed.
        k: ``[b, Hk, S, D]`` the rows that these share their attention out among, their own in the end.
    """
    b, heads, count, width = q.shape
    q, length = q.float(), site.hidden[some, :count].float().norm(dim=-1)
    rows, keys = k.shape[2], k.float().unsqueeze(2)
    place = torch.arange(rows, device=q.device)
    best = q.new_zeros(b, heads, rows)
    scale: float = site.scale  # type: ignore[assignment]
    for start in range(0, count, _BLOCK):
        part = q[:, :, start : start + _BLOCK]
        logits = part.reshape(b, k.shape[1], -1, part.shape[2], width) @ keys.mT * scale
        if site.softcap:
            logits = torch.tanh(logits / site.softcap) * site.softcap
        own = rows - count + start + torch.arange(part.shape[2], device=q.device)
        weights = logits.masked_fill(place > own[:, None], -torch.inf).softmax(-1).flatten(1, 2)
        weights = weights / length[:, None, start : start + _BLOCK, None].clamp(min=1e-12)
        best = torch.maximum(best, weights.amax(2))
    return best
