"""Blocks of packed towers, run with fewer rows: the host's own block, told anew where each frame and window ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.adapters.encoder.block import (
    SETTINGS,
    Recipe,
    Settings,
    attention_bias,
    check_capture,
    decide,
    follow,
    refuse_symbols,
)
from tokred.adapters.encoder.capture import Capture, add_bias
from tokred.adapters.encoder.packed.layout import Layout, PackedState
from tokred.adapters.encoder.sides import Sides
from tokred.adapters.encoder.state import START, Shared, TokenState
from tokred.adapters.passes import check_not_mapped
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.errors import TokenStateError, UnsupportedModelError

_SDPA = torch.nn.functional.scaled_dot_product_attention


class PackedCapture(Capture):
    """Watches one block's attention over all segments, which may come in one call or in a call each.

    Args:
        bias: ``(M,)`` float32, to add to the logit of every row as a key, or None.
        noted: whether queries, keys and values are kept.
    """

    def __init__(self, bias: Tensor | None, noted: bool) -> None:
        super().__init__(None, 0, None)
        self.flat = bias
        self.noted = noted
        self.seen = 0
        self.pieces: list[tuple[Tensor, ...]] = []
        self.joined: dict[int, Tensor] = {}

    def release(self) -> None:
        """Let go of queries, keys and values, so that their memory serves the MLP that follows."""
        super().release()
        self.pieces, self.joined = [], {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(words.SDPA, args, strict=False)), **(kwargs or {})}
        q, k, v = call["query"], call["key"], call["value"]
        if call.get(words.SDPA_CAUSAL):
            self.causal = True
        self.scale = call.get(words.SDPA_SCALE)
        if self.flat is not None:
            own = self.flat[self.seen : self.seen + k.shape[2]].view(1, 1, 1, -1)
            call[words.SDPA_MASK] = add_bias(call.get(words.SDPA_MASK), own, q.dtype)
        if self.noted:
            self.pieces.append((q, k, v))
        self.seen += k.shape[2]
        self.calls += 1
        return func(**call)

    def whole(self, i: int) -> Tensor:
        """``(M, H, D)`` queries, keys or values of all rows, put together once for all groups."""
        if i not in self.joined:
            self.joined[i] = torch.cat([p[i] for p in self.pieces], 2)[0].transpose(0, 1)
        return self.joined[i]

    def check(self, rows: int, settings: Settings) -> None:
        """Refuse an attention that was not seen, or that saw other rows than there are.

        Raises:
            UnsupportedModelError: sizes would not have reached it.
        """
        check_capture(self, settings)
        if self.seen != rows:
            raise UnsupportedModelError(
                f"the attention of {settings.name} saw {self.seen} rows in all, but {rows} are left: its segments are "
                "not those that tokred knows of"
            )


class Part(Capture):
    """Queries, keys and values of one group of frames, cut out of those of all rows when they are asked for.

    Args:
        made: makes queries, keys or values ``(G, H, M, D)`` by their number.
        bias: ``(G, M)`` what is added to the logit of each key, or None.
        scale: factor of the logits.
    """

    def __init__(self, made: Callable[[int], Tensor], bias: Tensor | None, scale: float | None) -> None:
        super().__init__(None, 0, None)
        self.made, self.added, self.scale = made, bias, scale

    def part(self, i: int) -> Tensor | None:
        """Queries, keys or values."""
        return self.made(i)

    def key_bias(self) -> Tensor | None:
        """``(G, M)`` what is added to the logit of each key, or None."""
        return self.added


class PackedRecipe(Recipe):
    """Blocks over one sequence of rows.

    Args:
        split: the block is a composition of ``norm1, attn, norm2, mlp`` that may be split in the middle.
        argument_names: of the block's forward, after the tokens.
        taps: blocks whose output is read at full length.
        whole: blocks whose segments are frames; the segments of all others are windows. None: all.
        batched: rows come as a batch of one, and a mask tells the segments apart.
        keys: what makes keys of a module's output ``(M, ...)``, before rotary embedding: ``(M, H, D)``.
    """

    heads: ClassVar[bool] = False

    def __init__(
        self,
        split: bool,
        argument_names: tuple[str, ...],
        taps: frozenset[int],
        whole: frozenset[int] | None,
        batched: bool,
        keys: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(split, {}, argument_names)
        self.taps, self.whole, self.batched, self.keys = taps, whole, batched, keys

    @property
    def supplies(self) -> frozenset[str]:
        """Inputs of a method that come from the way in which blocks are run."""
        return frozenset({"carried", "entry"})

    def run(self, block: Any, host_forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
        """One forward of a patched block."""
        refuse_symbols(x)
        settings: Settings = getattr(block, SETTINGS)
        shared = settings.shared
        state, rows = enter(shared, settings.layer, x, x[0] if self.batched else x)
        n, method = rows.shape[0], shared.method
        place = Place(settings.layer, shared.depth)
        active = [settings.active and method.acts(p.shape[1], place) for p in state.places]
        if any(active) and method.where == "before":
            state, rows = enter_cells(settings, state, rows)
            active = [False] * len(active)
        kwargs, state = self.shorter(self.bind(args, kwargs), state, settings.layer)
        biases = [attention_bias(p, method.proportional) for p in state.parts]
        # Padding has left with the packing, so that there is nothing to add but sizes.
        bias = _flat_bias(state, biases) if method.proportional and state.size is not None else None
        moved = state.kept is not None or bias is not None
        if not any(active) and not moved:
            out = host_forward(x, **kwargs)
            return self.leave(settings, out[0] if self.batched else out, state, n)
        capture = PackedCapture(bias, noted=any(active))
        if any(active) and self.split and method.where != "end":
            with capture:
                rows = rows + words.SELF.need(block)(members.NORM1.need(block)(rows), **kwargs)
            state, rows = self.reduce(settings, capture, state, rows, biases, active)
            rows = rows + words.MLP.need(block)(members.NORM2.need(block)(rows))
        else:
            with capture:
                out = host_forward(rows.unsqueeze(0) if self.batched else rows, **kwargs)
            rows = out[0] if self.batched else out
            state, rows = self.reduce(settings, capture, state, rows, biases, active)
        if settings.tap is not None:
            settings.tap.take()  # keys that nobody asked for are not kept alive
        return self.leave(settings, rows, state, n)

    def shorter(self, kwargs: dict[str, Any], state: PackedState, layer: int) -> tuple[dict[str, Any], PackedState]:
        """The block's arguments for the rows that are left: ends of segments or a mask, and rotary tables."""
        kept, windowed = state.kept, self.whole is not None and layer not in self.whole
        full = state.layout.ends(None, windowed)
        if not self.batched:
            given = words.SEGMENTS.at(kwargs)
            if given.shape != full.shape or not bool((given == full).all()):
                raise UnsupportedModelError(
                    f"block {layer} was given segments that end at {given.tolist()[1:]}, where tokred knows of "
                    f"{full.tolist()[1:]}: call the tower with grid_thw alone"
                )
        ends = full if kept is None else state.layout.ends(kept, windowed)
        pairs = (ends.diff().square().sum(), full.diff().square().sum())
        if kept is None:
            return kwargs, replace(state, pairs=pairs)
        kwargs = dict(kwargs)
        if not self.batched:
            kwargs[words.SEGMENTS.key(kwargs)] = ends
            if words.LONGEST.of(kwargs) is not None:
                kwargs[words.LONGEST.key(kwargs)] = int(ends.diff().max())
        mask = words.ATTENTION_MASK.of(kwargs)
        if mask is not None:
            # Images are told apart by it: the same rows and columns of it are left.
            words.ATTENTION_MASK.put(kwargs, mask.index_select(-1, kept).index_select(-2, kept))
        tables = words.TABLES.at(kwargs)
        words.TABLES.put(kwargs, tuple(t.index_select(0, kept) for t in tables))
        return kwargs, replace(state, pairs=pairs)

    def reduce(
        self,
        settings: Settings,
        capture: PackedCapture,
        state: PackedState,
        rows: Tensor,
        biases: list[Tensor | None],
        active: list[bool],
    ) -> tuple[PackedState, Tensor]:
        """State and rows after the method's decisions, one for each group of frames."""
        capture.check(rows.shape[0], settings)
        if not any(active):
            return state, rows
        shared, tap = settings.shared, settings.tap
        if capture.causal:
            raise UnsupportedModelError("causal attention cannot carry fewer tokens: their order is not kept")
        tapped = None if tap is None else tap.take()
        keys = None if tapped is None else self.keys(tapped)
        parts, xs = [], []
        for i, (part, x, bias) in enumerate(zip(state.parts, state.unpack(rows), biases, strict=True)):
            if active[i]:
                made = Part(
                    lambda which, i=i: _heads(state, capture.whole(which), i),  # type: ignore[misc]
                    None if bias is None else bias[:, 0, 0],
                    capture.scale,
                )
                if keys is not None and tap is not None:
                    tap.put(_heads(state, keys, i))
                step, part = decide(settings, made, part, x)
                part, x = follow(shared, step, part, x)
            parts.append(part)
            xs.append(x)
        capture.release()
        if all(a is b for a, b in zip(parts, state.parts, strict=True)):
            return state, rows
        after = replace(PackedState.settled(state.layout, tuple(parts)), pairs=state.pairs)
        return after, after.pack(xs)

    def leave(self, settings: Settings, rows: Tensor, state: PackedState, n: int) -> Tensor:
        """The block's output, with its state, at full length where something reads it so."""
        shared, layer = settings.shared, settings.layer
        shared.record(layer, n, rows.shape[0], state)
        full = shared.exposes(layer) or layer in self.taps
        if shared.running.expose_all:
            shared.running.final = state
        if full and state.kept is not None:
            rows = state.restore(rows)
        if full:
            state = replace(state, exposed=state.kept is not None)
        return shared.attach(layer, rows.unsqueeze(0) if self.batched else rows, state)


def enter(shared: Shared, layer: int, x: Tensor, rows: Tensor) -> tuple[PackedState, Tensor]:
    """State and rows at the entry of a block.

    Args:
        shared: of all blocks.
        layer: which block.
        x: its input, on which the state rides.
        rows: ``(M, C)`` the rows in it.

    Raises:
        TokenStateError: nothing is known of the rows.
    """
    if layer == 0:
        return begin(shared, x, rows), rows
    state = shared.carried(layer, x)
    assert isinstance(state, PackedState)
    if layer == shared.method.joins(shared.depth):
        return PackedState.begin(state.layout), rows if state.exposed else state.restore(rows)
    if state.exposed:
        return replace(state, exposed=False), state.shorten(rows)
    return state, rows


def begin(shared: Shared, x: Tensor, rows: Tensor) -> PackedState:
    """The state before the first block, by the note that the tower's hook left.

    Raises:
        TokenStateError: there is none, or it speaks of other rows.
        UnsupportedModelError: the model runs inside ``torch.func.vmap``.
    """
    check_not_mapped()
    layout: Any = shared.note.take()
    if layout is None and not torch.compiler.is_compiling():
        # A checkpoint runs the block once more, without the hook.
        own, found = getattr(x, START, (None, None))
        before = shared.slots.again(0, x)
        if own is shared:
            layout = found
        elif before is not None:
            layout = getattr(before, "layout", None)
    if not isinstance(layout, Layout) or layout.length != rows.shape[0]:
        raise TokenStateError(
            f"the first block was given {rows.shape[0]} rows, but nothing is known of the images that they are of: "
            "call the tower itself (or the model around it), not its blocks"
        )
    state = PackedState.begin(layout)
    if not torch.compiler.is_compiling():
        again = torch.is_grad_enabled() or x.requires_grad
        setattr(x, START, (shared, layout if again else layout.lean()))
        shared.slots.keep(0, x, state if again else replace(state, layout=layout.lean(), parts=()))
    return state


def enter_cells(settings: Settings, state: PackedState, rows: Tensor) -> tuple[PackedState, Tensor]:
    """State and rows after a decision before the first block, about whole cells: one whose rows were let in by half
    would be joined from wrong ones."""
    side, shared = state.layout.cell, settings.shared
    parts, xs = [], []
    for part, x in zip(state.parts, state.unpack(rows), strict=True):
        assert part.sides is not None  # of every group
        sides = part.sides
        table = _cells(sides, side, rows.device)
        pixels = None if sides.pixels is None else _of_cells(sides.pixels, table)
        whole = TokenState(
            len(table), sides=Sides(sides.frames, sides.rows // side, sides.columns // side, pixels=pixels)
        )
        step, _ = decide(settings, Capture(None, len(table), None), whole, x[:, table.flatten()].flatten(2).view(
            x.shape[0], len(table), -1
        ))  # fmt: skip
        part = part.lean()
        part, x = follow(shared, step if step.trivial else _expanded(step, table, part.length), part, x)
        parts.append(part)
        xs.append(x)
    after = PackedState.settled(state.layout.lean(), tuple(parts))
    return after, after.pack(xs) if after.kept is not None else rows


def _cells(sides: Sides, side: int, device: torch.device) -> Tensor:
    """``(cells, side * side)`` int64: the patches of each cell, both in reading order."""
    number = torch.arange(sides.number, device=device)
    maps = number.view(-1, sides.rows // side, side, sides.columns // side, side)
    return maps.transpose(2, 3).reshape(-1, side * side)


def _of_cells(pixels: Tensor, table: Tensor) -> Tensor:
    """``(G, cells, F')`` float32: pixels ``(G, N, F)`` of the patches of each cell, channel after channel."""
    found = pixels[:, table].float()
    g, cells, unit, many = found.shape
    # Patches hold the channels one after another: three of colour, or what there is.
    channels = 3 if many % 3 == 0 else 1
    return found.view(g, cells, unit, channels, -1).transpose(2, 3).reshape(g, cells, -1)


def _expanded(step: Reduction, table: Tensor, length: int) -> Reduction:
    """A reduction of cells as one of their patches."""
    unit = table.shape[1]
    offset = torch.arange(unit, device=table.device)

    def slots(index: Tensor) -> Tensor:
        wide = index.unsqueeze(-1) * unit + offset
        return torch.where(index.unsqueeze(-1) < 0, -1, wide).flatten(1)

    return replace(
        step,
        representative=table[step.representative].flatten(1),
        source=table[step.source].flatten(1),
        target=slots(step.target),
        length=length,
        mask=None if step.mask is None else step.mask.repeat_interleave(unit, 1),
    )


def _heads(state: PackedState, whole: Tensor, i: int) -> Tensor:
    """``(G, H, M, D)`` of one group, of ``(M, H, D)`` of all rows."""
    places = state.places[i]
    return whole.index_select(0, places.flatten()).view(*places.shape, *whole.shape[1:]).transpose(1, 2)


def _flat_bias(state: PackedState, biases: list[Tensor | None]) -> Tensor:
    """``(M,)`` what is added to the logit of each row as a key."""
    rows = [
        torch.zeros(p.shape, device=p.device) if b is None else b[:, 0, 0].float()
        for b, p in zip(biases, state.places, strict=True)
    ]
    return state.pack([r.unsqueeze(-1) for r in rows])[:, 0]
