"""The state of a token sequence on its way through the blocks: sizes, the source map, and how they travel.

The state rides on the block's output tensor as an attribute, so it follows the data through checkpointing, compilation,
export and several forwards in flight. Where the attribute is lost (wrappers that rebuild tensors, such as FSDP2), a
slot per block, checked by shape and address, gives it back; where neither is certain, an error is raised instead of a
guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.adapters.encoder.running import LayerRecord, Running, Slots
from tokred.adapters.encoder.sides import Note, Sides
from tokred.adapters.host import State
from tokred.adapters.passes import recomputed
from tokred.adapters.records import Records
from tokred.adapters.watch import Watch
from tokred.core.learned import Learned
from tokred.core.reduction import Gated, Reduction
from tokred.encoder.method import BlockMethod
from tokred.errors import NothingRecordedError, TokenStateError, UnsupportedModelError
from tokred.kernels.dispatch import mapped

ATTRIBUTE = "_tokred_state"
START = "_tokred_start"
REENTRANT = (
    "{method!r} drops tokens and this model reads them at full length, so gradients have to pass by the blocks, which "
    "reentrant checkpointing cuts off: checkpoint with use_reentrant=False (transformers: "
    'gradient_checkpointing_enable({{"use_reentrant": False}}); timm: timm.layers.set_reentrant_ckpt(False))'
)
LEARNING = (
    "{method!r} learns by losses that it computes inside the blocks, which reentrant checkpointing cuts off: "
    "checkpoint with use_reentrant=False"
)


@dataclass(frozen=True, eq=False)
class TokenState:
    """State of one token sequence between two blocks.

    Attributes:
        length: ``N``, tokens before the first block.
        size: ``(B, M)`` float32, original tokens per row; None while every row is one. Never half precision, which
            cannot count past 256.
        representative: ``(B, M)`` original position that each row stands at; None while nothing has moved.
        steps: the reductions so far, first to last.
        dropped: for each step, the features before it where it dropped tokens and they may have to be restored.
        mask: ``(B, M)`` bool, False on padding; None: all real.
        exposed: whether the tensor that carries this state has been restored to full length.
        lengths: ``(B,)`` int64, real tokens before the first block where the batch was padded; None: ``length`` each.
        heads: ``(B, H)`` bool, False on heads of the attention that have been left out; None: all are there.
        rows, notes: what the method keeps for each token ``(B, M)`` and for each sample; None: nothing.
        sides: how the original patches stand; None where that is not known.
        gate: ``(B, M)`` float32, the product of all soft decisions of a method that learns; None: there were none.
        gated: what the gate does, as :attr:`tokred.Reduction.gated`.
        fresh: ``(B, M)`` what the features are multiplied by at the end of the block at hand; None: nothing.
    """

    length: int
    size: Tensor | None = None
    representative: Tensor | None = None
    steps: tuple[Reduction, ...] = ()
    dropped: tuple[Tensor | None, ...] = ()
    mask: Tensor | None = None
    exposed: bool = False
    lengths: Tensor | None = None
    heads: Tensor | None = None
    rows: Mapping[str, Tensor] | None = None
    notes: Mapping[str, Tensor] | None = None
    sides: Sides | None = None
    gate: Tensor | None = None
    gated: Gated = "keys"
    fresh: Tensor | None = None

    def lean(self) -> TokenState:
        """The state without the pixels, which are asked for before the first block alone."""
        return self if self.sides is None else replace(self, sides=self.sides._replace(pixels=None))

    @property
    def keys(self) -> Tensor | None:
        """``(B, M)`` float32: how far attention sees each key; None: all of them alike."""
        return self.gate if self.gated == "keys" else None

    def soften(self, step: Reduction) -> TokenState:
        """The state with the soft decisions of ``step``."""
        assert step.gate is not None  # else there is nothing to do
        gate = step.gate if self.gate is None else self.gate * step.gate
        return replace(self, gate=gate, gated=step.gated, fresh=step.gate if step.gated == "rows" else None)

    def finish(self, y: Tensor) -> tuple[TokenState, Tensor]:
        """The output of a block with its factors, which are used up."""
        if self.fresh is None:
            return self, y
        return replace(self, fresh=None), y * self.fresh.unsqueeze(-1).to(y.dtype)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the original patches (of one frame)."""
        return None if self.sides is None else (self.sides.rows, self.sides.columns)

    @property
    def frames(self) -> int | None:
        """Frames (or tubelets in time) that a video's tokens come from, frame after frame."""
        return None if self.sides is None else self.sides.frames

    def motion(self, prefix: int, suffix: int) -> Tensor | None:
        """``(B, M)`` float32: how much the patch that each token stands for moves; protected tokens do not; or None."""
        known = None if self.sides is None else self.sides.motion
        if known is None:
            return None
        known = torch.nn.functional.pad(known, (prefix, suffix))
        return known if self.representative is None else known.gather(1, self.representative)

    def advance(self, step: Reduction, x: Tensor, keep_dropped: bool) -> tuple[TokenState, Tensor]:
        """The state after ``step``, taken on tokens ``x``, and the tokens."""
        rep = step.representative if self.representative is None else self.representative.gather(1, step.representative)
        before = x if keep_dropped else None
        y, size = step.step(x, self.size)
        state = TokenState(self.length, size, rep, (*self.steps, step), (*self.dropped, before), step.mask)
        return state._with(self, step), y

    def with_exposed(self, exposed: bool) -> TokenState:
        """The same state, for a tensor of full (or short) length."""
        state = TokenState(self.length, self.size, self.representative, self.steps, self.dropped, self.mask, exposed)
        return state._with(self)

    def _with(self, before: TokenState, step: Reduction | None = None) -> TokenState:
        """This state with what does not change from block to block, and with what few methods need, as it was, or after
        ``step``."""
        kept = (before.lengths, before.heads, before.rows, before.notes, before.sides, before.gate)
        if all(value is None for value in kept):
            return self
        rows = before.rows
        if step is not None and rows is not None:
            rows = {name: values.gather(1, step.representative) for name, values in rows.items()}
        gate, fresh = before.gate, before.fresh
        if step is not None and gate is not None:
            gate = gate.gather(1, step.representative)
            fresh = None if fresh is None else fresh.gather(1, step.representative)
        out = replace(self, lengths=before.lengths, heads=before.heads, rows=rows, notes=before.notes)
        return replace(out, sides=before.sides, gate=gate, gated=before.gated, fresh=fresh)

    def composed(self) -> Reduction | None:
        """All steps as one reduction, or None when there was none."""
        if not self.steps:
            return None
        total = self.steps[0]
        for step in self.steps[1:]:
            total = total.then(step)
        return total

    def with_gate(self, total: Reduction) -> Reduction:
        """``total``, which is all steps as one, with the soft decisions about the original tokens."""
        if self.gate is None:
            return total
        gate = self.gate
        if self.steps:
            index = total.index
            gate = torch.where(index < 0, 0, gate.gather(1, index.clamp(min=0)))
        else:
            total = Reduction.identity((gate.shape[0],), self.length, gate.device)
        return replace(total, gate=gate, gated=self.gated)

    def restore(self, y: Tensor) -> Tensor:
        """``(B, M, C)`` back to ``(B, N, C)``. A dropped token takes its last features before it was dropped."""
        if all(step.composes for step in self.steps) and all(x is None for x in self.dropped):
            total = self.composed()
            return y if total is None else total.unmerge(y)
        for step, before in zip(reversed(self.steps), reversed(self.dropped), strict=True):
            y = step.unmerge(y, fill=before)
        return y

    def shorten(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to the rows of this state: the inverse of :meth:`restore`."""
        if self.representative is None:
            return x
        rows = self.representative + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
        return x.reshape(-1, x.shape[-1]).index_select(0, rows.reshape(-1)).view(*rows.shape, x.shape[-1])


class Shared(State):
    """State that the blocks of one patched model share: the method, the slots and the record of the last forward.

    Holds no module of the host, so copying a block does not copy the model. Copies and pickles start with empty slots.
    """

    stage = "block"

    def __init__(self, method: BlockMethod, depth: int, prefix: int, suffix: int, restore: str, drops: bool) -> None:
        self.method = method
        self.depth = depth
        self.prefix = prefix
        self.suffix = suffix
        self.restore = restore  # "none", "last" or "all": which blocks return full length
        self.drops = drops
        self.note = Note()
        self.class_token: bool | int = False
        self.windows = "auto"
        self.watch = Watch()
        self.module: nn.Module | None = None  # of the method, where it has weights
        self.losses: dict[str, Tensor] | None = None  # of the last forward in training; None: there was none
        self.guesses: list[Tensor] = []  # of the same forward
        self._forget()

    def _forget(self) -> None:
        self.running = Running()
        self.slots = Slots(self.running)
        self.records: Records[int, LayerRecord] = Records()  # of the blocks of the last forward

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "guesses": [], "losses": None}
        return {k: v for k, v in state.items() if k not in ("running", "slots", "records")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @contextlib.contextmanager
    def exposing(self) -> Iterator[None]:
        """While open, every block returns full length."""
        before = self.running.expose_all
        self.running.expose_all = True
        try:
            yield
        finally:
            self.running.expose_all = before

    def intermediates(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A host's function that returns what single blocks made, and at times the final tokens, too: the former come
        at full length, since they are put on maps; the latter at the length that the model's forward gives them."""
        self.running.final = None
        try:
            with self.exposing():
                out = original(*args, **kwargs)
            state: TokenState | None = self.running.final  # set by the last block on the way
        finally:
            self.running.final = None
        if (
            state is None
            or not state.steps
            or self.restore != "none"
            or original.__name__ not in members.INTERMEDIATES.names
        ):
            return out

        def short(y: Any) -> Any:
            full = isinstance(y, Tensor) and y.ndim == 3 and y.shape[1] == state.length
            return state.shorten(y) if full else y

        if isinstance(out, tuple):
            return (short(out[0]), *out[1:])
        if isinstance(out, dict) and words.MAPPED_FEATURES.among(out):
            return {**out, words.MAPPED_FEATURES.key(out): short(words.MAPPED_FEATURES.at(out))}
        return out

    def keeps_dropped(self, state: TokenState) -> bool:
        """True where every step has to keep its features, because tokens vanish and full length will be asked for."""
        vanish = self.method.drops or (self.drops and state.lengths is not None)
        wanted = self.running.expose_all or self.restore != "none"
        return vanish and (wanted or self.method.joins(self.depth) is not None)

    def enter(self, layer: int, x: Tensor) -> tuple[TokenState, Tensor]:
        """State and short tokens at the entry of block ``layer``.

        Raises:
            UnsupportedModelError: the method learns inside a reentrant checkpoint, where its losses have no gradient.
        """
        if self.learns and x.requires_grad and not torch.is_grad_enabled():
            raise UnsupportedModelError(LEARNING.format(method=self.method.name))
        if layer == 0:
            return self.begin(x, x.shape[1]), x
        return self.fitted(layer, self.carried(layer, x), x)

    def fitted(self, layer: int, state: TokenState, x: Tensor) -> tuple[TokenState, Tensor]:
        """State and tokens as block ``layer`` takes them: all again where the method joins them there, else short."""
        if layer == self.method.joins(self.depth):
            # What the host knows of the original tokens (its mask, tables of positions) fits them again.
            return TokenState(state.length, sides=state.sides), x if state.exposed else state.restore(x)
        return (state, state.shorten(x)) if state.exposed else (state, x)

    @property
    def learns(self) -> bool:
        """True while the method has weights that are being trained, or none, and losses on the model's own."""
        module = self.module
        if module is None or not module.training:
            return False
        own = list(module.parameters())
        return any(p.requires_grad for p in own) or (not own and self.method.gradients)

    def begin(self, x: Tensor, length: int) -> TokenState:
        """The state of tokens ``x`` that enter the first block.

        Their sides go on with ``x``, for a checkpoint that runs the block once more.
        """
        if self.module is not None and not recomputed():
            self.losses, self.guesses = ({} if self.module.training else None), []
        sides = self.note.take()
        if sides is None and not torch.compiler.is_compiling():
            own, found = getattr(x, START, (None, None))
            before = self.slots.again(0, x)
            if own is self:
                sides = found
            elif before is not None:
                sides = before.sides
        if sides is not None and sides.number != length - self.prefix - self.suffix:
            sides = None  # patches were taken out on the way, so that those that are left form no map
        state = TokenState(length, sides=sides)
        if not torch.compiler.is_compiling():
            setattr(x, START, (self, sides))
            # Pixels are asked for again by a checkpoint alone, and are not kept alive where there can be none.
            again = torch.is_grad_enabled() or x.requires_grad
            self.slots.keep(0, x, state if again else state.lean())
        return state

    def carried(self, layer: int, x: Tensor) -> TokenState:
        """The state that came with ``x``, the output of the block before ``layer``.

        Raises:
            UnsupportedModelError: what was dropped before would have to be restored inside a reentrant checkpoint. It
                rides on the state, not among the checkpoint's inputs, so that no gradient would reach it.
            TokenStateError: no state came with it.
        """
        state: TokenState | None = getattr(x, ATTRIBUTE, None)
        state = self._from_slot(layer, x) if state is None else state
        # Only a reentrant checkpoint runs without gradients what is to be differentiated.
        if x.requires_grad and not torch.is_grad_enabled() and any(t is not None for t in state.dropped):
            raise UnsupportedModelError(REENTRANT.format(method=self.method.name))
        return state

    def collect(self, learned: Learned) -> None:
        """Add terms of the training loss. A checkpoint's recomputation adds none: they are in the first forward's."""
        if self.losses is None or recomputed():
            return
        self.guesses += learned.guesses
        for name, term in learned.losses.items():
            self.losses[name] = self.losses[name] + term if name in self.losses else term

    def exposes(self, layer: int) -> bool:
        """True for a block that returns full length."""
        return self.running.expose_all or self.restore == "all" or (layer == self.depth - 1 and self.restore == "last")

    def leave(self, layer: int, y: Tensor, state: TokenState, tokens_in: int) -> Tensor:
        """Attach ``state`` to a block's output, restored to full length where the model's head needs it."""
        full = self.exposes(layer)
        self.record(layer, tokens_in, y.shape[1], state)
        if self.running.expose_all:
            self.running.final = state
        if full and state.steps:
            y = state.restore(y)
        return self.attach(layer, y, state.with_exposed(len(state.steps) > 0) if full else state)

    def record(self, layer: int, tokens_in: int, tokens_out: int, state: TokenState) -> None:
        """Note what a block did, for reports."""
        if not (torch.compiler.is_compiling() or mapped()):
            self.records.put(layer, LayerRecord(tokens_in, tokens_out, state))

    def attach(self, layer: int, y: Tensor, state: TokenState) -> Tensor:
        """Send ``state`` along with the output of block ``layer``."""
        setattr(y, ATTRIBUTE, state)
        if not torch.compiler.is_compiling():
            self.slots.keep(layer + 1, y, state)
        return y

    def last(self) -> TokenState:
        """State after the last block of the last forward.

        Raises:
            NothingRecordedError: no forward has run since the model was patched, or only compiled or vmapped ones.
        """
        record = self.records.get(self.depth - 1)
        if record is None:
            raise NothingRecordedError(
                "nothing is recorded: run one forward of the patched model first (compiled or vmapped keep none)"
            )
        return record.state

    def _from_slot(self, layer: int, x: Tensor) -> TokenState:
        state = None if torch.compiler.is_compiling() else self.slots.find(layer, x)
        if state is not None:
            setattr(x, ATTRIBUTE, state)
            return state
        if not torch.compiler.is_compiling():
            self.watch.check_ran(str(layer - 1))
        raise TokenStateError(
            f"the sizes and the source map of the tokens were lost before block {layer}: its input is not the tensor "
            "that the block before it returned. If something copies tensors between blocks, call tokred.remove(model) "
            "first, or run one forward before each backward when checkpointing reentrantly"
        )
