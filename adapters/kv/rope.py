"""Rotary embeddings as a policy reads them: queries before rotation, and rotations of positions to come."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import terms, words


class LayerRope:
    """One layer's rotary embedding in one forward.

    Args:
        embedding: makes cosines and sines of positions.
        layer_type: argument of the embedding, where it takes one.
        tables: cosines and sines ``[B or 1, M, D]`` of this forward's tokens.
    """

    def __init__(self, embedding: nn.Module, layer_type: str | None, tables: tuple[Tensor, Tensor]) -> None:
        self.embedding = embedding
        self.layer_type = layer_type
        self.tables = tables

    def part(self, count: int, first: int = 0) -> LayerRope:
        """Rotary embedding of ``count`` tokens, from the ``first`` on."""
        cos, sin = (t[:, first : first + count] for t in self.tables)
        return LayerRope(self.embedding, self.layer_type, (cos, sin))

    def unrotate(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, M, D]`` before rotation, up to rounding."""
        cos, sin = (t.float().unsqueeze(1) for t in self.tables)
        # Some models scale the tables; turning back divides by the square of that.
        square = cos.square() + sin.square()
        cos, sin = cos / square, sin / square
        x = q.float()
        half = x.shape[-1] // 2
        # Of a long prompt every pass over the queries counts: this is one, and a half for each half.
        found = x * cos
        found[..., :half].addcmul_(x[..., half:], sin[..., :half])
        found[..., half:].addcmul_(x[..., :half], sin[..., half:], value=-1)
        return found

    def mean(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Mean cosines and sines ``[D]`` of ``count`` positions from ``start`` on."""
        positions = torch.arange(start, start + count, device=self.tables[0].device)
        cos, sin = tables(self.embedding, self.layer_type, positions)
        return cos.mean(0), sin.mean(0)

    def turns(self) -> tuple[Tensor, float]:
        """Angle ``[D/2]`` float32 from one position to the next, and the factor of the tables."""
        return one_turn(self.embedding, self.layer_type, self.tables[0].device)


def tables(embedding: Any, layer_type: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[M, D]`` of some positions, in float32.

    Args:
        embedding, layer_type: as :class:`LayerRope` has them.
        positions: ``[M]`` int64, on the device of the embedding.
    """
    extra = () if layer_type is None else (layer_type,)
    cos, sin = embedding(torch.zeros(1, len(positions), 1, device=positions.device), positions[None], *extra)
    return cos[0].float(), sin[0].float()


def one_turn(embedding: Any, layer_type: str | None, device: torch.device) -> tuple[Tensor, float]:
    """Angle ``[R]`` float32 from one position to the next, and the factor of the tables.

    Args:
        embedding, layer_type: as :class:`LayerRope` has them.
        device: of the embedding.
    """
    # In float32, whatever the model runs in: later angles are multiples of this one.
    both = tables(embedding, layer_type, torch.ones(1, dtype=torch.long, device=device))
    cos, sin = (t[0, : t.shape[-1] // 2] for t in both)
    return torch.atan2(sin, cos), float(torch.hypot(sin[0], cos[0]))


def of_one_number(decoder: Any) -> bool:
    """True if a token's place is one number that says the same whatever the length; also without any rotation."""
    text = str(words.ROPE.part(words.CONFIG.need(decoder)))
    embedding = words.ROTARY.part(decoder)
    return not (words.AXES.on(embedding) or any(word in text for word in (*words.AXES.names, *terms.BY_LENGTH.names)))


def turned_channels(decoder: Any, attention: Any) -> int:
    """Channels of a head, the first ones, that a decoder turns as two halves, by angles that only positions decide.

    :class:`LayerRope` can undo it where they are all channels. 0: it turns others, otherwise, or none.
    """
    embedding = words.ROTARY.part(decoder)
    turn = words.HALF_TURN.part(sys.modules[type(attention).__module__])
    if not isinstance(embedding, nn.Module) or turn is None:
        return 0
    # Embeddings that follow the length, or have several axes, would change by being asked.
    if not of_one_number(decoder):
        return 0
    if turn(torch.arange(4.0)[None]).tolist() != [[-2.0, -3.0, 0.0, 1.0]]:
        return 0
    device = next((b.device for b in embedding.buffers()), torch.device("cpu"))
    try:
        cos, _ = tables(embedding, layer_type_of(embedding, attention), torch.zeros(1, dtype=torch.long, device=device))
    except KeyError:  # layers of this type do not turn
        return 0
    return int(cos.shape[-1])


def layer_type_of(embedding: Any, attention: Any) -> str | None:
    """The argument that the embedding takes besides positions: the layer's type, or None."""
    if not words.LAYER_TYPE.among(inspect.signature(embedding.forward).parameters):
        return None
    found = words.LAYER_TYPE.part(attention)
    return str(found) if found else terms.FULL.name
