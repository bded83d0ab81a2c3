"""transformers: packed towers, and the models around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.contract.spelling import parameters
from tokred.adapters.encoder.host import EncoderHost, argument_names
from tokred.adapters.encoder.packed.host import PackedHost
from tokred.adapters.encoder.packed.layout import Folding
from tokred.adapters.encoder.packed.run import PackedRecipe
from tokred.adapters.encoder.packed.tables import AROUND, PACKED, PARTS
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of a packed tower, alone or in a known model; None where there is none.

    Raises:
        UnsupportedModelError: its blocks are composed otherwise than is known here.
    """
    path, layered = AROUND.get(host_class(model).__name__, ("", False))
    tower: Any = model
    for part in path.split(".") if path else ():
        tower = getattr(tower, part, None)
    name = "" if tower is None else host_class(tower).__name__
    return _host(name, tower, layered) if name in PACKED else None


def _host(name: str, tower: Any, layered: bool) -> EncoderHost:
    row, config = PACKED[name], words.CONFIG.need(tower)
    blocks = [(f"{row.layers}.{i}", block) for i, block in enumerate(tower.get_submodule(row.layers))]
    if not blocks:
        raise UnsupportedModelError(f"transformers' {name} has no blocks")
    windowed = words.WHOLE_BLOCKS.on(tower)
    cell = 1 if row.images or row.joint else int(words.JOINED.need(tower))
    side = int(words.SIDE.need(tower)) // cell // int(words.PATCH.need(tower)) if windowed else 0
    attention: Any = blocks[0][1].get_submodule(row.attention)
    heads = int(words.TOWER_HEADS.part(attention) or words.HEADS.need(config))
    recipe = PackedRecipe(
        _splits(blocks[0][1]),
        argument_names(blocks[0][1]),
        frozenset(words.DEEP_LAYERS.part(tower) or ()),
        frozenset(words.WHOLE_BLOCKS.need(tower)) if windowed else None,
        row.images,
        _Keys(heads, 3 if row.together else 1),
    )
    # Rows and columns alone do not place the patches of a clip that is one sequence.
    supplies = {"x", "q", "k", "v"} | (set() if row.joint else {"grid"})
    return PackedHost(
        family=f"transformers {name}",
        model=tower,
        blocks=blocks,
        recipe=recipe,
        prefix=0,
        # Columns of windows say nothing about a frame, and masks of images are no bias of keys.
        supplies=frozenset(supplies if windowed or row.images else {*supplies, "attention"}),
        pooled=False,
        # What is behind joins rows by their places.
        full="all" if layered else ("none" if row.images else "last"),
        tokens=lambda shape: _rows(shape, int(words.PATCH.need(config)) if row.images else None),
        outside_macs=lambda shape: 0,
        key_norms=[block.get_submodule(f"{row.attention}.{row.keys}") for _, block in blocks],
        folding=Folding(cell, side, row.joint),
        entry=parameters(host_class(tower).forward)[1:],
        patch_side=int(words.PATCH.need(config)) if row.images else None,
    )


class _Keys:
    """Keys ``(M, H, D)`` of what a projection makes ``(M, parts * H * D)``; queries, keys and values, or keys alone.

    Args:
        heads: ``H``.
        parts: how many there are, of which keys are the second where they are not alone.
    """

    def __init__(self, heads: int, parts: int) -> None:
        self.heads, self.parts = heads, parts

    def __call__(self, made: Tensor) -> Tensor:
        rows = made.reshape(made.shape[-2], self.parts, self.heads, -1)
        return rows[:, self.parts // 2]


def _splits(block: Any) -> bool:
    """True for a block that is nothing but its four parts."""
    forward: Callable[..., Any] = inspect.unwrap(host_class(block).forward)
    return {*forward.__code__.co_names} == PARTS


def _rows(shape: tuple[int, ...], patch: int | None) -> int:
    """Rows that an input makes: of patches ``(S, F)`` one each; of images ``(B, C, H, W)`` those of one."""
    return int(shape[0]) if patch is None else (int(shape[-2]) // patch) * (int(shape[-1]) // patch)
