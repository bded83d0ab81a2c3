"""``Changes``: what patching a model changes in it, each change with its undo.

A patch takes its changes back by these. Parts of a patched model live on without it, though: a sub-module that was
copied out, a block that was moved to another model, a module that the user gives to ``remove`` alone. Nothing in them
names their owner (a copy of a block would else copy the whole model), so there is :func:`sweep` beside the undos, which
knows changes by what they look like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from tokred.adapters.contract import members
from tokred.adapters.host import State
from tokred.adapters.swap import SETTINGS, Body, Hook, Standin, Undo, is_swapped, restore, swap

StateT = TypeVar("StateT", bound=State)


class Swapped(Undo):
    """The exchange of a module's class.

    Args:
        module: the module.
        settings: by which the exchange is told from a later one of the same module.
    """

    def __init__(self, module: nn.Module, settings: Any) -> None:
        self.module, self.settings = module, settings

    @property
    def in_force(self) -> bool:
        return is_swapped(self.module) and self.module.__dict__.get(SETTINGS) is self.settings

    def undo(self) -> None:
        if self.in_force:
            restore(self.module)


class Hooked(Undo):
    """A hook that was hung on a module. Handles of torch are not used: theirs are weak, and lost in a pickle."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self.module, self.hook = module, hook

    @property
    def in_force(self) -> bool:
        return any(hook is self.hook for hooks, _ in _hooks(self.module) for hook in hooks.values())

    def undo(self) -> None:
        _drop(self.module, lambda hook: hook is self.hook)


class InFront(Undo):
    """An object that was put on a module in front of a method of its class."""

    def __init__(self, module: nn.Module, name: str, standin: Standin) -> None:
        self.module, self.name, self.standin = module, name, standin

    @property
    def in_force(self) -> bool:
        return self.module.__dict__.get(self.name) is self.standin

    def undo(self) -> None:
        if self.in_force:
            del self.module.__dict__[self.name]


class Changes:
    """The changes of one host at one stage, in order.

    Args:
        states: those of the stages that were patched before, for hosts that share one.
    """

    def __init__(self, states: Iterable[Any] = ()) -> None:
        self.states = tuple(states)
        self.undos: list[Undo] = []

    def state(self, kind: type[StateT]) -> StateT | None:
        """The state of another stage that is of this kind."""
        return next((one for one in self.states if isinstance(one, kind)), None)

    def swap(self, module: nn.Module, body: Body, settings: Any) -> None:
        """Exchange a module's class, as :func:`tokred.adapters.swap.swap`."""
        swap(module, body, settings)
        self.undos.append(Swapped(module, settings))

    def before(self, module: nn.Module, hook: Any, *, with_kwargs: bool = False) -> None:
        """Hang a hook before a module's forward."""
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        self.undos.append(Hooked(module, hook))

    def after(self, module: nn.Module, hook: Any, *, with_kwargs: bool = False, always_call: bool = False) -> None:
        """Hang a hook after a module's forward."""
        module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always_call)
        self.undos.append(Hooked(module, hook))

    def stand(self, module: nn.Module, name: str, standin: Standin) -> None:
        """Put something on a module in front of the method ``name`` of its class."""
        module.__dict__[name] = standin
        self.undos.append(InFront(module, name, standin))

    def undo(self) -> None:
        """Take everything back, the last change first."""
        for one in reversed(self.undos):
            one.undo()


def sweep(model: nn.Module) -> None:
    """Take tokred's changes off every module of ``model``, whoever made them."""
    for module in model.modules():
        if is_swapped(module):
            restore(module)
        for name in [k for k, value in module.__dict__.items() if isinstance(value, Standin)]:
            del module.__dict__[name]
        _drop(module, lambda hook: isinstance(hook, Hook))


def states_in(model: nn.Module) -> Iterator[tuple[nn.Module, State]]:
    """The patched parts of ``model`` that swapped modules tell of, whoever owns them."""
    for module in model.modules():
        state = module.__dict__.get(SETTINGS)
        if isinstance(state, State):
            yield module, state


def _hooks(module: nn.Module) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """A module's hooks, and the tables that say more about them."""
    return (
        (members.HOOKS_BEFORE.need(module), (members.HOOKS_BEFORE_NAMED.need(module),)),
        (members.HOOKS_AFTER.need(module), (members.HOOKS_AFTER_NAMED.need(module), members.HOOKS_ALWAYS.need(module))),
    )


def _drop(module: nn.Module, wanted: Any) -> None:
    for hooks, others in _hooks(module):
        for key in [k for k, hook in hooks.items() if wanted(hook)]:
            del hooks[key]
            for other in others:
                other.pop(key, None)
