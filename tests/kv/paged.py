"""A plain paged cache, and cache policies in it by five moments and ordinals, as serving engines call them.

No model library is known here. Pages belong to the cache alone: a policy names rows to keep, and never sees a page. One
integer for each request, the tokens that are physically gone, tells positions (logical) from slots (physical); so every
layer and head of a request has to hold equally many rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kv import CacheSite
from tokred.kv.engine import Clock, Engine
from tokred.kv.policy import CachePolicy

OFFERED = frozenset({"q", "k", "v"})


class Decision(NamedTuple):
    """Rows of one request to keep: ``[L, Hk, k]`` int64, ascending."""

    request: int
    ordinals: Tensor


class PagedCache:
    """Keys and values of many requests in pages of ``page`` rows; a page holds the rows of all heads."""

    def __init__(self, layers: int, heads: int, width: int, page: int = 16, pages: int = 64) -> None:
        self.page = page
        self.pools = tuple(torch.full((layers, pages, heads, page, width), torch.nan) for _ in range(2))
        self.free = list(range(pages))
        self.tables: dict[int, list[int]] = {}
        self.held: dict[int, int] = {}  # rows of each layer and head
        self.missing: dict[int, int] = {}  # tokens that are gone
        self.queries: dict[tuple[int, int], Tensor] = {}  # of a request and layer, in its last forward

    def open(self, request: int) -> None:
        self.tables[request], self.held[request], self.missing[request] = [], 0, 0

    def close(self, request: int) -> None:
        self.free += self.tables.pop(request)
        del self.held[request], self.missing[request]
        self.queries = {key: q for key, q in self.queries.items() if key[0] != request}

    def logical(self, request: int) -> int:
        """Tokens so far, which is the position of the next one."""
        return self.held[request] + self.missing[request]

    def slot(self, row: int) -> tuple[int, int]:
        """Page (of the request) and offset of a row."""
        return divmod(row, self.page)

    def grow(self, request: int, count: int) -> None:
        """Make room for new rows, in all layers."""
        self.held[request] += count
        while len(self.tables[request]) * self.page < self.held[request]:
            self.tables[request].append(self.free.pop(0))

    def write(self, request: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The newest rows ``[Hk, M, D]`` of a layer, and their queries ``[H, M, D]``."""
        rows = torch.arange(self.held[request] - k.shape[1], self.held[request])
        pages = torch.tensor(self.tables[request])[rows // self.page]
        for pool, new in zip(self.pools, (k, v), strict=True):
            pool[layer, pages, :, rows % self.page] = new.transpose(0, 1).to(pool.dtype)
        self.queries[request, layer] = q

    def read(self, request: int, layer: int) -> tuple[Tensor, Tensor]:
        """All rows of a layer, ``[Hk, K, D]`` each."""
        table = torch.tensor(self.tables[request])
        k, v = (pool[layer, table].transpose(0, 1).flatten(1, 2)[:, : self.held[request]] for pool in self.pools)
        return k, v

    def attend(self, request: int, layer: int) -> Tensor:
        """``[H, M, D]``: the newest tokens' attention to all rows."""
        q, (k, v) = self.queries[request, layer], self.read(request, layer)
        group, m, n = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
        logits = q @ k.repeat_interleave(group, 0).mT * q.shape[-1] ** -0.5
        ahead = torch.arange(n) > torch.arange(n - m, n)[:, None]
        return logits.masked_fill(ahead, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0)

    def compact(self, decision: Decision, unconfirmed: int = 0) -> None:
        """Move the rows that stay to the front, in place, and free the pages behind them.

        Raises:
            ValueError: the list is not ascending, names a row twice or one that is not there, or leaves out one of the
                ``unconfirmed`` newest rows, which a draft may still take back. Nothing has been moved then.
        """
        request, ordinals = decision
        n, k = self.held[request], ordinals.shape[2]
        if not (ordinals[..., 1:] > ordinals[..., :-1]).all() or ordinals.min() < 0 or ordinals.max() >= n:
            raise ValueError(f"rows must be ascending, each once, of 0 to {n - 1}, got {ordinals.tolist()}")
        if unconfirmed and not (ordinals[..., k - unconfirmed :] == torch.arange(n - unconfirmed, n)).all():
            raise ValueError(f"the newest {unconfirmed} rows are not confirmed, and must stay")
        table = torch.tensor(self.tables[request])
        layer, head = torch.arange(ordinals.shape[0])[:, None], torch.arange(ordinals.shape[1])
        for i in range(k):  # a source never stands before its destination, so that no second buffer is needed
            source = ordinals[..., i]
            for pool in self.pools:
                pool[layer, table[i // self.page], head, i % self.page] = pool[
                    layer, table[source // self.page], head, source % self.page
                ]
        keep = -(-k // self.page)
        self.free += self.tables[request][keep:]
        del self.tables[request][keep:]
        self.held[request], self.missing[request] = k, self.missing[request] + n - k


class Held:
    """One layer of one request, as :class:`tokred.kv.engine.Layer` wants one: state by row, and what was decided."""

    ragged, weights, nbytes, swaps = False, None, 0, False

    def __init__(self, index: int) -> None:
        self.index = index
        self.positions: Tensor | None = None  # [1, Hk, K] int32
        self.rows: dict[str, Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        self.clock = Clock()
        self.ordinals: Tensor | None = None
        self.tensors: tuple[Tensor, Tensor] | None = None

    def arrive(self, k: Tensor, v: Tensor, count: int, seen: int) -> None:
        """``count`` tokens have come; ``k`` and ``v`` ``[Hk, K, D]`` are all rows."""
        new = torch.arange(seen - count, seen, dtype=torch.int32).expand(1, k.shape[0], -1)
        self.positions = new if self.positions is None else torch.cat([self.positions, new], 2)
        self.rows = {name: torch.nn.functional.pad(state, (0, count)) for name, state in self.rows.items()}
        self.tensors, self.ordinals = (k[None], v[None]), None

    def shown(self) -> tuple[Tensor, Tensor]:
        return self.tensors

    def apply(self, step: Reduction, merge_score: str) -> None:
        index = step.representative
        self.ordinals = index if self.ordinals is None else self.ordinals.gather(2, index)
        self.positions = self.positions.gather(2, index)
        self.rows.update({name: state.gather(2, index) for name, state in self.rows.items()})
        self.tensors = tuple(t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[3])) for t in self.tensors)

    def sort(self) -> None:
        """Rows stand in the order of their slots, always."""

    def settle(self, site: CacheSite | None) -> None:
        pass


class PagedPolicy:
    """A cache policy at the five moments of an engine; every request has a session of its own.

    Raises:
        ValueError: the policy needs what such an engine does not offer, or cannot leave equal counts.
    """

    scope = "per_layer_perhead"

    def __init__(self, policy: CachePolicy, layers: int) -> None:
        parts = policy.parts
        self.policy, self.layers, self.needs = policy, layers, policy.reads
        self.touches_prompt = parts.when.prefill or parts.when.turns or parts.budget.name != "generated"
        self.sessions: dict[int, tuple[Engine, list[Held]]] = {}
        if self.needs - OFFERED:
            raise ValueError(f"{policy.name} needs {', '.join(sorted(self.needs - OFFERED))}, which is not offered")
        if parts.budget.headwise or parts.fate.merges or parts.fate.rewrites or parts.score.repeats is not None:
            raise ValueError(f"{policy.name} cannot run here: heads would hold different numbers of rows, or others")

    def request_init(self, request: int, prompt: int) -> None:
        engine = Engine(self.policy, self.layers)
        engine.prompt = prompt
        self.sessions[request] = engine, [Held(i) for i in range(self.layers)]

    def context_end(self, requests: list[int], view: PagedCache) -> list[Decision]:
        return self.step_end(requests, view)

    def step_begin(self, requests: list[int]) -> None:
        for request in requests:
            self.sessions[request][0].begin()

    def step_end(self, requests: list[int], view: PagedCache) -> list[Decision]:
        found = (self._decide(request, view) for request in requests)
        return [decision for decision in found if decision is not None]

    def request_finish(self, request: int) -> None:
        self.sessions.pop(request, None)

    def _decide(self, request: int, view: PagedCache) -> Decision | None:
        engine, layers = self.sessions[request]
        seen = view.logical(request)
        for held in layers:
            q, (k, v) = view.queries[request, held.index], view.read(request, held.index)
            held.arrive(k, v, q.shape[1], seen)
            site = CacheSite(q=q[None], k=k[None], v=v[None], positions=held.positions, seen=seen, rows=held.rows,
                             notes=held.notes, layer=held.index, depth=self.layers)  # fmt: skip
            if engine.watches(held.clock, seen):
                engine.observe(held, site, seen - q.shape[1])
        engine.finish()
        kept = [held.ordinals for held in layers]
        if all(one is None for one in kept):
            return None
        if len({None if one is None else one.shape[2] for one in kept}) > 1:
            raise ValueError(
                f"{self.policy.name} leaves layers with different numbers of rows, which one integer cannot say"
            )
        return Decision(request, torch.cat(kept))
