"""``tokred explain``: what a method could gain on a denoiser at some size."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer


def explain_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="sd15, sd21, sdxl, dit-xl-2, pixart, sd3, sd35-medium, flux, cogvideox-2b, cogvideox-5b, wan-1.3b, "
            "wan-14b, hunyuan-video, or a folder.",
        ),
    ] = "sd15",
    method: Annotated[str, typer.Option("--method", help="A method of the stage attention.")] = "tomesd",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed.")] = None,
    size: Annotated[
        str, typer.Option(help="Pixels: 1024, or 1024x768 (height x width); of a clip: 49x480x720, frames first.")
    ] = "1024",
) -> None:
    """Say what a method could gain on a denoiser: tokens by resolution, attention's share, the ceiling of the speed-up.

    Nothing is computed but shapes, and no weights are read. Needs diffusers.

    \b
    Examples:
      tokred explain --model sd15 --size 512
      tokred explain --model sdxl --method tomesd --set max_downsample=2
      tokred explain --model sd15 --method todo --set factors=4 --size 2048
      tokred explain --model path/to/a/pipeline --size 1024x768
      tokred explain --model cogvideox-5b --method todo --set factors=(1,2) --size 49x480x720
    """
    from tokred.cli.console import refusing

    with refusing():
        text = explained(model, method, settings or [], size)
    print(text)


def explained(model: str, method: str, settings: list[str], size: str) -> str:
    """The explanation as text.

    Raises:
        ValueError: model, size or a setting is wrong.
        UnknownMethodError, TypeError, MissingInputError, UnsupportedModelError: as :func:`tokred.explain`.
    """
    from tokred import api
    from tokred.adapters.diffusion.geometry import read, sample_size
    from tokred.analysis.explain import explain
    from tokred.core.settings import parse_pairs

    chosen = api.make(method, **parse_pairs(settings))
    denoiser, pixels, frames = read(model)
    try:
        sample = sample_size(parse_size(size), pixels, frames)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it stands in the text
        found = explain(denoiser, chosen, sample)
    return str(found)


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
