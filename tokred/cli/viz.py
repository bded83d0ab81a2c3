"""``tokred viz``: pictures of what became of tokens, and a page with a slider over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokred.cli.options import Methods, Model, OldModel, Threads, one_model, settings, single
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    from torch import Tensor

    from tokred.adapters.encoder.host import EncoderHost
    from tokred.analysis.viz.drawing import Drawing
    from tokred.bench.arms import Arm
    from tokred.bench.models import Subject

FILES = ("viz.html", "viz.png")
DEFAULT = ("tome",)
SHARE = 0.6  # of the multiply-adds: what a method that is named alone, and would remove nothing, is set to


def viz_command(
    model: Model = None,
    methods: Methods = None,
    old: OldModel = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="An image or a folder of images, as often as needed. [default: some that the model brings along]",
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            "--clip",
            help="A clip for a model of images and text: a folder of frames, in the order of their names, or an "
            "animated GIF or WebP.",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Frames of the clip come one by one, and are remembered (tokred.stream).")
    ] = False,
    count: Annotated[
        int | None, typer.Option(min=1, help="Images of a folder, or frames of a clip, at most. [default: 4; 8]")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Of a language model, a model of images and text, or a pipeline."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A text for a language model; --prompt follows it.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of that text, at most.")] = 600,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 32,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a pipeline. [default: the pipeline's]")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks in an encoder's PNG: 1,6,12 or all; the page has all. [default: four]")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images. [default: the model's]")
    ] = None,
    threads: Threads = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="No trained weights: what merges then has little meaning.")
    ] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("tokred-viz"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of an earlier run.")] = False,
) -> None:
    """Draw what became of tokens, layer by layer: as a page with a slider, and as a PNG.

    Over images, what was merged into what, and what was pruned; over the pictures of a question, what a model of
    images and text still sees, and over the frames of a clip the same as a contact sheet; over a text, what a language
    model's cache still holds; over a sample, what a denoiser computes as one. Several methods stand side by side. A
    method that is named without a setting and would remove nothing is set to about 60 % of the model's multiply-adds,
    or a quarter of the cache. Blocks and layers are numbered from 1.

    \b
    Examples:
      tokred viz                                             the embedded model and its images, offline
      tokred viz -m "tome r=13" -m "evit kappa=0.7"          side by side
      tokred viz -m "random_prune r=8" --layers 1,4,8        chosen blocks in the PNG
      tokred viz vit_base_patch16_224 --image cat.jpg --image my_photos --count 8
      tokred viz hf:facebook/dinov2-small --image cat.jpg -m "pitome ratio=0.9" --out cat
      tokred viz dinov2 -m tome --layers all                 photos of the zoo, in a checkout
      tokred viz hf:FOLDER -m "divprune budget=64" --image cat.jpg --prompt "What is on the sofa?"
      tokred viz hf:FOLDER -m "evs ratio=0.75" -m "vidcom2 ratio=0.75" --clip frames --prompt "What moves?"
      tokred viz hf:FOLDER -m "stc budget=60 + streaming_llm budget=1024" --clip a.gif --stream --prompt "What now?"
      tokred viz diffusers:FOLDER -m "tomesd ratio=0.5" --prompt "a lake at sunrise" --steps 20
      tokred viz hf:FOLDER -m "snapkv budget=0.25" --text book.txt --prompt "Who is the murderer?"

    \b
    Leaves in the folder, without overwriting an earlier run's:
      viz.html   one file that needs nothing else: sliders, the token under the pointer, what is left, answers
      viz.png    the same for print, at some of the layers; of a clip the frames side by side, as the last layer sees
                 them, or as a stream remembers them
    """
    from tokred.bench import models as subjects
    from tokred.bench import sources
    from tokred.cli import viz_kinds
    from tokred.cli.console import refusing, set_threads

    set_threads(threads)
    with refusing():
        check_folder(folder)
        name = one_model(model, old, "embedded")
        assert name is not None  # there is a default
        typed = settings(methods)
        source = sources.model(name, sources.Options(size=size, random_weights=random_weights))
        if source.kind not in ("encoder", "dual encoder"):
            given = viz_kinds.Given(images or [], prompt, text, length, tokens, steps, size, count, clip, stream)
            drawing = viz_kinds.draw(source, typed, given)
            write(drawing, folder, f"{name}: {drawing.heading[0].lower()}{drawing.heading[1:]}", force)
            return
        viz_kinds.check_clip(source.kind, clip, stream)
        subject = subjects.of(source)
    few = count or viz_kinds.IMAGES
    draw_encoder(subject, [single(parts, "viz") for parts in typed], images or [], few, layers, folder, force)


def write(drawing: Drawing, folder: Path, title: str, force: bool) -> None:
    """The page and the figure of a drawing."""
    from tokred.bench import results as outputs
    from tokred.cli.console import written

    paths = outputs.free(folder, FILES, force=force)
    drawing.save(paths["viz.html"], title=title)
    drawing.save(paths["viz.png"])
    written(list(paths.values()))


def draw_encoder(
    subject: Subject,
    typed: Sequence[str],
    images: Sequence[Path],
    count: int,
    layers: str | None,
    folder: Path,
    force: bool,
) -> None:
    """The page and the figure of an encoder of images; arguments are options of the command."""
    from tokred.analysis.viz import draw as viz
    from tokred.analysis.viz import pages
    from tokred.analysis.viz import recording as stages
    from tokred.bench import images as photos
    from tokred.bench import plots
    from tokred.bench import results as outputs
    from tokred.cli.console import progress, refusing, written

    with refusing():
        chosen = choose(subject, typed or DEFAULT)
        blocks = choose_blocks(layers, stages.check(subject.model, stages.choose(chosen)).depth)
        inputs, pixels, names = pictures(subject, images, count)
    with progress(stages.ticks(len(chosen), len(names)), "running") as tick:
        recording = stages.record(
            subject.model,
            photos.normalise(inputs, subject.mean, subject.std, next(subject.model.parameters()).dtype),
            chosen,
            pixels=pixels,
            names=names,
            forward=subject.read,
            tick=tick,
            classes=class_names(subject),
        )
    drawn = viz.figure(recording, blocks)
    with refusing():
        paths = outputs.free(folder, FILES, force=force)
        pages.write(recording, paths["viz.html"], title=f"{subject.name}: what became of every patch")
        plots.save(drawn, paths["viz.png"])
    written(list(paths.values()))


def class_names(subject: Subject) -> Sequence[str] | None:
    """Names of a model's classes, where they are known."""
    from tokred.bench import embedded

    if subject.name == "embedded":
        return embedded.CLASSES
    known = getattr(getattr(subject.model, "config", None), "id2label", None)
    return None if not known else [str(known[i]) for i in range(len(known))]


def choose(subject: Subject, texts: Sequence[str]) -> list[str]:
    """Settings that fit the model; a bare name that would remove nothing gets one.

    Raises:
        UnknownMethodError, TypeError, ValueError, MissingInputError, UnsupportedModelError: a setting does not fit.
    """
    from tokred.analysis.viz import recording as stages
    from tokred.bench import arms
    from tokred.core.settings import parse_setting

    host = stages.check(subject.model, ())
    base = arms.unpatched(subject.model, subject.shape)
    found = []
    for text in texts:
        name, parameters = parse_setting(text)
        arm = arms.arm(subject.model, subject.shape, name, **parameters)
        if not parameters and not _acts(arm, host):
            arm = arms.at_cost(subject.model, subject.shape, name, int(SHARE * base.macs))
        found.append(arm.label)
    return list(dict.fromkeys(found))


def _acts(arm: Arm, host: EncoderHost) -> bool:
    """True if the method is called in any block."""
    from tokred.core.place import Place
    from tokred.encoder.method import BlockMethod

    places = (Place(i, host.depth, host.prefix, host.suffix) for i in range(host.depth))
    method = arm.method
    return isinstance(method, BlockMethod) and any(method.acts(arm.tokens_in, place) for place in places)


def choose_blocks(text: str | None, depth: int) -> list[int] | None:
    """``"1,6,12"`` or ``"all"`` as numbers of blocks, from 1; None stays None.

    Raises:
        ValueError: a block is no number, or not there.
    """
    if text is None:
        return None
    if text.strip() == "all":
        return list(range(1, depth + 1))
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--layers is a list of blocks such as 1,6,12, or all, got {text!r}") from error
    if not found or min(found) < 1 or max(found) > depth:
        raise ValueError(f"--layers must name blocks in 1..{depth} (the model has {depth}), got {text!r}")
    return list(dict.fromkeys(found))


def pictures(subject: Subject, paths: Sequence[Path], count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images for the model (uint8, or normalised already), what to draw, and names.

    Raises:
        FileNotFoundError, ValueError: a path is no image and no folder of images.
        NoModelError: no path is given, and there are no images for this model.
    """
    import torch

    from tokred.bench import images as photos

    if paths:
        files = photos.gather(paths, count)
        found = torch.stack([photos.read(f, subject.size, subject.channels, subject.crop) for f, _ in files])
        return found, found, [name for _, name in files]
    if subject.name == "embedded":
        return _packaged(count)
    return _zoo(subject, count)


def _packaged(count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first image each of some classes, then the rest."""
    from tokred.bench import demo, embedded
    from tokred.bench.models import NoModelError

    try:
        images, labels = embedded.sample(max(200, min(count, 2000)))
    except (FileNotFoundError, ImportError) as error:
        raise NoModelError(f"{error}; or give --image FILE_OR_FOLDER") from error
    kinds = labels.tolist()
    first = [kinds.index(kind) for kind in demo.PICTURE_CLASSES if kind in kinds]
    order = list(dict.fromkeys([*first, *range(len(kinds))]))[:count]
    images = images[order]
    return images, embedded.pixels(images), [embedded.CLASSES[kinds[i]] for i in order]


def _zoo(subject: Subject, count: int) -> tuple[Tensor, Tensor, list[str]]:
    from tokred.bench.models import NoModelError, zoo

    high, wide = subject.size
    if subject.channels != 3 or high != wide:
        raise NoModelError(f"{subject.name} brings no images along: give --image FILE_OR_FOLDER")
    try:
        carriers, source = zoo("carriers"), zoo("data")
    except (NoModelError, ImportError) as error:
        raise NoModelError(f"{subject.name} brings no images along: give --image FILE_OR_FOLDER ({error})") from error
    try:
        found = source.photos(high, ("sklearn", "skimage"))
    except (carriers.MissingWeights, ImportError) as error:
        raise NoModelError(f"{error}; or give --image FILE_OR_FOLDER") from error
    return found.images[:count], found.images[:count], list(found.names[:count])
