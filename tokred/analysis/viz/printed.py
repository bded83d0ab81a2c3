"""Figures of grids of tokens over pictures, for print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.analysis.viz import canvas
from tokred.analysis.viz.draw import enlarge, paint_groups

if TYPE_CHECKING:
    from tokred.analysis.viz.latent import LatentDrawing
    from tokred.analysis.viz.visual import VisualDrawing


def plain(text: str) -> str:
    """Text that is no formula."""
    return text.replace("$", r"\$")


def kept(pixels: Tensor, mask: Tensor, grid: tuple[int, int]) -> Any:
    """A picture with the tokens that are gone darkened and struck through, ``(H', W', 3)`` uint8."""
    own = torch.arange(mask.numel())
    return paint_groups(fine(pixels, grid), torch.where(mask, own, -1), grid, mean=False)


def fine(pixels: Tensor, grid: tuple[int, int], least: int = 320) -> Tensor:
    """The picture, enlarged smoothly where it is small, so that print shows no squares of its own."""
    high, wide = pixels.shape[-2:]
    times = -(-least // max(high, wide))
    if times <= 1:
        return pixels
    found = torch.nn.functional.interpolate(pixels[None].float(), scale_factor=times, mode="bilinear")[0]
    return found.round().clamp(0, 255).to(torch.uint8)


def draw_visual(drawing: VisualDrawing, stages: Sequence[int]) -> Any:
    """The figure of :meth:`tokred.analysis.viz.visual.VisualDrawing.figure`."""
    rows = [(run, view) for view in drawing.views for run in drawing.runs]
    shape = max(view.grid[0] / view.grid[1] for view in drawing.views)
    size = (2.1 * len(stages) + 0.3, (2.1 * shape + 0.55) * len(rows) + 0.5)
    figure, axes = canvas.subplots(len(rows), len(stages), figsize=size, squeeze=False, layout="constrained")
    several = len(drawing.views) > 1
    for (run, view), line in zip(rows, axes, strict=True):
        mask = run.mask(view)
        for stage, axis in zip(stages, line, strict=True):
            alone = stage == 0
            picture = (
                enlarge(fine(view.pixels, view.grid), view.grid) if alone else kept(view.pixels, mask[stage], view.grid)
            )
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            where = "picture" if stage == 0 else f"layer {stage}"
            axis.set_title(f"{where}: {int(mask[stage].sum())} tokens", fontsize=8)
        name = f"{run.label}\n{view.name}" if several else run.label
        line[0].set_ylabel(plain(textwrap.fill(name, 24)), fontsize=8)
        answer = textwrap.shorten(run.answers[view.sample] or "(nothing)", 34 * len(stages), placeholder=" …")
        line[0].set_xlabel(plain(f"answer: {answer}"), fontsize=8, loc="left")
    asked = textwrap.shorten(drawing.questions[0], 30 * len(stages), placeholder=" …")
    answer = textwrap.shorten(drawing.answers[0] or "(nothing)", 30 * len(stages), placeholder=" …")
    head = f"{asked} — unpatched: {answer}" if len(drawing.questions) == 1 else drawing.family
    figure.suptitle(plain(textwrap.fill(head, 24 * len(stages))), fontsize=9, x=0.01, ha="left")
    return figure


def draw_latent(drawing: LatentDrawing, sites: Sequence[int], step: int) -> Any:
    """The figure of :meth:`tokred.analysis.viz.latent.LatentDrawing.figure`."""
    column = drawing.steps.index(step)
    high, wide = drawing.pixels.shape[-2:]
    size = (2.1 * (2 + len(sites)) + 0.2, (2.1 * high / wide + 0.35) * len(drawing.runs) + 0.35)
    figure, axes = canvas.subplots(len(drawing.runs), 2 + len(sites), figsize=size, squeeze=False, layout="constrained")
    for run, line in zip(drawing.runs, axes, strict=True):
        pictures = [enlarge(fine(p, (1, 1)), (1, 1)) for p in (drawing.pixels, run.pixels)]
        titles = ["unpatched", run.label]
        for site in sites:
            k, where = run.at[site][column], drawing.sites[site]
            if k is None:
                pictures.append(pictures[1])
                titles.append(f"block {where.block}, {where.role}: all tokens")
                continue
            found = run.maps[k]
            pictures.append(paint_groups(fine(run.pixels, found.grid, 512), found.groups, found.grid))
            titles.append(f"block {where.block}, {where.role}: {found.left} of {len(found.groups)}")
        for axis, picture, title in zip(line, pictures, titles, strict=True):
            axis.imshow(picture, aspect="auto")
            axis.set_box_aspect(high / wide)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(plain(textwrap.fill(title, 30)), fontsize=8)
    figure.suptitle(f"{drawing.family}, step {step} of {drawing.count}", fontsize=9, x=0.01, ha="left")
    return figure
