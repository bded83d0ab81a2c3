"""Figures of grids of tokens over pictures, for print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.analysis.viz import canvas
from tokred.analysis.viz.draw import enlarge, paint_groups
from tokred.analysis.viz.drawing import evenly

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
            where = drawing.stage(stage).removeprefix("the ")
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


TINT = (235, 150, 60)  # of tokens that were there at first


def left_later(picture: Any, later: Tensor, grid: tuple[int, int]) -> Any:
    """A picture of :func:`kept` with the tokens that left later tinted, ``(H', W', 3)`` uint8."""
    x = torch.as_tensor(picture).float()
    high, wide = x.shape[0] // grid[0], x.shape[1] // grid[1]
    where = later.view(grid).repeat_interleave(high, 0).repeat_interleave(wide, 1)[..., None]
    grey = x.mean(2, keepdim=True)
    tinted = 0.35 * grey + 0.65 * torch.tensor(TINT).float()
    return torch.where(where, tinted, x).round().to(torch.uint8).numpy()


def draw_sheet(drawing: VisualDrawing, stage: int, columns: int) -> Any:
    """The figure of :meth:`tokred.analysis.viz.visual.VisualDrawing.sheet`."""
    samples = [[v for v in drawing.views if v.sample == i] for i in range(len(drawing.questions))]
    samples = [evenly(views, columns) for views in samples if views]
    count, runs = max(map(len, samples)), drawing.runs
    shape = max(view.grid[0] / view.grid[1] for views in samples for view in views)
    rows = len(samples) * (1 + len(runs))
    size = (1.35 * count + 1.5, (1.35 * shape + 0.3) * rows + 0.6)
    figure, axes = canvas.subplots(rows, count, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    early = late = False
    for i, views in enumerate(samples):
        top = axes[i * (1 + len(runs))]
        for axis, view in zip(top, views, strict=False):
            name = f"frame {view.frame}" if view.frame else view.name
            _put(axis, enlarge(fine(view.pixels, view.grid), view.grid), name)
        _named(top[0], "the frames" if drawing.frames else "the pictures", drawing.answers[views[0].sample])
        for run, line in zip(runs, axes[i * (1 + len(runs)) + 1 :], strict=False):
            for axis, view in zip(line, views, strict=False):
                there, first, now = (run.mask(view)[s] for s in (0, 1, stage))
                picture = kept(view.pixels, now | (first & ~now), view.grid)
                _put(axis, left_later(picture, first & ~now, view.grid), f"{int(now.sum())} of {int(there.sum())}")
                early, late = early or bool((there & ~first).any()), late or bool((first & ~now).any())
            _named(line[0], run.label, run.answers[views[0].sample])
    marks = zip(("dark", "orange"), drawing.gone(stage), (early, late), strict=True)
    told = [f"{look}: {what}" for look, what, shown in marks if shown]
    head = " - ".join([drawing.family, *told])
    figure.suptitle(plain(textwrap.fill(head, 18 * count)), fontsize=8, x=0.01, ha="left")
    return figure


def _put(axis: Any, picture: Any, title: str) -> None:
    axis.set_axis_on()
    axis.imshow(picture)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=7, pad=2)


def _named(axis: Any, name: str, answer: str | None) -> None:
    """Name a row, with what the model says of it, left of its first picture."""
    said = [] if answer is None else [f"“{textwrap.shorten(answer or '(nothing)', 40, placeholder=' …')}”"]
    lines = [*textwrap.wrap(name, 22), *(line for text in said for line in textwrap.wrap(text, 22))]
    axis.set_ylabel(plain("\n".join(lines)), fontsize=7, rotation=0, ha="right", va="center")


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
