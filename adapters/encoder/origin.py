"""Where the tokens of an encoder begin: how its patches stand, forward by forward, and whether the model is still as it
was when it was patched.

A model takes images of many sizes, and 196 patches stand 14 x 14 as well as 7 x 28: only the convolution that made them
tells. So a hook on it notes the sides of its map, and the first block takes the note. A note is taken once, by the
thread that left it, in the same pass (forward, or a recomputation in the backward): tokens that come without one, or
more or fewer than the note speaks of, have no grid.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.encoder.sides import motion_of, pixels_of
from tokred.adapters.swap import Hook
from tokred.encoder.motion import feature_motion
from tokred.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.encoder.host import EncoderHost
    from tokred.adapters.encoder.state import Shared


class Origin(Hook):
    """Hook on the module that makes a model's tokens: after its forward, or before the model's where it is unknown.

    Args:
        host: of the model.
        shared: of its blocks; gets the notes.
    """

    def __init__(self, host: EncoderHost, shared: Shared) -> None:
        self.model, self.note, self.layout = host.model, shared.note, host.layout
        self.family, self.path = host.family, host.blocks[0][0].rpartition(".")[0]
        self.moving = "motion" in shared.method.reads
        self.filmed = "frame_motion" in shared.method.reads
        self.seen = "pixels" in shared.method.reads
        self.blocks = self._blocks()
        # A head that begins to pool would average merged tokens as if each were one; where they are dropped, those that
        # are left are averaged by intention.
        merges = shared.method.uneven or not shared.method.drops
        self.pools = host.pools if shared.restore == "none" and not host.pooled and merges else None

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> None:
        self.check()
        sides = None if self.layout is None else self.layout(module, inputs, output)
        if self.moving and sides is not None and sides.frames is not None:
            # Here, since positions are added next, which differ from frame to frame by themselves.
            sides = sides._replace(motion=feature_motion(output.flatten(2).mT, sides.frames))
        if self.filmed and sides is not None and sides.frames is not None:
            sides = sides._replace(motion=motion_of(module, inputs[0]))
        if self.seen and sides is not None:
            sides = sides._replace(pixels=pixels_of(module, inputs[0]))
        self.note.leave(sides)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """A copied hook for the copy of the whole model; a silent one for the copy of a part (to count operations)."""
        model = memo.get(id(self.model))
        if model is None:
            return _Silent()
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = {k: model if k == "model" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        return copied

    def check(self) -> None:
        """Refuse a model that was changed in a way that its patch does not know of.

        Raises:
            UnsupportedModelError: blocks were taken out or put in, or its head pools over all tokens now.
        """
        change = ""
        if self._blocks() != self.blocks:
            change = f"it has {self._blocks()} blocks instead of {self.blocks}"
        elif self.pools is not None and self.pools(self.model):
            change = "its head pools over all tokens now, which would count a merged one once"
        if change:
            raise UnsupportedModelError(
                f"{self.family} was changed after tokred.apply: {change}; call tokred.apply(model, ...) again"
            )

    def _blocks(self) -> int:
        return len(self.model.get_submodule(self.path))  # type: ignore[arg-type]


class _Silent(Hook):
    def __call__(self, *given: Any) -> None:
        return None


def watch(host: EncoderHost, shared: Shared, changes: Changes) -> None:
    """Hook an :class:`Origin` in. A model that does not show where its tokens begin is asked when it is called."""
    origin = Origin(host, shared)
    if host.origin is None:
        changes.before(host.model, origin)
    else:
        changes.after(host.origin, origin)
