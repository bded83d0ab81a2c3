"""The host record of models whose blocks work on a map: which blocks reduce, and what they cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import words
from tokred.adapters.encoder.host import BlockCost, EncoderHost, argument_names
from tokred.adapters.encoder.running import LayerRecord
from tokred.adapters.encoder.state import Shared
from tokred.adapters.encoder.windows import Grid, Parts, WindowRecipe, WindowState
from tokred.adapters.swap import host_class
from tokred.core.method import Method
from tokred.core.place import Place
from tokred.encoder.method import BlockMethod
from tokred.errors import UnsupportedModelError

# What methods whose tokens come back some blocks later need, beside what they say that they read.
_BETWEEN = "fewer tokens from block to block"


@dataclass(kw_only=True)
class WindowHost(EncoderHost):
    """A model of blocks on a map.

    Attributes:
        every: all blocks, by name; ``blocks`` are those that reduce.
        map_of: rows and columns of the map for an input shape.
        around: multiply-adds outside all blocks for an input shape.
        windows: which blocks ``blocks`` are.
    """

    every: list[tuple[str, nn.Module]]
    map_of: Callable[[tuple[int, ...]], tuple[int, int]]
    around: Callable[[tuple[int, ...]], int]
    windows: str = "auto"

    @property
    def where(self) -> str:
        return "inside"

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """Inputs that the method reads and this host cannot supply; blocks on fewer tokens, where some come back later:
        every block here gives the whole map back."""
        one: Method = method if isinstance(method, Method) else method()
        comes_back = isinstance(one, BlockMethod) and one.joins(self.depth) is not None
        return super().missing(one) | ({_BETWEEN} if comes_back else frozenset())

    def choose(self, windows: str) -> WindowHost:
        """The blocks of global attention, those of attention in windows, or all."""
        whole = [(n, b) for n, b in self.every if not words.SIDE.need(b)]
        kinds = {"global": whole, "windowed": [(n, b) for n, b in self.every if words.SIDE.need(b)], "all": self.every}
        kinds["auto"] = whole or self.every
        if windows not in kinds:
            raise ValueError(f"windows is {windows!r}; allowed are {', '.join(map(repr, kinds))}")
        if not kinds[windows]:
            raise ValueError(f"windows is {windows!r}, but no block of this {self.family} is {windows}")
        return replace(self, blocks=kinds[windows], windows=windows, outside_macs=self._rest(kinds[windows]))

    def _rest(self, chosen: list[tuple[str, nn.Module]]) -> Callable[[tuple[int, ...]], int]:
        names = {name for name, _ in chosen}
        left = [block for name, block in self.every if name not in names]

        def macs(shape: tuple[int, ...]) -> int:
            grids = [self._grid(block, shape) for block in left]
            counted = (window_macs(self.cost(b), g, g.area) for b, g in zip(left, grids, strict=True))
            return self.around(shape) + sum(counted)

        return macs

    def _grid(self, block: Any, shape: tuple[int, ...]) -> Grid:
        return Grid(*self.map_of(shape), int(words.SIDE.need(block)))

    def plan(self, method: BlockMethod | None, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        rows = []
        for layer, (_, block) in enumerate(self.blocks):
            grid = self._grid(block, shape)
            place = Place(layer, self.depth)
            after = grid.area if method is None else method.tokens(grid.area, place)
            macs = window_macs(self.cost(block), grid, after)
            rows.append((grid.number * grid.area, grid.number * after, macs))
        return rows

    def counted(self, layer: int, record: LayerRecord, method: BlockMethod) -> tuple[int, int]:
        assert isinstance(record.state, WindowState)
        cost, grid = self.cost(self.blocks[layer][1]), record.state.grid
        return window_macs(cost, grid, record.tokens_out // grid.number), window_macs(cost, grid, grid.area)

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> Shared:
        shared = super().patch(method, where, expose, changes)
        shared.windows = self.windows
        return shared


def window_macs(cost: BlockCost, grid: Grid, slots: int) -> int:
    """Multiply-adds of one map: queries, keys and values are made of every token, the rest of those that are left. The
    bias of positions is not counted."""
    before, after = grid.number * grid.area, grid.number * slots
    attention = (3 * before + after) * cost.attention // 4 + after * slots * cost.pair
    return attention + min(after, grid.height * grid.width) * cost.mlp


def window_host(
    model: Any,
    blocks: list[tuple[str, nn.Module]],
    parts: Parts,
    known: frozenset[str],
    *,
    family: str,
    map_of: Callable[[tuple[int, ...]], tuple[int, int]],
    around: Callable[[tuple[int, ...]], int],
) -> EncoderHost:
    """The host record of a model of such blocks.

    Args:
        model: holds the blocks.
        blocks: all of them, by name.
        parts: what their parts are called.
        known: names that the forwards of block and attention use; one more means another composition.
        family: for messages and tables.
        map_of: rows and columns of the map for an input shape.
        around: multiply-adds outside all blocks for an input shape.

    Raises:
        UnsupportedModelError: it has none, or they are composed otherwise than is known here.
    """
    if not blocks:
        raise UnsupportedModelError(f"{family} has no blocks")
    attentions = [getattr(block, parts.attention) for _, block in blocks]
    for module in (blocks[0][1], attentions[0]):
        used = set(inspect.unwrap(host_class(module).forward).__code__.co_names)
        if not used <= known:
            raise UnsupportedModelError(
                f"the forward of {family}'s {host_class(module).__name__} is not the one that is known here: it also "
                f"uses {', '.join(sorted(used - known))}"
            )
    placed = parts.rotate is not None or words.RELATIVE.part(attentions[0]) is not None
    return WindowHost(
        family=family,
        model=model,
        blocks=blocks,
        recipe=WindowRecipe(parts, argument_names(blocks[0][1])),
        prefix=0,
        # Its columns do not follow from queries and keys where the pair's places count.
        supplies=frozenset({"x", "q", "k", "v", "grid"} | (set() if placed else {"attention"})),
        pooled=False,
        full="all",
        tokens=lambda shape: map_of(shape)[0] * map_of(shape)[1],
        outside_macs=around,
        every=blocks,
        map_of=map_of,
        around=around,
    ).choose("auto")
