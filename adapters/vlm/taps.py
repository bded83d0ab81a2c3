"""What is noted while a forward is in flight: records of features, and the taps on tower and projector."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.encoder.block import split_heads
from tokred.adapters.swap import Hook, host_class
from tokred.adapters.vlm.layout import Picture
from tokred.kernels.column_scores import column_scores

# What this thread knows of the forward in flight: ``call``, ``forward``, ``tap``, ``labels``, ``done``; and ``last``,
# the records of the features that it made last, by model.
local = threading.local()


class Fused(NamedTuple):
    """An attention with one projection for queries, keys and values: its output and the rotary tables."""

    attention: Any
    projected: Tensor | None
    tables: Any


@dataclass
class Tap:
    """What taps noted while one feature getter ran."""

    inputs: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fused: Fused | None = None


@dataclass
class Record:
    """What one call of a feature getter gave.

    Attributes:
        pictures: in the order of the placeholders.
        tower: ``(rows, N, Ct)`` input of the projector, with its gradient, or None.
        heads: queries and keys ``(rows, H, P + N, D)`` of tower layers, by layer and "q" or "k".
        layer: which layer's features are used, of ``depth``.
        prefix: class tokens in them.
        scale: of the tower's attention.
        received: gives what the tokens of a picture receive, ``(H, N)``, by its number; None: see ``heads``.
        marks: ``(T,)`` int64 one number for each feature, by which it is found again.
    """

    pictures: list[Picture]
    tower: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    layer: int = 0
    depth: int = 0
    prefix: int = 0
    scale: float | None = None
    received: Callable[[int], Tensor] | None = None
    marks: Tensor | None = None


class ProjectorTap(Hook):
    """Before the projector: note its input."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        if tap is not None and tap.inputs is None and args:
            tap.inputs = args[0]


class TowerTap(Hook):
    """After the vision tower: note that there are features."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        call = getattr(local, "call", None)
        if call is not None:
            call[1].towers = True


class HeadTap(Hook):
    """After a projection of the tower's attention: note queries or keys.

    Args:
        layer: of the tower.
        which: "q" or "k".
        heads: to split the output into.
    """

    def __init__(self, layer: int, which: str, heads: int) -> None:
        self.layer = layer
        self.which = which
        self.heads = heads

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        if tap is not None and output.ndim == 3:
            tap.heads[self.layer, self.which] = split_heads(output.detach(), self.heads)


class Modality(NamedTuple):
    """Placeholders of one modality and the features that fill them.

    Attributes:
        visual: ``(B, L)`` bool.
        counts: placeholders of each sample.
        record: of the features; None where they were not made by the patched model.
    """

    visual: Tensor
    counts: tuple[int, ...]
    record: Record | None


@dataclass
class Call:
    """What is known before the language model runs.

    Attributes:
        modalities: placeholders and their features; empty for text alone.
        mask: ``(B, all)`` the caller's padding mask, or None.
        end: tokens of the prompt where drafts follow, counted from the cache's begin; None: all.
        physical: that of the rows that layer 0 holds, where it was needed outside the language model.
        records: of the features that getters gave inside the forward, by modality.
        towers: whether the vision tower ran inside the forward, by a getter or without.
        entered: whether the hook before the language model has run.
    """

    modalities: list[Modality] = field(default_factory=list)
    mask: Tensor | None = None
    end: int | None = None
    physical: Tensor | None = None
    records: dict[str, Record | None] = field(default_factory=dict)
    towers: bool = False
    entered: bool = False

    def add(self, visual: Tensor, record: Record | None) -> None:
        """Note the placeholders ``(B, L)`` of one modality."""
        self.modalities.append(Modality(visual, tuple(visual.sum(1).tolist()), record))

    def move(self, device: torch.device) -> None:
        """Everything to where the tokens are."""
        self.modalities = [one._replace(visual=one.visual.to(device)) for one in self.modalities]
        self.mask = None if self.mask is None else self.mask.to(device)
        self.physical = None if self.physical is None else self.physical.to(device)


class TablesTap(Hook):
    """Before the attention: note its rotary tables."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        tables = kwargs.get("position_embeddings")
        if tap is not None and tables is not None:
            tap.fused = Fused(module, None, tables)


class FusedTap(Hook):
    """After its projection: note queries and keys."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        if tap is not None and tap.fused is not None:
            tap.fused = tap.fused._replace(projected=output.detach())


def last_attention(core: Any) -> Any:
    """The attention of the tower's last block, where it is of this kind and attends to whole frames; else None."""
    tower = getattr(core, "visual", None)
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    attention = getattr(blocks[-1], "attn", None)
    if attention is None or not hasattr(attention, "qkv") or _rotary(attention) is None:
        return None
    whole = getattr(tower, "fullatt_block_indexes", None)
    return attention if whole is None or len(blocks) - 1 in whole else None


def _rotary(attention: Any) -> Any:
    return getattr(sys.modules[host_class(attention).__module__], "apply_rotary_pos_emb_vision", None)


def received(fused: Fused, tower: Any, grids: Tensor, picture: int) -> Tensor:
    """``(H, N)`` float32: what each token's patches receive from all patches of their frame.

    Args:
        fused: what was noted.
        tower: the vision tower.
        grids: ``(pictures, 3)`` frames, rows and columns of patches.
        picture: which one.
    """
    attention, projected, tables = fused
    assert projected is not None  # the attention has run
    unit = int(tower.spatial_merge_size) ** 2
    sizes = grids.prod(1).tolist()
    start, count = sum(sizes[:picture]), sizes[picture]
    some = slice(start, start + count)
    frames = int(grids[picture, 0])
    q, k, _ = projected[some].reshape(count, 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = _rotary(attention)(q, k, tables[0][some], tables[1][some])
    q, k = (t.reshape(frames, count // frames, *t.shape[1:]).transpose(1, 2) for t in (q, k))
    scores = column_scores(q, k, scale=getattr(attention, "scaling", None))
    scores = scores.transpose(0, 1).reshape(scores.shape[1], count // unit, unit).sum(-1)
    if not hasattr(tower, "fullatt_block_indexes"):
        return scores
    from transformers.vision_utils import get_vision_window_index

    # Patches run in the order of their windows.
    order, _ = get_vision_window_index(
        grids,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    places = order[start // unit : (start + count) // unit].to(scores.device) - start // unit
    return torch.empty_like(scores).index_copy(1, places, scores)
