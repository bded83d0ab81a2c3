"""Vision transformers on a map, with attention in windows: SAM's encoder (timm, transformers) and ViTDet.

Between blocks their tokens have to stand on the grid, for the windows, the neck and every reader of a map. So nothing
is carried on: a block reduces its tokens before the attention, attends and runs its MLP on those that are left, and
adds what came out to all tokens, each member of a group the same. A token that was dropped gets nothing added.

The attention is composed here from the host's own projections and norms, because the hosts build the bias of all pairs
before any function that could be watched; blocks that a host has changed are refused, not guessed at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.adapters.contract import check_at_hand, members, parameters_at_hand, words
from tokred.adapters.contract.spelling import Word
from tokred.adapters.encoder.block import SETTINGS, Recipe, Settings, attention_bias, refuse_symbols
from tokred.adapters.encoder.capture import add_bias
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.swap import host_class
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.site import Site
from tokred.errors import UnsupportedModelError

# Weight of a padded row where it shares a group with real ones: small enough to be lost, large enough to divide by.
_PADDED = 1e-12


class Grid(NamedTuple):
    """A map of ``height x width`` tokens, cut into windows of ``side x side`` that reach over the bottom and the right;
    side 0: not cut."""

    height: int
    width: int
    side: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return (self.side, self.side) if self.side else (self.height, self.width)

    @property
    def area(self) -> int:
        """Tokens of a window."""
        return self.shape[0] * self.shape[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Windows from top to bottom and from left to right."""
        return -(-self.height // self.shape[0]), -(-self.width // self.shape[1])

    @property
    def number(self) -> int:
        """Windows of a map."""
        return self.counts[0] * self.counts[1]

    @property
    def padded(self) -> bool:
        """True where some windows reach beyond the map."""
        return self.number * self.area != self.height * self.width

    def split(self, maps: Tensor) -> Tensor:
        """``(B, height, width, C)`` to ``(B * number, area, C)``, zeros where there is no map."""
        (rows, columns), (h, w), c = self.counts, self.shape, maps.shape[-1]
        if self.padded:
            maps = F.pad(maps, (0, 0, 0, columns * w - self.width, 0, rows * h - self.height))
        return maps.reshape(-1, rows, h, columns, w, c).transpose(2, 3).reshape(-1, h * w, c)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of :meth:`split`, without the padding."""
        (rows, columns), (h, w), c = self.counts, self.shape, windows.shape[-1]
        maps = windows.reshape(-1, rows, columns, h, w, c).transpose(2, 3).reshape(-1, rows * h, columns * w, c)
        return maps[:, : self.height, : self.width]

    def weights(self, like: Tensor) -> Tensor | None:
        """``(B * number, area)`` float32: one for tokens of the map ``like`` ``(B, ...)``; None where all are."""
        if not self.padded:
            return None
        inside = torch.ones(1, self.height, self.width, 1, device=like.device)
        return self.split(inside)[..., 0].clamp(min=_PADDED).repeat(len(like), 1)


_NO_GRID = Grid(0, 0, 0)


@dataclass(frozen=True, eq=False)
class WindowState(TokenState):
    """State of one block's windows, ``(B * number, ...)``.

    Attributes:
        grid: how the map is cut.
    """

    grid: Grid = _NO_GRID  # type: ignore[assignment]


@dataclass(frozen=True)
class Parts:
    """Names that a host library gives the parts of its block.

    Attributes:
        norm1, attention, norm2: sub-modules of the block; the MLP is ``mlp``, the window's side ``window_size``.
        heads: attribute of the attention, its number of heads.
        channels_first: maps are ``(B, C, H, W)`` between blocks.
        tupled: the block returns a tuple.
        rotate: ``rotate(attention, rows, representative)`` turns queries or keys by their positions.
    """

    norm1: str
    attention: str
    norm2: str
    heads: str
    channels_first: bool = False
    tupled: bool = False
    rotate: Callable[[Any, Tensor, Tensor], Tensor] | None = None


class WindowRecipe(Recipe):
    """The way to run blocks on a map, with attention in windows or over all of it."""

    def __init__(self, parts: Parts, argument_names: tuple[str, ...]) -> None:
        super().__init__(False, {}, argument_names)
        self.parts = parts

    def run(self, block: Any, host_forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
        """The host's own block where nothing is reduced; else its parts on fewer tokens."""
        refuse_symbols(x)
        settings: Settings = getattr(block, SETTINGS)
        shared, layer = settings.shared, settings.layer
        maps = x.permute(0, 2, 3, 1) if self.parts.channels_first else x
        grid = Grid(maps.shape[1], maps.shape[2], int(words.SIDE.need(block)))
        out, state = None, WindowState(grid.area, grid=grid)
        if settings.active and shared.method.acts(grid.area, Place(layer, shared.depth)):
            if words.MAPS.of(self.bind(args, kwargs)):
                raise UnsupportedModelError("a block that runs on fewer tokens has no attention weights of all of them")
            out, state = self._reduced(block, settings, maps, grid)
        slots = grid.area if state.size is None else state.size.shape[1]
        shared.record(layer, grid.number * grid.area, grid.number * slots, state)
        return host_forward(x, *args, **kwargs) if out is None else self._answer(block, out)

    def _answer(self, block: Any, maps: Tensor) -> Any:
        """The block's output, as the host's own block returns it."""
        if self.parts.channels_first:
            maps = maps.permute(0, 3, 1, 2)
        if members.SECOND_BRANCH.part(block, False):
            maps = members.CONVOLUTION_BEHIND.need(block)(maps)
        return (maps,) if self.parts.tupled else maps

    def _reduced(self, block: Any, settings: Settings, maps: Tensor, grid: Grid) -> tuple[Tensor | None, WindowState]:
        """The block on fewer tokens, or None where the method changes nothing."""
        shared, parts = settings.shared, self.parts
        attention = getattr(block, parts.attention)
        heads = project(attention, grid.split(getattr(block, parts.norm1)(maps)), getattr(attention, parts.heads))
        site = Site(
            x=lambda: grid.split(maps),
            q=heads[0],
            k=heads[1],
            v=heads[2],
            scale=members.FACTOR.need(attention),
            grid=grid.shape,
            length=grid.area,
            layer=settings.layer,
            depth=shared.depth,
        )
        step = shared.method.reduce(site)
        if step.trivial:
            return None, WindowState(grid.area, grid=grid)
        state = WindowState(grid.area, step.sizes(), step.representative, (step,), (None,), step.mask, grid=grid)
        y = self._attend(attention, heads, state, shared.method.proportional)
        y = grid.join(residual(block, step.unmerge(y), (members.SCALES[0], members.DEPTHS[0])))
        maps = maps + residual(block, y, (members.DEPTH_OF_BOTH,))
        y = self._mlp(block, maps, step, grid)
        return maps + residual(block, y, (members.SCALES[1], members.DEPTHS[1], members.DEPTH_OF_BOTH)), state

    def _attend(
        self, attention: Any, heads: tuple[Tensor, Tensor, Tensor], state: WindowState, proportional: bool
    ) -> Tensor:
        """``(B', M, C)`` attention among the tokens that are left."""
        (step,), rows, rotate = state.steps, state.representative, self.parts.rotate
        assert rows is not None  # a step has been taken
        q, k, v = (merge_heads(step, t) for t in heads)
        mask = None
        if words.RELATIVE.part(attention) is not None:
            with parameters_at_hand(attention):
                mask = decomposed_bias(q, rows, state.grid.shape, attention)
        if rotate is not None:
            q, k = rotate(attention, q, rows).to(v.dtype), rotate(attention, k, rows).to(v.dtype)
        bias = attention_bias(state, proportional)
        if bias is not None:
            mask = add_bias(mask, bias, q.dtype)
        scale = members.FACTOR.need(attention)
        inner = members.DROPOUT_INSIDE.part(attention)
        dropout = inner.p if attention.training and inner is not None else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return residual(attention, y.transpose(1, 2).flatten(2), (members.LAST_OF_ATTENTION, members.DROPOUT_BEHIND))

    def _mlp(self, block: Any, maps: Tensor, step: Reduction, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` what the MLP adds. Where padding leaves more rows in the windows than the map has, it runs
        on the map."""
        norm, mlp = getattr(block, self.parts.norm2), words.MLP.need(block)
        if grid.padded and grid.number * step.slots >= grid.height * grid.width:
            full: Tensor = mlp(norm(maps.flatten(1, 2))).view(maps.shape)
            return full
        short = step.merge(grid.split(maps), grid.weights(maps))
        return grid.join(step.unmerge(mlp(norm(short))))


def project(attention: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, N, C)`` to queries, keys and values ``(B, H, N, D)``, after their norms."""
    b, n, _ = x.shape
    q, k, v = words.TOGETHER.need(attention)(x).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return residual(attention, q, (words.QUERY_NORM,)), residual(attention, k, (words.KEY_NORM,)), v


def residual(holder: Any, y: Tensor, steps: tuple[Word, ...]) -> Tensor:
    """The sub-modules of these roles, one after the other, those that there are."""
    for word in steps:
        module = word.part(holder)
        y = y if module is None else module(y)
    return y


def merge_heads(step: Reduction, t: Tensor) -> Tensor:
    """``(B, H, N, D)`` to ``(B, H, M, D)``: means, however the method combines features, or the kept rows."""
    b, h, n, d = t.shape
    mode = "keep" if step.mode == "keep" else "mean"
    return step.merge(t.transpose(1, 2).reshape(b, n, h * d), mode=mode).view(b, step.slots, h, d).transpose(1, 2)


_RELATIVE = (words.RELATIVE, words.RELATIVE_WIDE)


def decomposed_bias(q: Tensor, representative: Tensor, shape: tuple[int, int], attention: Any) -> Tensor:
    """The bias of relative rows and columns, of pairs of the tokens that are left.

    Args:
        q: ``(B, H, M, D)`` queries, merged.
        representative: ``(B, M)`` where each stands in the window.
        shape: rows and columns of the window.
        attention: holds the two tables.

    Returns:
        ``(B, H, M, M)``: the bias of all pairs, were each query put back at its place, at the rows and columns left.
    """
    width = shape[1]
    sides = zip((representative // width, representative % width), shape, _RELATIVE, strict=True)
    terms, places = [], []
    for at, size, word in sides:
        table = relative_table(attention, size, check_at_hand(word.need(attention), word.name))  # (size, size, D)
        terms.append(torch.einsum("bhmd,bmsd->bhms", q, table[at]))
        places.append(F.one_hot(at, size))
    chosen = torch.cat(places, -1).to(q.dtype).transpose(1, 2)  # (B, rows + columns, M)
    return torch.cat(terms, -1) @ chosen.unsqueeze(1)


def relative_table(attention: Any, size: int, table: Tensor) -> Tensor:
    """``(size, size, D)`` by the host's own function: the embedding of each pair of positions."""
    own = members.RELATIVE_TABLE.part(attention)
    if own is None:  # older compilers do not know whether a method is true
        own = members.RELATIVE_TABLE.at(vars(sys.modules[host_class(attention).__module__]))
    found: Tensor = own(size, size, table)
    return found.to(table.dtype)
