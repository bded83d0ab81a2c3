"""``TokLayer``: a cache layer whose rows are fewer than the tokens it has seen.

Its rows are a rectangle ``[B, Hk, K, D]`` to all who ask. They are held as one, with empty rows where heads or samples
hold different numbers; or flat, without empty rows, and the rows that came since as a rectangle of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.contract import host_object
from tokred.adapters.kv.flat import WASTE, Flat, flatten
from tokred.core.reduction import Reduction
from tokred.errors import TokenStateError
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_cache
from tokred.kv.engine import Clock, Session
from tokred.kv.site import Made

CacheLayerMixin: Any = host_object("base of cache layers")


class TokLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        session: policy and state of the whole cache.
        index: which of the compressed layers this is.
        layout: how rows are held after an eviction, ``"rectangle"``, ``"flat"``, or ``"auto"``: flat where a
            rectangle would hold more than 15 % of empty rows.

    Attributes:
        flat: rows that lie flat, or None.
        seen: slots so far, evicted ones included: the length that the model is told.
        settled: slots when rows were last evicted; the cache cannot be cropped below.
        ragged: whether there may be empty rows.
        weights: ``[B, Hk, K]`` float32, how many tokens each row stands for; None: one each.
        rows, notes: state of the policy, by row ``[B, Hk, K]`` and of other shapes.

    No tensor is ever changed in place, so a snapshot is a reference.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, session: Session, index: int, layout: str = "auto") -> None:
        super().__init__()
        self.session = session
        self.index = index
        self.layout = layout
        self.armed = False  # the patched model has said that it will add to this layer
        self.waiting = False  # it has, and its attention is to come
        self._clear()

    def _clear(self) -> None:
        self._keys: Tensor | None = None  # all rows, or those that came after the flat ones
        self._values: Tensor | None = None
        self.flat: Flat | None = None
        self.is_initialized = False
        self._positions: Tensor | None = None
        self.seen = 0
        self.settled = 0
        self.ragged = False
        self.weights: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.clock = Clock()

    # ------------------------------------------------------------------ rows

    @property
    def keys(self) -> Tensor | None:
        """``[B, Hk, K, D]``, or None while nothing has been seen; a copy where rows lie flat."""
        return self._keys if self.flat is None else self.flat.rectangle(self.flat.keys, self._keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value

    @property
    def values(self) -> Tensor | None:
        """``[B, Hk, K, D]``, as :attr:`keys`."""
        return self._values if self.flat is None else self.flat.rectangle(self.flat.values, self._values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are held: all, or where rows lie flat those that came later."""
        assert self._keys is not None  # asked for after an update
        assert self._values is not None
        return self._keys, self._values

    @property
    def width(self) -> int:
        """Rows ``K`` of the rectangle: those of the longest head."""
        later = 0 if self._keys is None else self._keys.shape[2]
        return later if self.flat is None else self.flat.width + later

    def shown(self) -> tuple[Tensor | Made, Tensor | Made]:
        """Keys and values as a site takes them: where rows lie flat, made only if someone reads them."""
        flat = self.flat
        if flat is None:
            assert self._keys is not None  # something is there to look at
            assert self._values is not None
            return self._keys.detach(), self._values.detach()

        def made(rows: Tensor, later: Tensor | None) -> Made:
            like = rows.new_empty(()).expand(flat.samples, flat.heads, self.width, rows.shape[-1])
            return Made(like, lambda: flat.rectangle(rows, later).detach())

        return made(flat.keys, self._keys), made(flat.values, self._values)

    # ------------------------------------------------------------------ what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device."""
        self.dtype, self.device = key_states.dtype, key_states.device  # transformers up to 5.23 asks for the type
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the newest tokens; returns :attr:`newest`, which the attention function expects.

        Raises:
            TokenStateError: the model that calls is not patched, so it would attend to the wrong rows.
        """
        if not self.armed:
            raise TokenStateError(
                "this cache belongs to a policy, but the model that uses it is not patched (any more): call "
                "tokred.apply(model, policy), or give the model a cache of its own"
            )
        self.session.admit(self, key_states, value_states)
        self.armed, self.waiting = False, True
        self.append(key_states, value_states)
        return self.newest

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows for the next slots."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n = keys.shape[2]
        if self._keys is None or self._values is None:
            self._keys, self._values = keys.contiguous(), values.contiguous()
        else:
            self._keys, self._values = torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)
        if self.weights is not None:
            self.weights = _grown(self.weights, n, 1.0)
        for name, state in self.rows.items():
            self.rows[name] = _grown(state, n, 0.0)
        self.seen += n

    @property
    def compressed(self) -> bool:
        """Whether rows have been evicted, so that rows and slots are no longer the same."""
        return self._positions is not None or self.flat is not None

    @property
    def positions(self) -> Tensor | None:
        """``[B, Hk, K]`` int32, the slot of each row; None before anything has been evicted.

        Rows that came after the last eviction hold the slots in order, so they are written down when someone asks.
        """
        known = self._positions
        if self.flat is not None:
            later = None if self._keys is None else self._newest(self._keys.shape[2], self.flat.slots.device)
            return self.flat.rectangle(self.flat.slots, later)
        if known is None:
            return None
        missing = self.width - known.shape[2]
        if missing:
            known = self._positions = torch.cat([known, self._newest(missing, known.device)], 2)
        return known

    def _newest(self, count: int, device: torch.device) -> Tensor:
        """``[B, Hk, count]`` int32, the slots of the newest rows, which hold them in order."""
        new = torch.arange(self.seen - count, self.seen, dtype=torch.int32, device=device)
        return new.expand(*self.newest[0].shape[:2], count)

    def get_seq_length(self) -> int:
        """Slots seen, which positions follow from; never the number of rows."""
        return self.seen

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows after the next ``query_length`` tokens, and how many slots they lag behind."""
        rows = self.width
        return rows + query_length, self.seen - rows

    def reset(self) -> None:
        """Empty."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Other samples: beams that survive."""
        if self.width:
            self._samples(lambda t: t.index_select(0, beam_idx.to(t.device)), lambda: beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample ``repeats`` times."""
        if self.width:
            b = self._batch
            index = [i for i in range(b) for _ in range(repeats)]
            self._samples(lambda t: t.repeat_interleave(repeats, 0), lambda: index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some samples."""
        if self.width:
            b = self._batch
            self._samples(lambda t: t[indices.to(t.device)], lambda: torch.arange(b)[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens.

        Raises:
            ValueError: the number is positive, or :meth:`check_crop` says why not.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        count = -int(tokens_to_remove)
        self.check_crop(count)
        if count == 0 or self._keys is None or self._values is None:
            return
        later, left = self._keys.shape[2] - count, self.width - count
        self._keys, self._values = _first(self._keys, later), _first(self._values, later)
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
        if not self.width or count == 0:
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
        index, (b, heads) = step.representative, step.batch
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.width, dtype=torch.int32, device=index.device).expand(b, heads, -1)
        if step.mode == "keep":
            positions = self._keep(index, step.mask, positions)
            self.weights = None if self.weights is None else self.weights.gather(2, index)
            rows = {name: state.gather(2, index) for name, state in self.rows.items()}
        else:
            weights = self.weights
            into = torch.where(step.target < 0, step.slots, step.target)
            last = torch.cat([positions.gather(2, index), positions.new_zeros(b, heads, 1)], 2)
            moved = positions.gather(2, step.source)
            positions = last.scatter_reduce(2, into, moved, "amax")[..., :-1]
            self._merge(step, weights, positions)
            self.weights = step.sizes(weights).clamp(min=1)
            rows = {k: step.merge(x.unsqueeze(-1), mode=merge_score).squeeze(-1) for k, x in self.rows.items()}
        if step.mask is not None:
            positions = positions.masked_fill(~step.mask, SENTINEL)
            rows = {name: state.masked_fill(~step.mask, 0.0) for name, state in rows.items()}
        if self.flat is not None:
            # Fewer rows may be real than were asked for, and then the rectangle of flat rows is narrower.
            width = self.flat.width
            rows = {name: state[..., :width].contiguous() for name, state in rows.items()}
            self.weights = None if self.weights is None else self.weights[..., :width].contiguous()
        self.rows.clear()
        self.rows.update(rows)
        self._positions = positions.contiguous() if self.flat is None else None
        self.ragged = step.mask is not None
        self.settled = self.seen

    def _keep(self, index: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Hold only the rows ``index``; returns their positions."""
        counts = self._lengths(mask)
        if counts is not None and mask is not None:
            slots = positions.gather(2, index)
            self.flat = flatten(self.flat, self._keys, self._values, slots, index, counts, mask)
            self._keys = self._values = None
            return slots
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        self.flat = None
        self._keys, self._values, slots = gather_cache(keys, values, positions, index)
        return slots

    def _merge(self, step: Reduction, weights: Tensor | None, slots: Tensor) -> None:
        """Hold only what ``step`` makes of the rows."""
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        self.flat, self._keys, self._values = None, step.merge(keys, weights), step.merge(values, weights)
        counts = self._lengths(step.mask)
        if counts is not None and step.mask is not None:
            index = torch.arange(step.slots, device=keys.device).expand(slots.shape)
            self.flat = flatten(None, self._keys, self._values, slots, index, counts, step.mask)
            self._keys = self._values = None

    def _lengths(self, mask: Tensor | None) -> list[int] | None:
        """Rows of each sample and head, if they are to lie flat; asking waits for the device, as all freeing does."""
        if mask is None or self.layout == "rectangle":
            return None
        packed = (mask[..., 1:] <= mask[..., :-1]).all()  # rows of a head stand before its empty ones
        *counts, packed = torch.cat([mask.sum(-1).view(-1), packed.view(1)]).tolist()
        wasted = 1 - sum(counts) / max(mask.numel(), 1)
        return counts if packed and (wasted > WASTE or (self.layout == "flat" and wasted > 0)) else None

    def detach_newest(self, count: int) -> tuple[Tensor, Tensor]:
        """Take the newest ``count`` tokens off, to be appended again."""
        assert not self.compressed  # the prompt is still whole
        keys, values = self.newest
        self._keys, self._values = keys[:, :, :-count], values[:, :, :-count]
        self.seen -= count
        return keys[:, :, -count:], values[:, :, -count:]

    # ------------------------------------------------------------------ the rest

    @property
    def nbytes(self) -> int:
        """Bytes really held: the memory behind keys, values, positions, weights and the policy's state."""
        flat = () if self.flat is None else self.flat.tensors
        known = (self._keys, self._values, self._positions, self.weights)
        tensors = [*flat, *known, *self.rows.values(), *self.notes.values()]
        memory = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
        return sum({m.data_ptr(): m.nbytes() for m in memory}.values())

    @property
    def held(self) -> int:
        """Rows of a head on average, rounded up, where they lie flat; else those of the longest."""
        if self.flat is None:
            return self.width
        mean = -(-self.flat.rows // (self.flat.samples * self.flat.heads))
        return self.width - self.flat.width + mean

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all samples and heads, keys and values."""
        if self.flat is not None:
            one = (self.flat.keys, self.flat.values)
            return self.flat.samples * self.flat.heads * sum(t.shape[-1] * t.element_size() for t in one)
        if self._keys is None:
            return 0
        b, heads = self._keys.shape[:2]
        return b * heads * sum(t.shape[3] * t.element_size() for t in self.newest)

    @property
    def _batch(self) -> int:
        return self.newest[0].shape[0] if self.flat is None else self.flat.samples

    def snapshot(self) -> dict[str, Any]:
        """Everything, by reference: tensors are replaced, never changed."""
        kept = {k: v for k, v in self.__dict__.items() if k != "session"}
        return {**kept, "rows": dict(self.rows), "notes": dict(self.notes), "clock": self.clock.copy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to what :meth:`snapshot` gave."""
        self.__dict__.update(state)
        self.rows, self.notes, self.clock = dict(state["rows"]), dict(state["notes"]), state["clock"].copy()

    def _samples(self, change: Callable[[Tensor], Tensor], index: Callable[[], list[int]]) -> None:
        b, uniform = self._batch, self.clock.uniform
        # Asking which samples they are waits for the device; needed only where samples differ.
        which = [] if uniform and self.flat is None else index()
        if self.flat is not None:
            self.flat = self.flat.select(which)
        for name in ("_keys", "_values", "_positions", "weights"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))
        for state in (self.rows, self.notes):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape[0] == b:
                    state[name] = change(value)
        self.clock = self.clock.select([0] * self._batch if uniform else which)


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows; a copy where a view would keep much more alive than it shows."""
    part = rows[:, :, :count]
    return part if count * 8 > rows.shape[2] * 7 else part.clone()


def _grown(state: Tensor, count: int, value: float) -> Tensor:
    return torch.cat([state, state.new_full((*state.shape[:2], count), value)], 2)
