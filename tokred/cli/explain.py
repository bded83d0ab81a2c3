"""``tokred explain``: what a method could gain on a denoiser at some size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from tokred.cli.options import Methods, Model, OldModel, one_model, settings, single


def explain_command(
    model: Model = None,
    methods: Methods = None,
    old: OldModel = None,
    size: Annotated[
        str, typer.Option(help="Pixels: 1024, or 1024x768 (height x width); of a clip: 49x480x720, frames first.")
    ] = "1024",
) -> None:
    """Say what a method could gain on a denoiser: tokens by resolution, attention's share, the ceiling of the speed-up.

    MODEL is sd15, sd21, sdxl, dit-xl-2, pixart, sd3, sd35-medium, flux, cogvideox-2b, cogvideox-5b, wan-1.3b, wan-14b,
    hunyuan-video, or the folder of a pipeline or a denoiser. Nothing is computed but shapes, and no weights are read.
    Needs diffusers.

    \b
    Examples:
      tokred explain sd15 --size 512
      tokred explain sdxl -m "tomesd max_downsample=2"
      tokred explain sd15 -m "todo factors=4" -m tomesd --size 2048
      tokred explain path/to/a/pipeline --size 1024x768
      tokred explain cogvideox-5b -m "todo factors=(1,2)" --size 49x480x720
    """
    from tokred.cli.console import refusing

    with refusing():
        name = one_model(model, old, "sd15")
        assert name is not None  # there is a default
        texts = [explained(name, single(parts, "explain"), size) for parts in settings(methods) or [["tomesd"]]]
    print("\n\n".join(texts))


def explained(model: str, setting: str, size: str) -> str:
    """The explanation as text.

    Raises:
        ValueError: model, size or the setting is wrong.
        UnknownMethodError, TypeError, MissingInputError, UnsupportedModelError: as :func:`tokred.explain`.
    """
    from tokred import api
    from tokred.adapters.diffusion.geometry import GEOMETRIES, read, sample_size
    from tokred.analysis.explain import explain
    from tokred.core.settings import parse_setting

    name, parameters = parse_setting(setting)
    chosen = api.make(name, **parameters)
    where = model.removeprefix("diffusers:")
    if where not in GEOMETRIES:
        check_denoiser(model, where)
    denoiser, pixels, frames = read(where)
    try:
        sample = sample_size(parse_size(size), pixels, frames)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it stands in the text
        found = explain(denoiser, chosen, sample)
    return str(found)


def check_denoiser(model: str, where: str) -> None:
    """Refuse a model that is there, but is no denoiser.

    Raises:
        ValueError: it is of another kind; the message names the command for it.
    """
    from tokred.bench import sources
    from tokred.bench.sources import named

    try:
        if Path(where).is_dir() and not model.startswith("hf:") and named.split(where)[0] == "diffusers":
            return
        kind = sources.skeleton(model).kind
    except sources.NoModelError:
        return  # the reader of denoisers says what there is
    if kind not in ("denoiser", "pipeline"):
        raise ValueError(
            f"{model} is of kind {kind}, and explain is for denoisers: `tokred list {model}` says which methods run"
            + (f", `tokred flops {model}` counts" if "encoder" in kind else f", `tokred bench {model}` measures")
        )


def parse_size(text: str) -> tuple[int, ...]:
    """``1024``, ``1024x768``, or ``49x480x720``.

    Raises:
        ValueError: it is none of these.
    """
    parts = text.lower().split("x")
    if len(parts) > 3 or not all(p.strip().isdigit() for p in parts):
        raise ValueError(
            "the size is a number such as 1024, height and width such as 1024x768, or of a clip frames, height and "
            f"width such as 49x480x720, got {text!r}"
        )
    sides = tuple(int(p) for p in parts)
    return sides * 2 if len(sides) == 1 else sides
