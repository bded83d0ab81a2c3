"""Attention columns of towers that project queries, keys and values at once and make one token of several patches
(Qwen's): noted while the tower runs, for the last layer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.swap import Hook, host_class
from tokred.adapters.vlm.features import Fused, Tap, local
from tokred.kernels.column_scores import column_scores


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
