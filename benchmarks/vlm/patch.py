"""Everything that the patch of a vision-language model does in a forward, to be timed or watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from tokred.adapters.vlm import decoder_layers, hooks, host, taps
from tokred.vlm.before_llm import ProjectorMethod
from tokred.vlm.layered import LayerMethod

# Where it stands and what it is called; the parts of "decide" are inside the others.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (hooks.EnterCore, "__call__", "core"),
    (hooks.LeaveCore, "__call__", "core"),
    (hooks.EnterLanguage, "__call__", "language"),
    (hooks.LeaveLanguage, "__call__", "language"),
    (decoder_layers.Inner, "enter", "layer"),
    (decoder_layers.Inner, "_note", "note"),
    (taps.ProjectorTap, "__call__", "tower"),
    (taps.HeadTap, "__call__", "tower"),
    (taps.TablesTap, "__call__", "tower"),
    (taps.FusedTap, "__call__", "tower"),
    (host, "describe", "tower"),
    (ProjectorMethod, "reduce", "decide"),
    (LayerMethod, "reduce", "decide"),
)


@contextlib.contextmanager
def around(enter: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """While this lasts, models that are patched inside it enter ``enter(part)`` around each of :data:`PARTS`.

    A part inside one of the same name (CAT's selector inside CAT) is not entered again. What runs a decoder layer is no
    part, nor are the hooks of torch that call these.
    """
    inside: set[str] = set()

    def wrapped(own: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if part in inside:
                return own(*args, **kwargs)
            inside.add(part)
            try:
                with enter(part):
                    return own(*args, **kwargs)
            finally:
                inside.discard(part)

        return call

    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in PARTS]
    try:
        for owner, name, part in PARTS:
            setattr(owner, name, wrapped(owner.__dict__[name], part))
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)
