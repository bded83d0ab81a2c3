"""The host record of towers that hold all images in one sequence: what they cost, and the hook at their entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import words
from tokred.adapters.encoder.host import EncoderHost
from tokred.adapters.encoder.origin import Origin
from tokred.adapters.encoder.packed.layout import Folding, Layout, PackedState
from tokred.adapters.encoder.packed.run import PackedRecipe
from tokred.adapters.encoder.running import LayerRecord
from tokred.adapters.encoder.state import Shared
from tokred.encoder.method import BlockMethod
from tokred.errors import UnsupportedModelError


class PackedOrigin(Origin):
    """Hook before the tower: how the rows of its images stand.

    Args:
        host: of the tower.
        shared: of its blocks; gets the notes.
    """

    def __init__(self, host: PackedHost, shared: Shared) -> None:
        super().__init__(host, shared)
        self.folding, self.names, self.patch = host.folding, host.entry, host.patch_side
        # A decision before the first block may be about a whole clip: no attention has to be kept apart yet.
        self.clips = shared.method.where == "before"

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Note the layout of this forward."""
        self.check()
        given = {**dict(zip(self.names, args, strict=False)), **(kwargs or {})}
        rows = given[self.names[0]]
        if self.patch is None:
            grids = words.TOWER_GRIDS.at(given)
            if grids is None:
                raise UnsupportedModelError(f"{self.family} was called without the grids of its images")
            sides = [(int(t), int(high), int(wide)) for t, high, wide in grids.tolist()]
            pixels = rows if self.seen else None
        else:
            sides, pixels = _of_images(rows, words.SIZES.of(given), self.patch), None
        layout: Any = Layout.of(sides, self.folding, rows.device, clips=self.clips, pixels=pixels)
        self.note.leave(layout)


def _of_images(images: Tensor, sizes: Any, patch: int) -> list[tuple[int, int, int]]:
    """Grids of padded images ``(B, C, H, W)``, by their sizes before padding."""
    known = [tuple(images.shape[-2:])] * len(images) if sizes is None else [tuple(map(int, one)) for one in sizes]
    return [(1, high // patch, wide // patch) for high, wide in known]


@dataclass(kw_only=True)
class PackedHost(EncoderHost):
    """A tower over one sequence of rows. Tokens are counted over all images of a forward.

    Attributes:
        folding: the order in which it takes the patches of a frame.
        entry: names of what its forward takes.
        patch_side: pixels of a side of a patch, where it is given images; None where it is given patches.
    """

    folding: Folding
    entry: tuple[str, ...]
    patch_side: int | None = None

    @property
    def offered(self) -> frozenset[str]:
        found = super().offered
        return found | {"pixels"} if self.patch_side is None and not self.folding.joint else found

    def begin(self, shared: Shared, changes: Changes) -> None:
        changes.before(self.model, PackedOrigin(self, shared), with_kwargs=True)

    def spent(self, layer: int, before: int, after: int, method: BlockMethod | None) -> int:
        """Multiply-adds in a block; all rows are counted as one image."""
        return self._macs(self.blocks[layer][1], before, after, before * self._seen(layer, before), method)

    def counted(self, layer: int, record: LayerRecord, method: BlockMethod) -> tuple[int, int]:
        """Multiply-adds of all images in a block of the last forward: as it ran, and unpatched."""
        state, block = record.state, self.blocks[layer][1]
        assert isinstance(state, PackedState)
        assert state.pairs is not None  # of every block that ran
        before = min(record.tokens_in, record.tokens_out) if method.where == "before" else record.tokens_in
        ran, full = (int(p) for p in state.pairs)
        n = state.length
        return self._macs(block, before, record.tokens_out, ran, method), self._macs(block, n, n, full, method)

    def _seen(self, layer: int, n: int) -> int:
        """How many keys a query sees at most."""
        recipe = self.recipe
        assert isinstance(recipe, PackedRecipe)
        windowed = recipe.whole is not None and layer not in recipe.whole
        return min(n, (self.folding.window * self.folding.cell) ** 2) if windowed else n

    def _macs(self, block: nn.Module, before: int, after: int, pairs: int, method: BlockMethod | None) -> int:
        cost = self.cost(block)
        rows = after if self.middle(method) else before
        return before * cost.attention + pairs * cost.pair + rows * cost.mlp
