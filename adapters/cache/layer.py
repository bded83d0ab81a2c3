"""``TokLayer``: a cache layer whose rows are fewer than the tokens it has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tokred.errors import TokenStateError
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_cache
from tokred.kv.session import Clock, Session
from tokred.reduction import Reduction


class TokLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        session: policy and state of the whole cache.
        index: which of the compressed layers this is.

    Attributes:
        keys, values: ``[B, Hk, K, D]``, or None while nothing has been seen. Never changed in place, so a snapshot is
            a reference.
        seen: slots so far, evicted ones included: the length that the model is told.
        settled: slots when rows were last evicted; the cache cannot be cropped below.
        ragged: whether there may be empty rows.
        weights: ``[B, Hk, K]`` float32, how many tokens each row stands for; None: one each.
        rows, notes: state of the policy, by row ``[B, Hk, K]`` and of other shapes.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, session: Session, index: int) -> None:
        super().__init__()
        self.session = session
        self.index = index
        self.armed = False  # the patched model has said that it will add to this layer
        self.waiting = False  # it has, and its attention is to come
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self._positions: Tensor | None = None
        self.seen = 0
        self.settled = 0
        self.ragged = False
        self.weights: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.clock = Clock()

    # ------------------------------------------------------------------ what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the newest tokens; returns all rows.

        Raises:
            TokenStateError: the model that calls is not patched, so it would attend to the wrong rows.
        """
        if not self.armed:
            raise TokenStateError(
                "this cache belongs to a policy, but the model that uses it is not patched (any more): call "
                "tokred.apply(model, policy), or give the model a cache of its own"
            )
        self.armed, self.waiting = False, True
        self.append(key_states, value_states)
        assert self.keys is not None  # just appended
        assert self.values is not None
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows for the next slots."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n = keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.contiguous(), values.contiguous()
        else:
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        if self.weights is not None:
            self.weights = _grown(self.weights, n, 1.0)
        for name, state in self.rows.items():
            self.rows[name] = _grown(state, n, 0.0)
        self.seen += n

    @property
    def compressed(self) -> bool:
        """Whether rows have been evicted, so that rows and slots are no longer the same."""
        return self._positions is not None

    @property
    def positions(self) -> Tensor | None:
        """``[B, Hk, K]`` int32, the slot of each row; None before anything has been evicted.

        Rows that came after the last eviction hold the slots in order, so they are written down when someone asks.
        """
        known = self._positions
        if known is None or self.keys is None:
            return known
        missing = self.keys.shape[2] - known.shape[2]
        if missing:
            new = torch.arange(self.seen - missing, self.seen, dtype=torch.int32, device=known.device)
            known = self._positions = torch.cat([known, new.expand(*known.shape[:2], missing)], 2)
        return known

    def get_seq_length(self) -> int:
        """Slots seen, which positions follow from; never the number of rows."""
        return self.seen

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows after the next ``query_length`` tokens, and how many slots they lag behind."""
        rows = 0 if self.keys is None else self.keys.shape[2]
        return rows + query_length, self.seen - rows

    def reset(self) -> None:
        """Empty."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Other samples: beams that survive."""
        if self.keys is None:
            return
        self._samples(lambda t: t.index_select(0, beam_idx.to(t.device)), lambda: beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample ``repeats`` times."""
        if self.keys is None:
            return
        b = self.keys.shape[0]
        self._samples(lambda t: t.repeat_interleave(repeats, 0), lambda: [i for i in range(b) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some samples."""
        if self.keys is None:
            return
        b = self.keys.shape[0]
        self._samples(lambda t: t[indices.to(t.device)], lambda: torch.arange(b)[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens.

        Raises:
            ValueError: the number is positive, or :meth:`check_crop` says why not.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        count = -int(tokens_to_remove)
        if count == 0 or self.keys is None or self.values is None:
            return
        self.check_crop(count)
        left = self.keys.shape[2] - count
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        if self._positions is not None:
            self._positions = self._positions[:, :, :left]
        if self.weights is not None:
            self.weights = self.weights[:, :, :left]
        self.rows = {name: state[..., :left] for name, state in self.rows.items()}
        self.seen -= count

    def check_crop(self, count: int) -> None:
        """Refuse to take back what is not there as it was.

        Raises:
            ValueError: rows have been evicted since, or scores have been accumulated that cannot be taken back.
        """
        if self.keys is None or count == 0:
            return
        if count > self.seen:
            raise ValueError(f"cannot remove {count} tokens from a cache that has seen {self.seen}")
        if self.seen - count < self.settled:
            raise ValueError(
                f"cannot crop to {self.seen - count} tokens: rows were evicted when the cache had seen {self.settled}; "
                "take cache.snapshot() before, and cache.restore() it"
            )
        if self.rows or self.notes:
            raise ValueError(
                f"cannot crop: {self.session.policy.name or 'the policy'} has counted the attention of the tokens that "
                "would go; take cache.snapshot() before, and cache.restore() it"
            )

    # ------------------------------------------------------------------ what the session calls

    def apply(self, step: Reduction, merge_score: str) -> None:
        """Replace the rows by what ``step`` makes of them, and free the others."""
        keys, values, index = self.keys, self.values, step.representative
        assert keys is not None  # something was there to decide on
        assert values is not None
        b, heads, n = keys.shape[:3]
        positions = self.positions
        if positions is None:
            positions = torch.arange(n, dtype=torch.int32, device=keys.device).expand(b, heads, n)
        if step.mode == "keep":
            self.keys, self.values, positions = gather_cache(keys, values, positions, index)
            self.weights = None if self.weights is None else self.weights.gather(2, index)
            rows = {name: state.gather(2, index) for name, state in self.rows.items()}
        else:
            weights = self.weights
            self.keys, self.values = step.merge(keys, weights), step.merge(values, weights)
            self.weights = step.sizes(weights).clamp(min=1)
            rows = {k: step.merge(x.unsqueeze(-1), mode=merge_score).squeeze(-1) for k, x in self.rows.items()}
            into = torch.where(step.target < 0, step.slots, step.target)
            last = torch.cat([positions.gather(2, index), positions.new_zeros(b, heads, 1)], 2)
            moved = positions.gather(2, step.source)
            positions = last.scatter_reduce(2, into, moved, "amax")[..., :-1]
        if step.mask is not None:
            positions = positions.masked_fill(~step.mask, SENTINEL)
            rows = {name: state.masked_fill(~step.mask, 0.0) for name, state in rows.items()}
        self.rows.clear()
        self.rows.update(rows)
        self._positions = positions
        self.ragged = step.mask is not None
        self.settled = self.seen

    def detach_newest(self, count: int) -> tuple[Tensor, Tensor]:
        """Take the newest ``count`` tokens off, to be appended again."""
        assert self.keys is not None
        assert self.values is not None
        assert not self.compressed  # the prompt is still whole
        keys, values = self.keys[:, :, -count:], self.values[:, :, -count:]
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        self.seen -= count
        return keys, values

    # ------------------------------------------------------------------ the rest

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, weights and the policy's state."""
        tensors = [self.keys, self.values, self._positions, self.weights, *self.rows.values(), *self.notes.values()]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def snapshot(self) -> dict[str, Any]:
        """Everything, by reference: tensors are replaced, never changed."""
        kept = {k: v for k, v in self.__dict__.items() if k != "session"}
        return {**kept, "rows": dict(self.rows), "notes": dict(self.notes), "clock": self.clock.copy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`snapshot` gave."""
        self.__dict__.update(state)
        self.rows, self.notes, self.clock = dict(state["rows"]), dict(state["notes"]), state["clock"].copy()

    def _samples(self, change: Any, index: Any) -> None:
        assert self.keys is not None
        b = self.keys.shape[0]
        for name in ("keys", "values", "_positions", "weights"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))
        for state in (self.rows, self.notes):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape[0] == b:
                    state[name] = change(value)
        # Asking which samples they are waits for the device; needed only where samples differ.
        uniform = self.clock.uniform
        self.clock = self.clock.select([0] * self.keys.shape[0] if uniform else index())


def _grown(state: Tensor, count: int, value: float) -> Tensor:
    return torch.cat([state, state.new_full((*state.shape[:2], count), value)], 2)
