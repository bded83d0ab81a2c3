"""Layers of a vision tower that use the features of a reference frame again, as a stream goes from frame to frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import members, words
from tokred.adapters.encoder.taps import split_heads
from tokred.adapters.swap import SETTINGS, host_class
from tokred.adapters.vlm.families import TOWER_LAYERS, Facts, TowerLayer, class_tokens, tower_layers
from tokred.errors import UnsupportedModelError
from tokred.kernels.gather_rows import gather_rows
from tokred.vlm.tools.reuse import Reuse


class Held(NamedTuple):
    """Tensors that one layer remembers of the reference frame, ``(1, S, C)`` each.

    Attributes:
        keys, values: of all heads joined.
        attention: output of the attention behind its projection.
        mlp: output of the MLP.
    """

    keys: Tensor
    values: Tensor
    attention: Tensor
    mlp: Tensor


@dataclass(eq=False)
class TowerReuse:
    """The tower of one stream.

    Attributes:
        how: what is used again, and how often.
        layers: of the tower.
        prefix: class tokens before the patches.
        held: of the reference frame, by layer; empty before the first.
        refers: whether the frame under way is a reference.
    """

    how: Reuse
    layers: list[nn.Module]
    prefix: int
    held: dict[int, Held] = field(default_factory=dict)
    refers: bool = True

    @classmethod
    def of(cls, how: Reuse, core: Any, facts: Facts) -> TowerReuse:
        """For the tower of a model.

        Raises:
            UnsupportedModelError: its layers are of a kind whose parts are not known.
        """
        layers = tower_layers(core, facts)
        kinds = sorted({host_class(layer).__name__ for layer in layers}) or [host_class(core).__name__]
        if not layers or any(kind not in TOWER_LAYERS for kind in kinds):
            raise UnsupportedModelError(
                f"features of the tower cannot be used again in {', '.join(kinds)}: known are "
                f"{', '.join(TOWER_LAYERS)}, whose tokens attend to one frame, with projections apart; leave reuse out"
            )
        return cls(how, layers, class_tokens(core, facts))

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are held."""
        return sum(x.untyped_storage().nbytes() for one in self.held.values() for x in one)

    @contextlib.contextmanager
    def frame(self, number: int) -> Iterator[None]:
        """Inside, the tower runs on the frame of this number; what breaks off leaves the reference as it was."""
        before, self.refers = dict(self.held), self.how.refers(number) or not self.held
        try:
            yield
        except BaseException:
            self.held = before
            raise

    def hang(self, changes: Changes) -> None:
        """Let the layers run so."""
        for index, layer in enumerate(self.layers):
            changes.swap(layer, body, Seat(self, index, TOWER_LAYERS[host_class(layer).__name__]))


class Seat(NamedTuple):
    """A layer's place in its tower: whose it is, its number, and the names of its parts."""

    owner: TowerReuse
    number: int
    facts: TowerLayer


def body(host: Any) -> dict[str, Any]:
    """The forward of a layer that uses features again."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat: Seat = self.__dict__[SETTINGS]
        return run(self, seat, args[0] if args else words.STATES.at(kwargs))

    return {"forward": forward}


def run(layer: Any, seat: Seat, x: Tensor) -> Tensor:
    """One layer on the tokens ``(1, S, C)`` of a frame.

    A reference frame is computed as a whole, and remembered. Of others the keys of all tokens are made; those least
    like the reference's have queries, values and MLP of their own, and attend to the tables of all.
    """
    owner, facts = seat.owner, seat.facts
    attention = getattr(layer, facts.attention)
    first, second, mlp = (getattr(layer, name) for name in (facts.first, facts.second, facts.mlp))
    query, key, value, output = (
        getattr(attention, name) for name in (facts.query, facts.key, facts.value, facts.output)
    )
    y = first(x)
    keys = key(y)
    # The whole frame goes through the very same modules as in the host's own forward.
    if owner.refers:
        values = value(y)
        attended = output(_attend(attention, query(y), keys, values))
        x = x + attended
        changed: Tensor = mlp(second(x))
        owner.held[seat.number] = Held(*(one.detach() for one in (keys, values, attended, changed)))
        return x + changed
    held = owner.held[seat.number]
    rows = owner.how.stale(keys, held.keys, owner.prefix)
    if not rows.shape[1]:
        return x + held.attention + held.mlp
    some = gather_rows(y, rows)
    keys = _put(held.keys, rows, gather_rows(keys, rows))
    values = _put(held.values, rows, value(some))
    x = x + _put(held.attention, rows, output(_attend(attention, query(some), keys, values)))
    return x + _put(held.mlp, rows, mlp(second(gather_rows(x, rows))))


def _put(table: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """``(1, S, C)``: ``table`` with other rows."""
    return table.scatter(1, rows.unsqueeze(-1).expand_as(new), new.to(table.dtype))


def _attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``(1, n, C)``: the attention of some queries over all keys, by torch's function whatever the tower uses."""
    heads = int(words.TOWER_HEADS.need(attention))
    q, k, v = (split_heads(x, heads) for x in (query, keys, values))
    scale = members.FACTOR.need(attention)
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return found.transpose(1, 2).flatten(2)
