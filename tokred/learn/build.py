"""Make the module that a method owns, for one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tokred.core.learned import Facts
from tokred.core.method import Method


def build(
    method: Method, facts: Callable[[], Facts], given: nn.Module | None = None, *, like: nn.Module | None = None
) -> nn.Module | None:
    """The method's module: ``given``, or a new one, with the weights that the method was loaded with if it was.

    Args:
        method: with or without weights.
        facts: asks the model; only where the method reads ``"module"``.
        given: a module that :meth:`tokred.Method.module` made before, which goes on as it is.
        like: part of the model, to whose device, type and mode the module is brought.

    Returns:
        The module; None where the method has none.

    Raises:
        TypeError: the method has no weights but is given some, or the module is of another kind.
        ValueError: the weights, or those of the given module, are for another model or other settings.
    """
    if "module" not in method.reads:
        if given is not None or method.loaded is not None:
            raise TypeError(f"{method.name!r} has no weights at these settings, so it takes no module: {method}")
        return None
    known = facts()
    made = method.module(known)
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"{type(method).__name__} reads 'module', so its module must return a torch.nn.Module, got {made}"
        )
    if given is not None:
        if type(given) is not type(made):
            raise TypeError(f"module must be a {type(made).__name__} for {method.name!r}, got a {type(given).__name__}")
        _check(f"module does not fit {method} on {known}", made, given.state_dict())
        made = given
    elif method.loaded is not None:
        tensors, before = method.loaded
        if not before.fits(known):
            raise ValueError(
                f"the weights of {method.name!r} were learned on {before}, but this model is {known}: load a setting "
                "that was saved from such a model, or train anew"
            )
        _check(f"the weights do not fit {method}", made, tensors)
        made.load_state_dict(tensors, strict=True)
    return made if like is None else _placed(made, like)


def chosen(methods: Sequence[Method], given: nn.Module | None) -> Method | None:
    """The one of several methods that takes the module that was given; None where none was.

    Raises:
        TypeError: not exactly one of them has weights.
    """
    if given is None:
        return None
    if not isinstance(given, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(given).__name__}")
    takers = [method for method in methods if "module" in method.reads]
    if len(takers) != 1:
        names = ", ".join(repr(method.name) for method in methods)
        raise TypeError(f"module goes with one method that has weights; of {names} {len(takers)} have some")
    return takers[0]


def _placed(module: nn.Module, like: nn.Module) -> nn.Module:
    """Brought to the device and the type of the model's weights, and to its mode."""
    p = next((p for p in like.parameters() if p.is_floating_point()), None)
    if p is not None:
        module.to(p.device, p.dtype if p.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32)
    return module.train(like.training)


def _check(what: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    other = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted({*own, *other}):
        if own.get(name) != other.get(name):
            raise ValueError(f"{what}: {name} must be {own.get(name, 'left out')}, got {other.get(name, 'none')}")
