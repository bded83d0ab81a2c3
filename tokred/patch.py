"""``Patch``: everything that was done to one model, on the module that the user gave, under one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from tokred.core.method import Method
from tokred.core.origin import Origin
from tokred.core.report import Report, joined
from tokred.core.site import STAGES
from tokred.errors import MissingInputError, NothingRecordedError
from tokred.learn.build import build
from tokred.learn.store import Entry

if TYPE_CHECKING:
    from tokred.adapters.host import Host, State
    from tokred.adapters.swap import Undo

ATTRIBUTE = "_tokred_patch"

# What methods of ``projector`` take from the tower's attention.
_OF_TOWER = frozenset({"q", "k", "class_attention", "attention", "tower_layers", "shots"})


class Part(NamedTuple):
    """One method at work on a model.

    Attributes:
        method: that acts.
        family: of the host, for messages.
        module: the part of the model that is patched for it; may be the model itself.
        state: what the patched modules share, and tell of the last forward.
        undos: of every change that was made for it, in order.
        origin: how it was applied, to be saved; None where that is not known any more.

    The host itself is found again when it is asked something: it holds functions of its adapter, which do not pickle.
    """

    method: Method
    family: str
    module: nn.Module
    state: State
    undos: tuple[Undo, ...] = ()
    origin: Origin | None = None

    @property
    def in_force(self) -> bool:
        """True if one of its changes is still there: the part of a model may have been freed by itself."""
        return not self.undos or any(undo.in_force for undo in self.undos)

    def report(self, methods: Sequence[Method]) -> Report:
        """Report of its last forward, in a model that all these methods act on."""
        from tokred import adapters

        host: Host = adapters.find(self.module, self.method.stage)
        return host.report(self.state, methods)


class Patch:
    """The methods that act on a model, and what was changed for them. Copies and pickles with the model.

    Attributes:
        parts: in the order of the stages.
        modules: with weights of their own, by name, that methods bring along; not in the model's ``state_dict``.
        undos: of what was changed for the user rather than for a method.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.modules: dict[str, nn.Module] = {}
        self.undos: list[Undo] = []

    @property
    def methods(self) -> list[Method]:
        """Methods that act, in the order of the stages."""
        return [part.method for part in self.parts if part.in_force]

    def add(
        self,
        host: Host,
        method: Method,
        where: Callable[[str, nn.Module], bool] | None,
        expose: str,
        module: nn.Module | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Let a method act, with its module, on a host that has checked it. If that breaks off, everything done so far
        is undone. ``origin`` says how it was applied."""
        from tokred.adapters.changes import Changes

        changes = Changes(part.state for part in self.parts)
        try:
            state = host.patch(method, where, expose, changes)
        except BaseException:
            changes.undo()
            self.undo()
            raise
        if module is not None:
            state.module = self.modules[method.name] = module
        self.parts.append(Part(method, host.family, host.model, state, tuple(changes.undos), origin))

    def call_after(self, model: nn.Module, called: Callable[[nn.Module], object]) -> None:
        """Call ``called(model)`` after every forward of ``model``, until the patch is taken off."""
        from tokred.adapters.changes import Changes
        from tokred.adapters.watch import Call

        changes = Changes()
        changes.after(model, Call(called))
        self.undos += changes.undos

    def undo(self) -> None:
        """Take back every change, the last one first."""
        for one in reversed(self.undos):
            one.undo()
        for part in reversed(self.parts):
            for one in reversed(part.undos):
                one.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(f'{part.method!r} on {part.family}' for part in self.parts)})"


def compose(methods: Sequence[Method]) -> list[Method]:
    """Methods in the order of their stages, at most one a stage.

    Raises:
        ValueError: the list is empty, two methods act at one stage, or one reads what another takes away.
    """
    if not methods:
        raise ValueError("the list of methods is empty")
    stages = [m.stage for m in methods]
    if len(set(stages)) < len(stages):
        raise ValueError(f"one method a stage: {', '.join(m.name for m in methods)} act at {', '.join(stages)}")
    found = sorted(methods, key=lambda m: (*STAGES, m.stage).index(m.stage))
    again = next((m for m in found if "again" in m.reads), None)
    between = next((m for m in found if m.stage == "layer"), None)
    if again is not None and between is not None:
        raise ValueError(
            f"{between.name!r} removes tokens between layers, and {again.name!r} has tokens computed again in all of "
            "them: take one of the two"
        )
    inside = next((m for m in found if m.stage == "block"), None)
    reads = next((m for m in found if m.stage == "projector" and m.reads & _OF_TOWER), None)
    if inside is not None and reads is not None:
        raise ValueError(
            f"{inside.name!r} leaves fewer tokens in the vision tower, so that its attention says nothing about single "
            f"patches, and {reads.name!r} reads {', '.join(sorted(reads.reads & _OF_TOWER))}: take a method that reads "
            "the features alone beside it, such as 'divprune'"
        )
    return found


def patches_of(model: nn.Module) -> Iterator[tuple[nn.Module, Patch]]:
    """The patches on ``model`` and on what is inside it: the module that was given to ``apply``, and its patch."""
    for module in model.modules():
        found = module.__dict__.get(ATTRIBUTE)
        if isinstance(found, Patch):
            yield module, found


def parts_of(model: nn.Module) -> list[Part]:
    """The parts that act on ``model``, in the order of the stages."""
    from tokred.adapters.changes import states_in

    parts = [part for _, patch in patches_of(model) for part in patch.parts if part.in_force]
    owned = {id(part.state) for part in parts}
    # A part of a patched model, or a copy of one, has no owner in it; what its modules share tells enough.
    loose = [(module, state) for module, state in states_in(model) if id(state) not in owned]
    parts += [Part(state.method, type(module).__name__, module, state) for module, state in loose]
    return sorted(parts, key=lambda part: STAGES.index(part.method.stage))


def part_at(model: nn.Module, stage: str) -> Part | None:
    """The part that acts on ``model`` at a stage; None where none does."""
    return next((part for part in parts_of(model) if part.method.stage == stage), None)


def unpatch(model: nn.Module) -> None:
    """Undo every patch on ``model`` and in it, and sweep off what has no owner there."""
    from tokred.adapters.changes import sweep

    for module, patch in list(patches_of(model)):
        del module.__dict__[ATTRIBUTE]
        patch.undo()
    sweep(model)


def report_of(model: nn.Module) -> Report:
    """The last forward of everything that acts on ``model``, as one report.

    Raises:
        NothingRecordedError: nothing acts, or a part of it has not run since.
    """
    parts = parts_of(model)
    if not parts:
        raise NothingRecordedError("the model is not patched: call tokred.apply(model, ...) first")
    methods = [part.method for part in parts]
    single = {id(part.state): part for part in parts}  # two stages of a model with vision share one
    return joined([part.report(methods) for part in single.values()])


def losses_of(model: nn.Module, targets: Any = None) -> dict[str, Tensor]:
    """The terms that methods with weights added to the loss of the last forward, by method and name.

    Raises:
        NothingRecordedError: there is no such method, or that forward was none in training.
        MissingInputError: a method learns by the targets of that forward, and none were given.
        ValueError: the targets do not fit what the method said of them.
    """
    states = [part.state for part in parts_of(model) if part.state.module is not None]
    if not states:
        raise NothingRecordedError("no method with weights acts on the model: there are no losses of one")
    found: dict[str, Tensor] = {}
    for state in states:
        if state.losses is None:
            raise NothingRecordedError(
                "the last forward was none in training: call model.train() and run one forward first"
            )
        terms = dict(state.losses)
        if state.guesses:
            if targets is None:
                raise MissingInputError(
                    f"{state.method.name!r} learns by what the model is to say: give the targets of the last forward, "
                    "tokred.losses(model, targets=labels)"
                )
            terms |= state.method.compare(state.guesses, targets)
        found.update({f"{state.method.name}.{name}": term for name, term in terms.items()})
    return found


def change(model: Any, **parameters: Any) -> Method:
    """Change parameters of the method on a patched model; its weights, the patch and what it recorded stay.

    For schedules of rates and temperatures while a method learns.

    Args:
        model: patched, at the stage ``block``.
        parameters: of its method there, by their names.

    Returns:
        The method as it acts now.

    Raises:
        NothingRecordedError: no method acts in the blocks of the model.
        TypeError: the method has no such parameter.
        ValueError: a value is out of range, or would take another patch or other weights; apply the method anew then.
    """
    from tokred import adapters

    part = part_at(adapters.module_of(model), "block")
    if part is None:
        raise NothingRecordedError("no method acts in the blocks of the model: call tokred.apply(model, ...) first")
    before: Any = part.method
    known = [f.name for f in dataclasses.fields(before) if f.init]
    for name in parameters:
        if name not in known:
            raise TypeError(f"{before.name!r} has no parameter {name!r}; it has {', '.join(known)}")
    after: Any = dataclasses.replace(before, **parameters)
    if after == before:
        return part.method
    host: Any = adapters.find(part.module, "block")
    after.check(host.depth)
    same = all(getattr(before, name) == getattr(after, name) for name in ("reads", "where", "proportional"))
    if not same or before.joins(host.depth) != after.joins(host.depth):
        raise ValueError(f"{after} runs in another way than {before}: call tokred.apply(model, method) instead")
    if part.state.module is not None:
        build(after, host.model_facts, part.state.module)
    # A copy of a part of a model has no patch of its own; what its blocks share is enough.
    for _, patch in patches_of(adapters.module_of(model)):
        patch.parts = [one._replace(method=after) if one.state is part.state else one for one in patch.parts]
    part.state.method = after
    return after  # type: ignore[no-any-return]


def entries_of(model: nn.Module) -> list[Entry]:
    """Entries to save for a patched model.

    Raises:
        NothingRecordedError: it is not patched.
    """
    from tokred import adapters

    parts = parts_of(model)
    if not parts:
        raise NothingRecordedError("the model is not patched, so there is no setting to save: call tokred.apply first")
    found = []
    for part in parts:
        made = part.state.module
        facts = None if made is None else adapters.find(part.module, part.method.stage).model_facts()
        found.append(Entry(_whole(part.method), made, facts, part.origin))
    # A method of several stages has as many parts, and is one setting.
    return [one for i, one in enumerate(found) if one.method not in [other.method for other in found[:i]]]


def _whole(method: Method) -> Method:
    """The method that users know: of a member, the one of several stages that it is a member of."""
    whole = getattr(method, "method", None)
    return whole if isinstance(whole, Method) and method in whole.members else method
