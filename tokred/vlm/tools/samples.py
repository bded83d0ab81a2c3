"""Samples of a site that are decided apart, and their reductions put together as a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.overlap import OverlapReduction
from tokred.core.reduction import Reduction
from tokred.vlm.before_llm import VisualSite


def part_of(site: VisualSite, rows: Sequence[int]) -> VisualSite:
    """Some of a site's batch as a site of its own; everything is still read lazily.

    Args:
        site: of several images.
        rows: which of them.
    """
    index = torch.tensor(rows, device=site.device)

    def of(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: read()[index]

    def layer_heads(layer: int) -> tuple[Tensor, Tensor]:
        q, k = site.tower_heads(layer)
        return q[index], k[index]

    def whole(layer: int) -> Tensor:
        return site.whole_attention(layer)[index]

    read = {
        "x": lambda: site.x, "tower": lambda: site.tower, "q": lambda: site._get("q"), "k": lambda: site._get("k"),
        "text": lambda: site.text, "class_attention": lambda: site.class_attention_heads,
        "received": lambda: site._get("received"), "motion": lambda: site.motion,
    }  # fmt: skip
    known = {name for name, value in site._values.items() if value is not None}
    values: dict[str, Any] = {name: of(how) for name, how in read.items() if name in known}
    return VisualSite(
        **values,
        layer_heads=None if site._layer_heads is None else layer_heads,
        text_mask=None if site.text_mask is None else site.text_mask[index],
        patches=site.patches,
        tiles=site.tiles,
        whole=None if site._whole is None else whole,
        prefix=site.prefix,
        scale=site.scale,
        grid=site.known_grid,
        frames=site.frames,
        tile=site.tile,
        sample=tuple(site.samples[i] for i in rows),
        image=tuple(site.image[i] for i in rows),
        project=site.project,
        shots=None if site._shots is None else lambda: tuple(site.shots[i] for i in rows),
        class_token=site.class_rows,
        layer=site.layer,
        depth=site.depth,
    )


def stacked(parts: Sequence[Reduction], order: Sequence[int] | None = None) -> Reduction:
    """Samples that were decided apart as one batch: shorter ones are padded behind and masked.

    Args:
        parts: of batch 1 or more, all of the same length; those that merge do so in the same mode.
        order: where in the batch the samples of the parts, one after the other, belong; None: as they come.

    Raises:
        ValueError: lengths or modes differ.
    """
    modes = {(p.mode, p.by_size, p.inherit) for p in parts if p.source.shape[1]} or {("keep", True, True)}
    lengths = {p.length for p in parts}
    if len(modes) > 1 or len(lengths) > 1:
        raise ValueError(f"only reductions of one length and mode can be stacked, got {lengths} and {modes}")
    slots, sources = (max(sizes) for sizes in zip(*((p.slots, p.source.shape[1]) for p in parts), strict=True))
    uneven = any(p.slots < slots or p.mask is not None for p in parts)
    weighted = any(p.weight is not None for p in parts)
    (mode, by_size, inherit), (length,) = modes.pop(), lengths
    whole = Reduction(
        torch.cat([F.pad(p.representative, (0, slots - p.slots)) for p in parts]),
        torch.cat([F.pad(p.source, (0, sources - p.source.shape[1])) for p in parts]),
        torch.cat([F.pad(p.target, (0, sources - p.target.shape[1]), value=-1) for p in parts]),
        length,
        weight=torch.cat([_weight(p) for p in parts]) if weighted else None,
        mask=torch.cat([F.pad(_real(p), (0, slots - p.slots)) for p in parts]) if uneven else None,
        mode=mode,
        by_size=by_size,
        inherit=inherit,
        trivial=all(p.trivial for p in parts),
    )
    if any(isinstance(p, OverlapReduction) for p in parts):
        whole = OverlapReduction.stack(whole, parts)
    if order is None:
        return whole
    back = torch.tensor(order, device=whole.representative.device).argsort()
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    moved: dict[str, Any] = {name: value[back] for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(whole, **moved)


def _weight(part: Reduction) -> Tensor:
    if part.weight is not None:
        return part.weight
    return torch.ones(part.representative.shape[0], part.length, device=part.representative.device)


def _real(part: Reduction) -> Tensor:
    return torch.ones_like(part.representative, dtype=torch.bool) if part.mask is None else part.mask
