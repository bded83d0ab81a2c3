"""Pipelines and denoisers of diffusers by name or folder."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tokred.bench.sources.record import NoModelError, Options, Source, cast, first_line, no_download, no_settings, quiet

PARTS = ("unet", "transformer")


def known() -> tuple[str, ...]:
    """Names of denoisers whose sizes tokred knows by heart: they have no weights."""
    from tokred.adapters.diffusion.geometry import GEOMETRIES

    return tuple(GEOMETRIES)


def load(name: str, options: Options) -> Source:
    """A pipeline, or a denoiser alone.

    Raises:
        NoModelError: diffusers is not installed or does not know it, or its files cannot be had.
        ValueError: a pipeline is asked for with random weights.
    """
    try:
        import diffusers
    except ImportError as error:
        raise NoModelError("diffusers:NAME needs diffusers: pip install diffusers") from error
    quiet(diffusers)
    if name in known():
        return _by_heart(name, options)
    if (Path(name) / "config.json").is_file():
        return _denoiser(diffusers, name, None, options)
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
    except OSError as error:
        raise no_settings(f"diffusers:{name}", error) from error
    if options.shapes:
        part = next((part for part in PARTS if index.get(part)), None)
        if part is None:
            raise NoModelError(f"the pipeline {name!r} has neither a unet nor a transformer, but {', '.join(index)}")
        return _denoiser(diffusers, name, part, options)
    if options.random_weights:
        raise ValueError("--random-weights is not for pipelines: give the folder of the denoiser alone")
    try:
        # Cast afterwards: the argument for it has another name in newer versions.
        model: Any = diffusers.DiffusionPipeline.from_pretrained(name)
        if options.dtype != torch.float32:
            model.to(options.dtype)
    except OSError as error:
        raise no_download(f"diffusers:{name}", error) from error
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise NoModelError(f"diffusers cannot make {name!r}: {first_line(error)}") from error
    model.set_progress_bar_config(disable=True)
    return Source(f"diffusers:{name}", model, "pipeline", "diffusers", origin=name)


def _by_heart(name: str, options: Options) -> Source:
    from tokred.adapters.diffusion.geometry import build

    if not (options.shapes or options.random_weights):
        raise NoModelError(f"{name!r} is known by its size alone and has no weights: use --random-weights, or a folder")
    model = build(name, "meta" if options.shapes else "cpu")
    return Source(name, cast(model, options.dtype), "denoiser", "diffusers", weights=options.weights, origin=name)


def _denoiser(diffusers: Any, name: str, part: str | None, options: Options) -> Source:
    config = _config(diffusers, name, part)
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise NoModelError(f"{name!r} is of class {config.get('_class_name')!r}, which diffusers does not have")
    try:
        if options.shapes or options.random_weights:
            with torch.device("meta") if options.shapes else nullcontext():
                model: Any = cast(cls.from_config(config), options.dtype)
        else:
            model = cast(cls.from_pretrained(name), options.dtype)
    except OSError as error:
        raise no_download(f"diffusers:{name}", error) from error
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise NoModelError(f"diffusers cannot make {name!r}: {first_line(error)}") from error
    return Source(name, model.eval(), "denoiser", "diffusers", weights=options.weights, origin=name)


def _config(diffusers: Any, name: str, part: str | None) -> dict[str, Any]:
    folder = Path(name) / (part or "")
    if folder.is_dir():
        found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf8"))
        return found
    try:
        found = diffusers.ModelMixin.load_config(name, subfolder=part)
    except OSError as error:
        raise no_settings(f"diffusers:{name}", error) from error
    return found
