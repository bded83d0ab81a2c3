"""Denoisers: over the sample, the tokens that every sub-layer computed as one, or left out, at every step."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred import adapters, api
from tokred.analysis.viz import pages
from tokred.analysis.viz.drawing import Axis, Drawing, Page, table
from tokred.analysis.viz.recording import as_bytes
from tokred.analysis.viz.settings import Several, settings
from tokred.core.reduction import Reduction
from tokred.errors import MissingInputError, NothingRecordedError
from tokred.patch import parts_of

if TYPE_CHECKING:
    from tokred.adapters.diffusion.session import Session
    from tokred.adapters.diffusion.sublayers import Spot
    from tokred.diffusion.site import SublayerPlace

Run = Mapping[str, Any] | Callable[[Any], Any]
FIELDS = ("images", "frames", "sample", "prediction", "pred_original_sample")


class LatentSite(NamedTuple):
    """A sub-layer of a denoiser.

    Attributes:
        name: in the denoiser.
        block: number of its block, from 1.
        role: ``"self"``, ``"cross"``, ``"mlp"``, or in attentions that are reduced inside ``"queries"`` and ``"keys"``.
    """

    name: str
    block: int
    role: str


class LatentMap(NamedTuple):
    """The fate of the tokens of one sub-layer at one step.

    Attributes:
        grid: rows and columns; frames of a clip stand beside one another.
        groups: ``(rows * columns,)`` int64, the token in whose place each is computed, -1 where it is left out.
    """

    grid: tuple[int, int]
    groups: Tensor

    @property
    def left(self) -> int:
        """Tokens that the sub-layer ran on."""
        return len(torch.unique(self.groups[self.groups >= 0]))


@dataclass(frozen=True)
class LatentRun:
    """One method on a sample.

    Attributes:
        label: method and setting.
        maps: that differ from one another.
        at: ``[site][step]``, which of them; None where the sub-layer ran on all tokens.
        pixels: ``(1 or 3, H, W)`` uint8, what came out.
    """

    label: str
    maps: tuple[LatentMap, ...]
    at: tuple[tuple[int | None, ...], ...]
    pixels: Tensor


@dataclass(frozen=True)
class LatentDrawing(Drawing):
    """Methods on a sample: what each sub-layer that was reduced ran on, and the sample that came out.

    Attributes:
        family: of the denoiser.
        sites: sub-layers that were reduced at some step, in the order in which they ran.
        steps: numbers of the steps that are drawn, from 1, of ``count``.
        count: steps that ran.
        pixels: ``(1 or 3, H, W)`` uint8, the sample of the unpatched model.
        runs: one a method.
    """

    heading: ClassVar[str] = "What the denoiser computes as one"

    family: str
    sites: tuple[LatentSite, ...]
    steps: tuple[int, ...]
    count: int
    pixels: Tensor
    runs: tuple[LatentRun, ...]

    def page(self) -> Page:
        """The sample under each method's maps, with a slider over the sub-layers and one over the steps."""
        maps, panels, notes, figures = list[Any](), list[Any](), list[list[str]](), list[str]()
        for m, run in enumerate(self.runs):
            first = len(maps)
            maps += [{"grid": list(found.grid), "groups": found.groups.tolist()} for found in run.maps]
            at = [None if k is None else first + k for row in run.at for k in row]
            panels.append({"picture": m + 1, "shape": list(run.pixels.shape[1:]), "at": at})
            notes.append([self._note(run, s, k) for s, row in enumerate(run.at) for k in row])
            figures.append(_figure(run, m))
        pictures = [pages.picture(p) for p in (self.pixels, *(run.pixels for run in self.runs))]
        data = {"merges": True, "pictures": pictures, "maps": maps, "panels": panels, "notes": notes}
        places = tuple(f"block {site.block}, {site.role}" for site in self.sites)
        steps = tuple(f"step {step} of {self.count}" for step in self.steps)
        intro = (
            f"{self.family}: {len(self.sites)} sub-layers ran on fewer tokens; steps: {self.count}. Blocks and steps "
            "are numbered from 1.",
            "Tokens that a sub-layer computes as one share their colour and the colour of their outline; those that it "
            "leaves out are dark and struck through. Afterwards all tokens are there again. Point at a token to see "
            "its group. Arrow keys move the block, with Shift the step; on a picture they go token by token.",
        )
        controls = """<p class="controls">
<label>Show <select id="view">
<option value="mean">the mean colour of each group</option>
<option value="groups">a colour for each group</option>
<option value="image">the sample itself</option>
</select></label>
<label><input type="checkbox" id="outlines" checked> outlines</label>
</p>"""
        heads = ["sub-layer", *(run.label for run in self.runs)]
        rows = [
            [f"{place} ({site.name})", *(self._counts(run, s) for run in self.runs)]
            for s, (place, site) in enumerate(zip(places, self.sites, strict=True))
        ]
        body = f"""<section>
<div class="beside"><figure><img src="{pictures[0]}" alt="sample of the unpatched model"><figcaption>unpatched
</figcaption></figure>
{
            "".join(
                f'<figure><img src="{pictures[m + 1]}" alt="sample under {html.escape(run.label)}"><figcaption>'
                f"{html.escape(run.label)}</figcaption></figure>"
                for m, run in enumerate(self.runs)
            )
        }
</div>
<div class="methods">
{chr(10).join(figures)}
</div>
{table(heads, rows)}
</section>"""
        return Page(intro, (Axis("Block", places), Axis("Step", steps)), controls, body, data, "map")

    def figure(self, sites: Sequence[int] | None = None, step: int | None = None) -> Any:
        """One row a method: the unpatched sample, the method's, and the maps of some sub-layers.

        Args:
            sites: which of :attr:`sites`, from 0; None: up to four, evenly spaced.
            step: number of a step, one of :attr:`steps`; None: the one in the middle.

        Raises:
            ValueError: there is no such site or step.
            ImportError: matplotlib is not installed.
        """
        from tokred.analysis.viz.printed import draw_latent

        several = min(4, len(self.sites))
        shown = [len(self.sites) * i // several for i in range(several)] if sites is None else list(sites)
        if not shown or min(shown) < 0 or max(shown) >= len(self.sites):
            raise ValueError(f"sites must lie in 0..{len(self.sites) - 1}, got {shown}")
        chosen = self.steps[len(self.steps) // 2] if step is None else step
        if chosen not in self.steps:
            raise ValueError(f"step must be one of {', '.join(map(str, self.steps))}, got {step}")
        return draw_latent(self, shown, chosen)

    def _note(self, run: LatentRun, site: int, k: int | None) -> str:
        name = self.sites[site].name
        if k is None:
            return f"{name}: all tokens"
        found = run.maps[k]
        return f"{name}: {found.left} of {len(found.groups)} tokens"

    def _counts(self, run: LatentRun, site: int) -> str:
        found = list(dict.fromkeys("all" if k is None else str(run.maps[k].left) for k in run.at[site]))
        total = next((len(run.maps[k].groups) for k in run.at[site] if k is not None), None)
        return " or ".join(found) + ("" if total is None else f" of {total}")


def _figure(run: LatentRun, m: int) -> str:
    label = html.escape(run.label)
    return f"""<figure data-figure="{m}">
<figcaption id="caption-{m}"><strong>{label}</strong> <span class="count"></span></figcaption>
<div class="views one"><div><canvas data-panel="{m}" tabindex="0" role="application" aria-roledescription="tokens"
 aria-label="sample, {label}" aria-describedby="caption-{m} group-{m}"></canvas></div></div>
<p class="group" id="group-{m}" aria-live="polite"></p>
</figure>"""


def denoiser(
    model: Any,
    run: Run,
    methods: Several,
    *,
    sample: int = -1,
    steps: int = 6,
    seed: int = 0,
) -> LatentDrawing:
    """Let a denoiser or a pipeline run under each method, and note what every sub-layer computed as one.

    Args:
        model: a pipeline of diffusers, a denoiser, or a module that holds one, unpatched; it is so again afterwards.
        run: arguments of the model, by name; or a function of the model that runs it, and returns what is drawn: images
            or latents, as tensors ``(B, C, H, W)``, pictures of PIL's, or an output of diffusers.
        methods: settings such as ``"tomesd ratio=0.5"``, method objects, or several of them, side by side.
        sample: row of the denoiser's batch whose tokens are drawn; with guidance the last one is that of the prompt.
        steps: so many steps are drawn at most, evenly spaced, the first and the last among them.
        seed: of torch's random numbers before each run, so that all start from the same noise; pipelines that take a
            generator are given one of this seed, unless ``run`` has one.

    Raises:
        MissingInputError: a method is none of denoisers.
        NothingRecordedError: no sub-layer was reduced by any method.
        ValueError: ``steps`` is less than 1, there is no such sample, or the model is patched already.
        TypeError: what came out is no picture.
        UnknownMethodError, UnsupportedModelError: as :func:`tokred.apply`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    chosen = settings(methods)
    module = adapters.module_of(model)
    for label, several in chosen:
        if any(method.stage != "attention" for method in several):
            raise MissingInputError(
                f"viz.denoiser draws methods of denoisers (stage 'attention'), and {label!r} acts at stage "
                f"{next(m.stage for m in several if m.stage != 'attention')!r}"
            )
        adapters.find(module, "attention").check(several[0])
    before = _ran(model, run, seed)
    watched, after, family = list[_Watched](), list[Tensor](), ""
    for _, several in chosen:
        with api.applied(model, several):
            part = parts_of(module)[0]
            session: Session = part.state  # type: ignore[assignment]
            family = part.family
            session.watched = seen = _Watched()
            after.append(_ran(model, run, seed))
            session.watched = None
            watched.append(seen)
    sites = list(
        dict.fromkeys(site for seen in watched for step in seen.steps for site, fate in step.items() if fate[1])
    )
    if not sites:
        raise NothingRecordedError(
            f"{', '.join(label for label, _ in chosen)} reduced no sub-layer of {family} at this size: tokred.explain "
            "says what a method would do"
        )
    count = max(len(seen.steps) for seen in watched)
    some = sorted({round(i * (count - 1) / max(min(steps, count) - 1, 1)) for i in range(min(steps, count))})
    runs = [
        _run(label, seen, sites, some, sample, pixels)
        for (label, _), seen, pixels in zip(chosen, watched, after, strict=True)
    ]
    order = {site: i for seen in watched for step in seen.steps for i, site in enumerate(step)}
    ranked = sorted(range(len(sites)), key=lambda i: order[sites[i]])
    runs = [LatentRun(one.label, one.maps, tuple(one.at[i] for i in ranked), one.pixels) for one in runs]
    return LatentDrawing(
        family, tuple(sites[i] for i in ranked), tuple(i + 1 for i in some), count, before, tuple(runs)
    )


class _Watched:
    """Sub-layers while they run: for each step, the place and the reduction of each."""

    def __init__(self) -> None:
        self.steps: list[dict[LatentSite, tuple[SublayerPlace, Reduction | None]]] = []

    def begin(self) -> None:
        """A step begins."""
        self.steps.append({})

    def saw(self, spot: Spot, role: str, place: SublayerPlace, reduction: Reduction | None) -> None:
        """A sub-layer runs. Reductions are made anew or held by the plans: nothing is copied."""
        self.steps[-1][LatentSite(spot.name, spot.block + 1, role)] = (place, reduction)


def _run(
    label: str, seen: _Watched, sites: Sequence[LatentSite], steps: Sequence[int], sample: int, pixels: Tensor
) -> LatentRun:
    maps: list[LatentMap] = []
    known: dict[int, int] = {}  # plans are shared by sub-layers and steps
    at: list[tuple[int | None, ...]] = []
    for site in sites:
        row: list[int | None] = []
        for step in steps:
            place, reduction = seen.steps[step].get(site, (None, None)) if step < len(seen.steps) else (None, None)
            if place is None or reduction is None:
                row.append(None)
                continue
            if id(reduction) not in known:
                known[id(reduction)] = len(maps)
                maps.append(_map(place, reduction, sample))
            row.append(known[id(reduction)])
        at.append(tuple(row))
    return LatentRun(label, tuple(maps), tuple(at), pixels)


def _map(place: SublayerPlace, reduction: Reduction, sample: int) -> LatentMap:
    """The map of one sample; of reductions by head, that of the first head.

    Raises:
        ValueError: there is no such sample.
    """
    batch = reduction.batch[0]
    if not -batch <= sample < batch:
        raise ValueError(f"sample must lie in {-batch}..{batch - 1}, the denoiser's batch, got {sample}")
    index, stands = reduction.index[sample], reduction.representative[sample]
    if index.ndim == 2:
        index, stands = index[0], stands[0]
    index, stands = index.cpu(), stands.cpu()
    groups = torch.where(index < 0, -1, stands[index.clamp(min=0)])
    (rows, columns), frames = place.grid, place.frames
    if frames > 1:
        # Frames stand beside one another: token t, y, x comes to y, t, x.
        moved = torch.arange(len(groups)).view(frames, rows, columns).transpose(0, 1).reshape(-1)
        back = torch.empty_like(moved)
        back[moved] = torch.arange(len(moved))
        groups = groups[moved]
        groups = torch.where(groups < 0, -1, back[groups.clamp(min=0)])
    return LatentMap((rows, columns * frames), groups)


@torch.inference_mode()
def _ran(model: Any, run: Run, seed: int) -> Tensor:
    """Run the model, and give what came out as one picture; random numbers of the caller go on as they were."""
    from inspect import signature

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if callable(run):
            return picture_of(run(model))
        given = dict(run)
        takes = signature(model.forward if isinstance(model, torch.nn.Module) else model.__call__).parameters
        if "generator" in takes:
            given.setdefault("generator", torch.Generator().manual_seed(seed))
        if "output_type" in takes:
            given.setdefault("output_type", "pt")
        return picture_of(model(**given))


def picture_of(output: Any) -> Tensor:
    """``(1 or 3, H, W)`` uint8: the first picture in an output; latents by their first channels, stretched; frames of a
    clip beside one another.

    Raises:
        TypeError: there is none.
    """
    for name in FIELDS:
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
            break
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        import numpy as np

        array = np.asarray(output)
        if array.ndim < 3 or array.shape[-1] not in (1, 3, 4):
            raise TypeError(f"what came out is no picture, but a {type(output).__name__}: let run return images")
        output = torch.from_numpy(array.copy()).movedim(-1, -3)
    x: Tensor = output.detach().cpu()
    while x.ndim > 4:
        x = x[0]
    if x.ndim == 4:
        x = x[0] if not _clip(output) else torch.cat(list(x if x.shape[1] in (1, 3) else x.transpose(0, 1)), -1)
    if x.ndim != 3:
        raise TypeError(
            f"what came out has the shape {tuple(output.shape)}, which is no picture: let run return images"
        )
    x = x[:1] if x.shape[0] < 3 else x[:3]
    if x.dtype == torch.uint8:
        return x
    x = x.float()
    low, high = x.aminmax()
    inside = bool(low >= 0) and bool(high <= 1) and output.shape[-3] in (1, 3)
    return as_bytes(x if inside else (x - low) / (high - low).clamp_min(1e-12))


def _clip(output: Tensor) -> bool:
    """True if what is left after the batch is a clip ``(frames, C, H, W)`` or ``(C, frames, H, W)``."""
    return output.ndim == 5
