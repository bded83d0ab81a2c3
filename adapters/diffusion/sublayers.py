"""A sub-layer of a denoiser on fewer tokens: the host's own forward and processor, seeing other projections."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokred.adapters import contract
from tokred.adapters.contract import members, words
from tokred.adapters.contract.spelling import Word
from tokred.adapters.diffusion import rotary
from tokred.adapters.diffusion.flight import Plan
from tokred.adapters.diffusion.frames import samples_of
from tokred.adapters.diffusion.inside import Halves, Inside, masked_at
from tokred.adapters.diffusion.session import Session
from tokred.adapters.diffusion.view import Batch, View, perturbs, view, watched
from tokred.adapters.diffusion.weights import Weighed
from tokred.adapters.swap import SETTINGS
from tokred.errors import UnsupportedModelError

_KEYS_AND_VALUES = (members.TO_KEY, members.TO_VALUE)
Kind = Literal["attention", "joint", "single", "mlp", "parallel"]


@dataclass
class Call:
    """The arguments of a forward, by name.

    Attributes:
        names: parameters of the forward that can be given by place, after ``self``.
        args, kwargs: as they were given.
    """

    names: tuple[str, ...]
    args: list[Any]
    kwargs: dict[str, Any]

    def get(self, word: Word) -> Any:
        """The argument of this role; None where it was not given."""
        return next((found for found in map(self.named, word.names) if found is not None), None)

    def named(self, name: str) -> Any:
        """The argument ``name``; None where it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = self.names.index(name) if name in self.names else len(self.args)
        return self.args[place] if place < len(self.args) else None

    def put(self, word: Word, value: Any) -> None:
        """Another value for an argument that was given."""
        name = next((one for one in word.names if self.named(one) is not None), word.key(self.kwargs, self.names))
        if name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.args[self.names.index(name)] = value

    def run(self, forward: Callable[..., Any], module: Any) -> Any:
        """``forward`` is the host class's own, still without its module."""
        return forward(module, *self.args, **self.kwargs)


@dataclass
class Spot:
    """Settings of one patched sub-layer.

    Attributes:
        session: of its denoiser.
        block: number of its block.
        kind: an attention whose processor projects; one of text and image together, given apart (``"joint"``) or in
            one tensor, text first (``"single"``); an MLP; or a block whose attention and MLP run side by side.
        alone: no transformer block around it: its own input is what is compared.
        name: in the denoiser, for reports.
        names: parameters of its forward.
        first: where text and image attend together, the text stands first.
        site: its number among all sub-layers, as text.
    """

    session: Session
    block: int
    kind: Kind
    alone: bool
    name: str
    names: tuple[str, ...] = (words.STATES.name, words.TEXT_STATES.name)
    first: bool = False
    site: str = ""

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sub-layer: ``forward`` is the host class's own, still without its module."""
        self.session.watch.ran(self.site)
        call = Call(self.names, list(args), dict(kwargs))
        if self.kind == "parallel":
            return self._parallel(module, forward, call)
        if not self.alone and self.block not in self.session.inputs:
            return call.run(forward, module)  # inside of a block that runs on fewer tokens as a whole
        x, text = call.get(words.STATES), call.get(words.TEXT_STATES)
        role = "mlp" if self.kind == "mlp" else "cross" if text is not None and self.kind == "attention" else "self"
        image, before = self._image(x)
        plan = None
        # Masks of an IP-Adapter are resized to as many queries as there are: those stay.
        masked = role == "cross" and call.get(words.ADAPTER_MASKS) is not None
        acts = self.session.acts(role) and not masked
        if acts and role == "self" and self.session.part == "heads":
            return self._inside(module, forward, partial(self.session.halves, self, image), call, image)
        if acts:
            plan = self.session.plan(self, image)
        self.session.note(self, role, image, plan)
        if plan is None:
            return call.run(forward, module)
        if role == "mlp":
            call.put(words.STATES, _joined(x, plan.merge(image), before))
            return _back(plan, call.run(forward, module), before)
        batch = Batch(image if image.ndim == 3 else image.flatten(2).transpose(1, 2), self.name)
        if plan.part == "q" or role != "self":
            return self._around(module, forward, plan, call, image, before, role, batch)
        with self._apart(module, plan, before if text is None else text.shape[1], batch):
            return self._around(module, forward, plan, call, image, before, role, batch)

    def _around(
        self, module: Any, forward: Any, plan: Plan, call: Call, image: Tensor, before: int, role: str, batch: Batch
    ) -> Any:
        """An attention on fewer tokens, or on fewer of one side."""
        if plan.part != "tokens":
            return self._half(module, forward, plan, call, image, role, batch)
        if rotary.table_of(call.get) is not None:
            return self._rotated(module, forward, plan, call, image, before)
        if self.kind == "joint":
            batch.given = plan.merge(image)
            call.put(words.STATES, batch.given)
            return _back(plan, self._masked(call, plan, image.shape[1], role).run(forward, watched(module, batch)), 0)
        seen = view(module, plan, self._projections(role), True, batch)
        return self._viewed(module, forward, seen, call, role)

    @contextlib.contextmanager
    def _apart(self, module: Any, plan: Plan, text: int, batch: Batch | None = None) -> Iterator[None]:
        """While this is entered, keys count for what was merged into them, where that is wanted, padding for none."""
        if plan.weights is None:
            yield
            return
        mode = Weighed(plan.weights, text, self.first, batch)
        with mode:
            yield
        if not mode.seen:
            raise self._other_kernel(module, "merged keys cannot be weighed, nor padding be left out, in it")

    def _other_kernel(self, module: Any, what: str) -> UnsupportedModelError:
        owner = words.SELF.part(module, module)
        return UnsupportedModelError(
            f"the processor {type(words.PROCESSOR.part(owner)).__name__} of {self.name} does not run torch's "
            f"scaled_dot_product_attention (a processor or an attention back-end of its own), so {what}"
        )

    def _image(self, x: Tensor) -> tuple[Tensor, int]:
        """The tokens of the image, and how many of text stand before them in the same tensor."""
        seen = self.session.inputs.get(self.block) if self.kind in ("single", "mlp") else None
        before = 0 if seen is None else max(x.shape[1] - seen.shape[1], 0)
        return x[:, before:] if before else x, before

    def _projections(self, role: str) -> tuple[Word, ...]:
        every = (members.TO_QUERY, members.TO_KEY, members.TO_VALUE, members.TO_ALL)
        return every if role == "self" else every[:1]

    def _viewed(self, module: Any, forward: Any, seen: View, call: Call, role: str) -> Tensor:
        """An attention whose processor is shown projections of fewer tokens."""
        x = call.get(words.STATES)
        if role == "self" and call.get(words.ATTENTION_MASK) is not None:
            raise UnsupportedModelError(
                f"{self.name} was given an attention mask over the image's tokens, which a reduction cannot follow: "
                "leave it out, or call tokred.remove(model) first"
            )
        y: Tensor = call.run(forward, seen)
        if y.shape != x.shape:
            raise UnsupportedModelError(
                f"the processor {type(words.PROCESSOR.part(module)).__name__} of {self.name} does not use the module's "
                "own projections, so tokens could not be reduced around it"
            )
        return y

    def _half(self, module: Any, forward: Any, plan: Plan, call: Call, image: Tensor, role: str, batch: Batch) -> Any:
        """Fewer queries, or fewer keys and values."""
        # Before their projections where nothing but those stands between, which saves the projections, too.
        plain = rotary.table_of(call.get) is None and not words.JOINED_PROJECTIONS.part(module, False)
        if plain and self.kind == "attention":
            names = _KEYS_AND_VALUES if plan.part == "kv" else (members.TO_QUERY,)
            seen = view(module, plan, names, plan.part == "q", batch)
            return self._viewed(module, forward, seen, call, role)
        apart = call.get(words.TEXT_STATES) is None or words.ADDED_KEY.part(module) is not None
        if plain and plan.part == "kv" and self.kind == "joint" and apart and not perturbs(module):
            return call.run(forward, view(module, plan, _KEYS_AND_VALUES, False, batch))
        reduction, now = plan.reduction, self.session.now
        if rotary.table_of(call.get) is not None and not (now is not None and now.near):
            reduction = replace(reduction, mode="keep")  # vectors rotated by far places are not averaged

        def decide(q: Tensor, k: Tensor, v: Tensor) -> Halves:
            own = reduction if len(q) == reduction.batch[0] else samples_of(reduction, batch.last_rows(len(q)))
            return Halves(keys=own) if plan.part == "kv" else Halves(queries=own)

        return self._inside(watched(module, batch), forward, decide, call, image)

    def _inside(self, module: Any, forward: Any, decide: Callable[..., Halves], call: Call, image: Tensor) -> Any:
        """An attention on fewer queries or keys than it was given tokens."""
        x, n = call.get(words.STATES), image.shape[1] if image.ndim == 3 else image.shape[2] * image.shape[3]
        text = call.get(words.TEXT_STATES) if self.kind == "joint" else None
        beside = x.shape[1] - n if self.kind == "single" else 0 if text is None else text.shape[1]
        mode = Inside(decide, n, beside, self.first, len(x))
        with mode:
            y = call.run(forward, module)
        if not mode.seen:
            raise self._other_kernel(module, "queries or keys alone cannot be reduced in it")
        return y

    def _rotated(self, module: Any, forward: Any, plan: Plan, call: Call, image: Tensor, before: int) -> Any:
        """An attention with rotary embedding. Tokens at different places are never averaged."""
        x = call.get(words.STATES)
        call.put(words.STATES, _joined(x, plan.reduction.gather(image), before))
        return _back(plan, self._masked(call, plan, image.shape[1], "self").run(forward, module), before)

    def _masked(self, call: Call, plan: Plan, tokens: int, role: str) -> Call:
        """The call with tables and a mask of keys (and queries) at the tokens that are left."""
        rows = plan.reduction.representative
        table = rotary.table_of(call.get)
        if table is not None:
            call.put(words.TURNS, rotary.for_plan(table, plan))
        mask = call.get(words.ATTENTION_MASK)
        if mask is not None and role == "self":
            start = mask.shape[-1] - tokens if self.first else 0
            mask = masked_at(mask, rows, -1, tokens, start)
            call.put(words.ATTENTION_MASK, masked_at(mask, rows, -2, tokens, start))
        return call

    def _parallel(self, module: Any, forward: Any, call: Call) -> Any:
        """A block whose attention and MLP read one tensor: on fewer tokens as a whole, where both are to be.

        What the block adds is restored, not its output, so that each token keeps what is its own.
        """
        session, plan = self.session, None
        x: Tensor = call.get(words.STATES)
        # What a cache keeps of the attention inside has the length of one plan, and another may be in force then.
        whole = not any(contract.repeats(inner) for inner in module.children())
        if whole and session.acts("self") and session.acts("mlp") and session.part == "tokens":
            plan = session.plan(self, x)
        if not torch.compiler.is_compiling():
            session.note(replace(self, name=f"{self.name}.mlp"), "mlp", x, plan)
        if plan is None:
            return call.run(forward, module)
        if not torch.compiler.is_compiling():
            session.note(replace(self, name=f"{self.name}.attn"), "self", x, plan)
        session.inputs.pop(self.block)
        rotated = rotary.table_of(call.get) is not None
        short = plan.reduction.gather(x) if rotated else plan.merge(x)
        call.put(words.STATES, short)
        text = call.get(words.TEXT_STATES)
        with self._apart(module, plan, 0 if text is None else text.shape[1]):
            outputs = list(self._masked(call, plan, x.shape[1], "self").run(forward, module))
        at = 1 if self.first else 0
        outputs[at] = x + plan.restore(outputs[at] - short)
        return tuple(outputs)


def _joined(x: Tensor, image: Tensor, before: int) -> Tensor:
    """The text that stands first in ``x``, and fewer tokens of the image."""
    return torch.cat([x[:, :before], image], 1) if before else image


def _back(plan: Plan, y: Any, before: int) -> Any:
    """The image at full length again; in a tuple of results the second is the text."""
    if isinstance(y, tuple):
        return tuple(part if i == 1 else plan.restore(part) for i, part in enumerate(y))
    return torch.cat([y[:, :before], plan.restore(y[:, before:])], 1) if before else plan.restore(y)


def body(host: Any) -> dict[str, Any]:
    """Methods of a patched sub-layer's class."""
    original = host.forward  # the compiler follows a function, not the attribute of a class

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        spot: Spot | None = self.__dict__.get(SETTINGS)
        if spot is None:  # removed, but a wrapper that came later still calls this
            return original(self, *args, **kwargs)
        return spot.run(self, original, args, kwargs)

    return {"forward": forward}
