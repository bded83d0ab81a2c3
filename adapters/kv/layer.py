"""``TokLayer``: a cache layer whose rows are fewer than the tokens it has seen. A store holds them; see
:mod:`tokred.kv.stores`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.adapters.contract import host_object, members
from tokred.adapters.kv.crops import why_no_crop
from tokred.core.reduction import Reduction
from tokred.errors import TokenStateError, TokredError
from tokred.kv.described import Made, plain_bytes, storage_bytes
from tokred.kv.engine import Clock, Engine
from tokred.kv.site import CacheSite
from tokred.kv.stores.rectangle import with_more, without_row
from tokred.kv.stores.store import Shelf, Store, missing

if TYPE_CHECKING:
    from tokred.adapters.kv.sharing import Lent

CacheLayerMixin: Any = host_object("base of cache layers")


@members.under_each_name
class TokLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        engine: policy and state of the whole cache.
        index: which of the compressed layers this is.
        store: in what form rows are held; None: as the policy says.
        shelf: an empty one of the store, for the rows; None: one that knows of no other layer's.

    Attributes:
        shelf: the rows.
        seen: slots so far, evicted ones included: the length that the model is told.
        settled: slots when rows were last evicted; the cache cannot be cropped below.
        ragged: whether there may be empty rows.
        mixed: whether rows stand in another order than their slots, which those who look at :attr:`keys` do not see.
        weights: ``[B, Hk, K]`` float32, how many tokens each row stands for; None: one each.
        lent: what other layers attend to in this forward, see :mod:`tokred.adapters.kv.sharing`; None: none does.
        front: ``[B, Hk, n, D]`` keys of the first rows before a ``Front`` moved them; ``led``: slots when it last did.
        view: makes what a site takes of the rows, where they are not keys and values themselves; None: they are.
        rows, notes: state of the policy, by row ``[B, Hk, K]`` and of other shapes.
    """

    weights: Tensor | None
    front: Tensor | None
    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, engine: Engine, index: int, store: Store | None = None, shelf: Shelf | None = None) -> None:
        super().__init__()
        self.engine = engine
        self.index = index
        self.store = engine.parts.store if store is None else store
        self.shelf = self.store.open() if shelf is None else shelf
        # A budget in bytes is of all that is held.
        self.shelf.roomy = self.shelf.roomy and not isinstance(engine.parts.budget.amount, str)
        self._empty = self.shelf.snapshot()
        # The patched model has said that it will add to this layer; it has, and its attention is to come.
        self.armed = self.waiting = False
        self.lent: list[Lent] | None = None
        self.view: Callable[..., tuple[Tensor | Made, Tensor | Made]] | None = None
        self._clear()

    def _clear(self) -> None:
        self.shelf.restore(self._empty)
        self.is_initialized = False
        self.seen = self.settled = 0
        self.ragged = self.mixed = False
        self._gone: Tensor | int | None = None  # the hole that rows of the policy's state have too
        self.weights, self.front, self.led = None, None, 0
        self.rows: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.clock = Clock()
        self._slot_bytes = 0  # of one slot of all heads, as a dense cache would hold it

    @property
    def keys(self) -> Tensor | None:
        """``[B, Hk, K, D]``, or None while nothing has been seen; a copy where they are held in another form."""
        self.sort()
        self.shelf.lend()
        return self.shelf.keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Nothing: transformers' base class writes None before there is a shelf."""

    @property
    def values(self) -> Tensor | None:
        """``[B, Hk, K, D]``, as :attr:`keys`."""
        self.sort()
        self.shelf.lend()
        return self.shelf.values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """Nothing: the base class writes None here too."""

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the model's attention is handed, see :attr:`tokred.kv.stores.Shelf.newest`."""
        return self.shelf.newest

    @property
    def width(self) -> int:
        """Rows ``K`` of the rectangle: those of the longest head."""
        return self.shelf.width

    def shown(self) -> tuple[Tensor | Made, Tensor | Made]:
        """Keys and values as a site takes them."""
        return self.shelf.show() if self.view is None else self.view(*self.shelf.show())

    @property
    def compressed(self) -> bool:
        """True when rows have been evicted, so that rows and slots are no longer the same."""
        return self.shelf.moved

    @property
    def positions(self) -> Tensor | None:
        """``[B, Hk, K]`` int32, the slot of each row, ascending; None before anything has been evicted."""
        self.sort()
        return self.slots

    @property
    def slots(self) -> Tensor | None:
        """``[B, Hk, K]`` int32, as :attr:`positions`, of rows as they stand now."""
        return self.shelf.positions(self.seen)

    # ------------------------------------------------------------------ what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store.check(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device  # transformers up to 5.23 asks for the type
        self._slot_bytes = key_states.shape[1] * (plain_bytes(key_states) + plain_bytes(value_states))
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
        self.engine.admit(self, key_states, value_states)
        self.armed, self.waiting = False, True
        self.append(key_states, value_states)
        return self.newest

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows for the next slots."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n = keys.shape[2]
        if n > 1:
            self.sort()  # the newest of several queries are taken to stand in the order of their slots
        if self._gone is not None and (self.shelf.hole is None or torch.is_grad_enabled()):
            self.close()
        place, self._gone = self._gone, None
        self.shelf.append(keys, values)
        if self.weights is not None:
            self.weights = with_more(self.weights, n, 1.0, place)
        for name, state in self.rows.items():
            self.rows[name] = with_more(state, n, 0.0, place)
        self.seen += n

    def get_seq_length(self) -> int:
        """Slots seen, which positions follow from; never the number of rows."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows after the next ``query_length`` tokens, and how many slots they lag behind."""
        return self.width + query_length, self.seen - self.width

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.width:
            self._samples(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.width:
            self._samples(torch.arange(self.shelf.samples).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.width:
            self._samples(torch.arange(self.shelf.samples, device=indices.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens.

        Raises:
            ValueError: the number is positive, or :meth:`check_crop` says why not.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        count = -int(tokens_to_remove)
        self.check_crop(count)
        if count == 0 or not self.width:
            return
        self.sort()
        self.shelf.crop(count)
        left = self.width
        if self.weights is not None:
            self.weights = self.weights[:, :, :left]
        self.rows = {name: state[..., :left] for name, state in self.rows.items()}
        self.seen -= count

    def check_crop(self, count: int) -> None:
        """Refuse to take back what is not there as it was.

        Raises:
            ValueError: rows have been evicted since, scores have been accumulated that cannot be taken back, or the
                store cannot give rows back.
        """
        why = why_no_crop(self, count)
        if why:
            raise ValueError(why)

    # ------------------------------------------------------------------ what the engine calls

    def apply(self, step: Reduction, merge_score: str) -> None:
        """Replace the rows by what ``step`` makes of them, and free the others.

        Raises:
            TokredError: heads or samples would hold different numbers of rows, which the store cannot.
        """
        if step.mask is not None and "ragged" not in self.store.can:
            why = missing(self.store, {"ragged": "this batch (its samples or heads keep different numbers of rows)"})
            raise TokredError(f"{why}, and {self.store.name!r} cannot: give samples of one length, or choose another")
        self.close()
        positions = self._places(step.batch, step.representative.device)
        if step.mode == "keep":
            index = step.representative
            self.shelf.take(step, positions)
            self.weights = None if self.weights is None else self.weights.gather(2, index)
            rows = {name: state.gather(2, index) for name, state in self.rows.items()}
        else:
            self.shelf.merge(step, positions, self.weights)
            self.weights = step.sizes(self.weights).clamp(min=1)
            rows = {k: step.merge(x.unsqueeze(-1), mode=merge_score).squeeze(-1) for k, x in self.rows.items()}
        if step.mask is not None:
            rows = {name: state.masked_fill(~step.mask, 0.0) for name, state in rows.items()}
            # Fewer rows may be real than were asked for, and a store without empty rows is narrower then.
            width = self.width
            rows = {name: state[..., :width].contiguous() for name, state in rows.items()}
            self.weights = None if self.weights is None else self.weights[..., :width].contiguous()
        self.rows.clear()
        self.rows.update(rows)
        self.mixed = False
        self.ragged = step.mask is not None
        self.settled = self.seen

    @property
    def swaps(self) -> bool:
        """True if :meth:`swap` can be called now."""
        return self.shelf.swaps

    @property
    def turned(self) -> int:
        """Slots when :meth:`turn` was last called, if nothing but single rows has come since; else -1."""
        return self.shelf.turned

    def swap(self, gone: Tensor) -> None:
        """Free one row of each head, ``gone`` ``[B, Hk, 1]`` int64, whose place the next that comes will take."""
        self.shelf.swap(gone, self._places((gone.shape[0], gone.shape[1]), gone.device), self.seen)
        self._gone, self.mixed, self.settled = gone, True, self.seen

    def turn(self, first: int) -> bool:
        """Free the oldest row of each head behind the ``first`` slots; False if nothing was done."""
        if self.rows or self.weights is not None:
            return False
        if self.shelf.turned < 0:
            self.sort()
        done = self.shelf.turn(first, self.seen)
        if done:
            self.mixed, self.settled = True, self.seen
        return done

    def close(self) -> None:
        """Let the last row take the place of one that has been freed, in the policy's state too."""
        gone, self._gone = self._gone, None
        self.shelf.close()
        if isinstance(gone, Tensor):
            self.weights = None if self.weights is None else without_row(self.weights, gone)
            self.rows.update({name: without_row(state, gone) for name, state in self.rows.items()})

    def sort(self) -> Tensor | None:
        """Put rows in the order of their slots; returns it, ``[B, Hk, K]`` int64, or None where they stand so."""
        if not self.mixed:
            return None
        self.close()
        slots = self.slots
        assert slots is not None  # since the first swap
        order = slots.argsort(dim=-1)
        self.shelf.take(Reduction.keep(order, self.width), slots)
        self.weights = None if self.weights is None else self.weights.gather(2, order)
        self.rows.update({name: state.gather(2, order) for name, state in self.rows.items()})
        self.mixed = False
        return order

    def place(self, slots: Tensor) -> None:
        """Let the newest rows be of tokens that had left: slots ``[B, n]`` int32, ``SENTINEL`` in empty ones."""
        self.close()
        self.seen -= slots.shape[1]
        self.shelf.place(slots, self.seen)
        self.ragged = True  # whether samples have different numbers of them would have to be looked at
        self.mixed = True

    def _places(self, batch: tuple[int, ...], device: torch.device) -> Tensor:
        """``[B, Hk, K]`` int32: slots of rows as they stand, also where nothing has been evicted yet."""
        slots = self.slots
        if slots is None:
            slots = torch.arange(self.width, dtype=torch.int32, device=device).expand(*batch, -1)
        return slots

    def rewrite(self, values: Tensor, weights: Tensor | None, keys: Tensor | None = None) -> None:
        """Give rows other values ``[B, Hk, K, Dv]``, weights ``[B, Hk, K]`` and, unless None, keys ``[B, Hk, K, D]``;
        :meth:`apply` follows."""
        self.close()
        self.shelf.rewrite(values, self.slots, keys)
        self.weights = weights

    def settle(self, site: CacheSite | None) -> None:
        """The attention is over, and the policy has acted."""
        self.shelf.settle(site)

    def detach_newest(self, count: int) -> tuple[Tensor, Tensor]:
        """Take the newest ``count`` tokens off, to be appended again."""
        assert not self.compressed  # the prompt is still whole
        self.seen -= count
        return self.shelf.detach(count)

    @property
    def nbytes(self) -> int:
        """Bytes really held: the memory behind rows, positions, weights and the policy's state."""
        return storage_bytes([*self.shelf.tensors, self.weights, self.front, *self.rows.values(), *self.notes.values()])

    @property
    def away_bytes(self) -> int:
        """Those of :attr:`nbytes` that are kept in host memory, away from the device where the layer runs."""
        return storage_bytes(self.shelf.away)

    @property
    def held(self) -> int:
        """Rows of a head: the mean, rounded up, where no empty ones are held, else those of the longest."""
        return self.shelf.mean_width

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values of all slots, had they been kept as they came."""
        return self._slot_bytes * self.shelf.samples * self.seen if self.width else 0

    def snapshot(self) -> dict[str, Any]:
        """The layer's state, by reference: tensors are replaced, never changed in place."""
        self.close()
        kept = {k: v for k, v in self.__dict__.items() if k not in ("engine", "store", "_empty")}
        copied = {"rows": dict(self.rows), "notes": dict(self.notes), "clock": self.clock.copy()}
        return {**kept, **copied, "shelf": self.shelf.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the layer back to a state that :meth:`snapshot` returned."""
        self.__dict__.update({k: v for k, v in state.items() if k != "shelf"})
        self.rows, self.notes, self.clock = dict(state["rows"]), dict(state["notes"]), state["clock"].copy()
        self.shelf.restore(state["shelf"])

    def _samples(self, index: Tensor) -> None:
        """Hold the samples ``index`` ``[B']`` of the old ones."""
        self.close()
        b, uniform = self.shelf.samples, self.clock.uniform
        index = index.to(self.device)
        known: list[list[int]] = []

        def listed() -> list[int]:
            # Asking which samples they are waits for the device; needed only where samples differ.
            if not known:
                known.append(index.tolist())
            return known[0]

        self.shelf.select(index, listed)
        self.weights, self.front = (None if x is None else x.index_select(0, index) for x in (self.weights, self.front))
        for state in (self.rows, self.notes):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape[0] == b:
                    state[name] = value.index_select(0, index.to(value.device))
        self.clock = self.clock.select([0] * len(index) if uniform else listed())
