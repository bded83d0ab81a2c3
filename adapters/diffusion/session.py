"""State that the sub-layers of one patched denoiser share: the method, the step, the plans, a record for reports."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.diffusion.flight import Flight, Local, Plan, SpotRecord
from tokred.adapters.diffusion.frames import join_frames, one_frame
from tokred.adapters.diffusion.inside import Halves
from tokred.adapters.diffusion.steps import Steps
from tokred.adapters.host import State
from tokred.adapters.passes import check_not_mapped, outliving, recomputed
from tokred.adapters.records import Records
from tokred.adapters.swap import Hook
from tokred.adapters.watch import Watch
from tokred.core.reduction import Reduction
from tokred.diffusion.method import AttentionMethod
from tokred.diffusion.site import AttentionSite, Side, SublayerPlace, place_of, step_key
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.diffusion.sublayers import Spot

_SIDES: tuple[Side, Side] = ("queries", "keys")


class Watching(Protocol):
    """A viewer of sub-layers while they run: a drawing of what becomes of tokens."""

    def begin(self) -> None:
        """A step begins."""

    def saw(self, spot: Spot, role: str, place: SublayerPlace, reduction: Reduction | None) -> None:
        """A sub-layer runs on what ``reduction`` leaves of the tokens of a place; None: on all."""


class Session(State):
    """State of one denoiser. Copies and pickles start without plans.

    Args:
        method: what decides.
        depth: number of blocks.
        family: for messages.
        patch: rows (and columns) of the sample that the finest tokens stand for.
        kind: name under which the denoiser's class is known, where that is not what ``family`` ends in.
    """

    stage = "attention"

    def __init__(self, method: AttentionMethod, depth: int, family: str, patch: int = 1, kind: str = "") -> None:
        self.method = method
        self.depth = depth
        self.family = family
        self.patch = patch
        self.kind = kind or family
        self.warned = False
        self.free = False  # plans of the right size without a choice, for counting
        self.fixed: tuple[int, int] | None = None  # rows and columns of tokens, where no ids can be read
        self.watch = Watch()
        self._forget()

    def _forget(self) -> None:
        self._local = Local(self.kind, self.method.at(None))
        self._last: Flight | None = None  # that began last, in any thread
        self.records: Records[tuple[int, str], SpotRecord] = Records()  # of the sub-layers of the last forward
        self.watched: Watching | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_local", "_last", "records", "watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def flight(self) -> Flight:
        """That of this thread. Threads of autograd run no forward: a checkpoint there goes on with the last one."""
        own: Flight = self._local.flight
        if own.size is None and self._last is not None and recomputed():
            return self._last
        return own

    @property
    def inputs(self) -> dict[int, Tensor]:
        """Inputs of the blocks that are running, by number."""
        return self.flight.inputs

    @property
    def now(self) -> AttentionMethod | None:
        """The method in force."""
        return self.flight.now

    @property
    def plans(self) -> dict[Any, Any]:
        """Plans that hold, by place."""
        return self.flight.plans

    @property
    def steps(self) -> Steps:
        """Steps of the image at hand."""
        return self.flight.steps

    # ------------------------------------------------------------------ one forward

    def begin(self, size: tuple[int, int], timestep: Any, frames: int = 1, sample: Tensor | None = None) -> None:
        """Start a forward of the denoiser.

        Args:
            size: rows and columns of the sample.
            timestep: of the step.
            frames: of the sample.
            sample: itself, for methods that read what the step before predicted.

        Raises:
            UnsupportedModelError: a method that goes by the step is compiled, or the model runs inside
                ``torch.func.vmap``.
        """
        check_not_mapped()
        flight: Flight = self._local.flight
        flight.size, flight.key, flight.frames = size, step_key(timestep), frames
        flight.inputs = {}
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._last = flight
            self.records.begin()
            if self.watched is not None:
                self.watched.begin()
        if compiling and self.method.stepwise and not self.free:
            raise UnsupportedModelError(
                f"{self.method} depends on which step it is, which a compiled forward does not know: see its page"
            )
        counted = self.method.refresh > 1 or self.method.stepwise or self.method.remembers
        # Counting steps reads the timestep, which waits for the device and breaks a graph: only if a method needs it.
        if compiling or self.free or not counted:
            flight.plans, flight.now = {}, self.method.at(None)
            return
        flight.channels = 0 if sample is None or sample.ndim != 4 else sample.shape[1]
        flight.now = flight.steps.turn(self.method, timestep, sample if self._looks_back else None, sample)
        flight.plans = flight.steps.plans
        # How many steps an image has is known only when the next one begins.
        if 0 < flight.steps.last <= self.method.first_full and not self.warned and not self.method.idle:
            self.warned = True
            warnings.warn(
                f"{self.method.name!r} leaves the first {self.method.first_full} steps of an image as they are, and "
                f"the last image had {flight.steps.last}, so nothing was reduced: give a smaller first_full",
                stacklevel=2,
            )

    @property
    def _looks_back(self) -> bool:
        return "guidance" in self.method.reads

    def end(self, predicted: Tensor | None = None) -> None:
        """End the forward, keep its prediction where it is needed, and warn where nothing was reduced."""
        flight: Flight = self._local.flight
        flight.inputs = {}
        if self._looks_back and predicted is not None and not torch.compiler.is_compiling():
            flight.steps.remember(predicted)
        if flight.now is None:
            return
        if self.warned or self.free or torch.compiler.is_compiling() or self.method.idle or not self.records:
            return
        if all(r.left == r.tokens for r in self.records.values()):
            self.warned = True
            counts = sorted({r.tokens for r in self.records.values()}, reverse=True)
            high, wide = (side * self.patch for side in flight.size or (0, 0))
            advice = f" ({self.method.advice})" if self.method.advice else ""
            warnings.warn(
                f"{self.method.name!r} reduced nothing on {self.family} at a sample of {high} x {wide}: its "
                f"attention runs on {', '.join(map(str, counts))} tokens, and the method acts on none of them{advice}",
                NothingRemovedWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------ one sub-layer

    def place(self, x: Tensor) -> SublayerPlace:
        """Where a sub-layer stands, from the shape of its input."""
        flight = self.flight
        assert flight.size is not None  # forwards of the denoiser begin by saying so
        n = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]
        if n % flight.frames:
            raise ValueError(f"{n} tokens are not those of {flight.frames} frames")
        place = place_of(n // flight.frames, flight.size)
        place = place._replace(length=n, factor=place.factor * self.patch, frames=flight.frames)
        return place if x.ndim == 3 else place._replace(grid=(x.shape[2], x.shape[3]))

    def plan(self, spot: Spot, x: Tensor) -> Plan | None:
        """The plan of a sub-layer; None where it runs as it is.

        Args:
            spot: the sub-layer.
            x: its input, ``(B, N, C)`` or ``(B, C, h, w)``.
        """
        flight = self.flight
        method = flight.now
        if flight.size is None or method is None:
            return None  # a block that is run by itself, or a step that is left as it is
        own = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        seen = flight.inputs.get(spot.block)
        metric = own if spot.alone or seen is None else seen
        if metric.shape[:2] != own.shape[:2]:
            return None  # a part of the tokens, as feed-forwards in chunks are given
        if spot.kind == "mlp" and seen is None:
            return None
        place = self.place(x)
        asked = place if "frames" in method.reads else one_frame(place)
        left = method.left(asked) * (place.length // asked.length)
        if left == place.length:
            return None
        shared = method.share == "resolution"
        # A plain tuple: older compilers keep no other as the key of what outlives the forward.
        slot = (*place, own.shape[0]) if shared else spot.block
        plan: Plan | None = flight.plans.get(slot)
        if plan is None or not plan.fits(own):
            layer = spot.block if not shared else place.factor
            with outliving():
                if self.free:
                    reduction = self._first(own, left)
                else:
                    tokens = metric.detach().reshape(-1, asked.length, metric.shape[-1])
                    site = AttentionSite(tokens, asked, layer=layer, **self._known(asked, slot, len(tokens)))
                    reduction = join_frames(method.reduce(site), place.length // asked.length)
                if reduction.trivial:
                    return None
                plan = flight.plans[slot] = Plan(reduction, method.part, method.proportional)
        return plan

    def halves(self, spot: Spot, image: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Halves:
        """Reductions of the queries, and of the keys and values, of one attention.

        Args:
            spot: the sub-layer.
            image: its input, the image's tokens.
            q, k, v: ``(B, H, N, D)`` of these, as the attention uses them.
        """
        flight = self.flight
        method = flight.now
        if flight.size is None or method is None:
            return Halves()
        # By name, not by resolution: every attention has heads of its own, whose plans no other can share.
        place, slot = self.place(image), ("heads", spot.name, len(q))
        found: Halves | None = flight.plans.get(slot)
        if found is None or not _fits(found, q):
            with outliving():
                known = self._known(place, slot, len(q)) | {"q": q.detach(), "k": k.detach(), "v": v.detach()}
                sides: list[Reduction | None] = []
                for side in _SIDES:
                    left = method.side(side, place)
                    if left == place.length:
                        sides.append(None)
                    elif self.free:
                        rows = torch.arange(left, device=q.device).expand(*q.shape[:2], -1)
                        sides.append(Reduction.keep(rows, place.length))
                    else:
                        made = method.reduce(AttentionSite(None, place, layer=spot.block, side=side, **known))
                        sides.append(None if made.trivial else made)
                found = Halves(sides[0], sides[1], method.proportional)
            flight.plans[slot] = found
        slots = [side.slots for side in (found.queries, found.keys) if side]
        self._record(spot, "self", image, min(slots, default=place.length))
        if self.watched is not None:
            for side, half in zip(_SIDES, (found.queries, found.keys), strict=True):
                self.watched.saw(spot, side, place, half)
        return found

    def _known(self, place: SublayerPlace, slot: Any, batch: int) -> dict[str, Any]:
        """Arguments that every site of this step shares."""
        flight = self.flight
        known: dict[str, Any] = {"depth": self.depth, "step": flight.key, "count": flight.steps.count}
        if self.method.remembers and not torch.compiler.is_compiling():
            known["memory"] = flight.steps.memory((slot, place, batch))
        if self._looks_back:
            steps, channels = flight.steps, flight.channels
            known["guidance"] = lambda: steps.guidance(place, batch, channels)
        return known

    @property
    def part(self) -> str:
        """The part of attention that the method in force reduces; empty where none is in force."""
        now = self.flight.now
        return "" if now is None else now.part

    def acts(self, role: str) -> bool:
        """True where sub-layers of this role are reduced in this step."""
        now = self.flight.now
        return now is not None and not now.idle and role in now.sublayers

    def _first(self, x: Tensor, left: int) -> Reduction:
        return Reduction.keep(torch.arange(left, device=x.device).expand(x.shape[0], -1), x.shape[1])

    def note(self, spot: Spot, role: str, x: Tensor, plan: Plan | None) -> None:
        """Remember what a sub-layer ran on."""
        self._record(spot, role, x, None if plan is None else plan.reduction.slots)
        if self.watched is not None:
            self.watched.saw(spot, role, self.place(x), None if plan is None else plan.reduction)

    def _record(self, spot: Spot, role: str, x: Tensor, left: int | None) -> None:
        if torch.compiler.is_compiling():
            return
        n = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]
        self.records.put((spot.block, spot.name), SpotRecord(spot.name, role, n, n if left is None else left))


def _fits(found: Halves, q: Tensor) -> bool:
    """True where plans by head fit queries ``(B, H, N, D)`` in batch, length and device."""
    sides = [side for side in found[:2] if isinstance(side, Reduction)]
    return all(
        side.batch == tuple(q.shape[:2]) and side.length == q.shape[2] and side.representative.device == q.device
        for side in sides
    )


class EnterDenoiser(Hook):
    """Before a denoiser's forward: the session starts, at the size of its sample.

    Args:
        session: of the denoiser.
        names: parameters of its forward, after ``self``.
        sample: which of them is the sample.
    """

    def __init__(self, session: Session, names: tuple[str, ...], sample: str) -> None:
        self.session, self.names, self.sample = session, names, sample

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        sample, patch = given[self.sample], self.session.patch
        size = (sample.shape[-2] // patch, sample.shape[-1] // patch)
        self.session.begin(size, words.TIMESTEP.of(given), sample=sample)


class LeaveDenoiser(Hook):
    """Behind a denoiser's forward: its prediction ends the session's forward."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.session.end(output if isinstance(output, Tensor) else output[0])


class EnterBlock(Hook):
    """Before a transformer block: its input is what tokens are compared by."""

    def __init__(self, session: Session, block: int) -> None:
        self.session, self.block = session, block

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else words.STATES.at(kwargs)
        self.session.inputs[self.block] = x.squeeze(1) if x.ndim == 4 else x


class LeaveBlock(Hook):
    """After a transformer block: its input is let go."""

    def __init__(self, session: Session, block: int) -> None:
        self.session, self.block = session, block

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.session.inputs.pop(self.block, None)
