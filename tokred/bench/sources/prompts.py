"""Prompts for pipelines, and noise for denoisers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokred.bench.sources import tables
from tokred.bench.sources.lazily import Lazily
from tokred.bench.sources.record import Data, Source

COLUMNS = ("prompt", "caption", "text")
SOME = (
    "a wooden boat on a calm lake at sunrise",
    "a bowl of oranges on a checked tablecloth",
    "a street of old houses in the rain, people with umbrellas",
    "a portrait of an old fisherman, black and white",
)
CLASSES = (207, 360, 387, 974)  # of ImageNet, for models of classes


def data(source: Source, spec: str | None, wanted: Any) -> Data:
    """Arguments of a pipeline's call, one batch for each prompt or some of them.

    Args:
        source: the pipeline.
        spec: a text file with a prompt a line, or a table with a column of prompts; None: ``wanted.prompts``, or four
            that tokred brings along. For pipelines of classes they are numbers; those without conditions take none.
        wanted: :class:`~tokred.bench.sources.given.Wanted`.

    Raises:
        FileNotFoundError, ValueError: there is no prompt, or the pipeline takes none.
    """
    known = inspect.signature(source.model.__call__).parameters
    found = [*wanted.prompts, *([] if spec is None else read(spec))]
    notes = [] if found else ["no prompts were given: a few that come along are used"]
    if "prompt" in known:
        items: list[Any] = found or list(SOME)
        argument = "prompt"
    elif "class_labels" in known:
        if not all(one.strip().isdigit() for one in found):
            raise ValueError(
                f"{source.name} makes images of classes: prompts have to be whole numbers, got {found[0]!r}"
            )
        items, argument = [int(one) for one in found] or _classes(source), "class_labels"
    else:
        if found:
            raise ValueError(f"{source.name} takes no prompt: leave --data and --prompt out, and give --count")
        items, argument = list(range(wanted.count or 4)), ""
        notes = []
    items = items[: wanted.count] if wanted.count else items
    fixed: dict[str, Any] = {}
    if wanted.steps is not None:
        fixed["num_inference_steps"] = wanted.steps
    if wanted.size is not None:
        if "height" not in known:
            raise ValueError(f"--size: {source.name} makes images of one size")
        fixed |= {"height": wanted.size, "width": wanted.size}

    # By its place, a prompt has the same noise whatever the batch.
    seeded = [(one, 1000 * wanted.seed + i) for i, one in enumerate(items)]

    def make(some: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        given = [one for one, _ in some]
        named: dict[str, Any] = {argument: given} if argument else {"batch_size": len(some)}
        return {**named, **fixed, "seeds": [seed for _, seed in some]}

    batches = Lazily(seeded, wanted.batch or 1, make)
    return Data(batches, f"{len(items)} prompts", "psnr", "pipeline", source.model, notes=notes)


def _classes(source: Source) -> list[int]:
    count = int(getattr(getattr(source.module, "config", None), "num_embeds_ada_norm", 0) or 1)
    return list(dict.fromkeys(c % count for c in CLASSES))


def read(spec: str) -> list[str]:
    """Prompts of a text file, a line each, or of a table.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if tables.is_table(spec):
        rows = tables.rows(spec)
        column = rows.column(COLUMNS, "prompt")
        return [str(row[column]) for row in rows.rows]
    path = Path(spec)
    if not path.is_file():
        raise FileNotFoundError(f"{spec!r} is no file of prompts: give a text file with one a line, or --prompt 'TEXT'")
    found = [line.strip() for line in path.read_text("utf8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def noise(source: Source, spec: str | None, wanted: Any) -> Data:
    """Noise at steps of all strengths, with noise for conditions, for a denoiser without its pipeline.

    Raises:
        ValueError: data is named, or the denoiser's arguments are not known.
    """
    from tokred.adapters.diffusion.survey import example

    if spec not in (None, "noise"):
        raise ValueError(f"a denoiser alone is fed noise: leave --data {spec} out, or give the pipeline that holds it")
    config: Any = source.module.config
    side = wanted.size or getattr(config, "sample_size", None) or 64
    size = (side, side) if isinstance(side, int) else tuple(side)
    try:
        given = example(source.module, size)
    except ValueError:
        given = example(source.module, (int(getattr(config, "sample_frames", None) or 5), *size))
    count, batch = wanted.count or 4, wanted.batch or 1
    dtype = next(source.module.parameters()).dtype

    def make(some: Sequence[int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(wanted.seed + some[0])
        step = 1 + 998 * some[0] // max(1, count - 1)
        # A tuple, since the records of diffusers have their tensor under a name of their own.
        filled = {k: _filled(k, v, len(some), step, generator, dtype) for k, v in given.items()}
        return {**filled, "return_dict": False}

    batches = Lazily(list(range(count)), batch, make)
    return Data(batches, "noise", "cosine", "forward", source.model)


def _filled(name: str, given: Any, batch: int, step: int, generator: torch.Generator, dtype: torch.dtype) -> Any:
    if isinstance(given, Mapping):
        return {k: _filled(k, v, batch, step, generator, dtype) for k, v in given.items()}
    if isinstance(given, tuple | list):
        return tuple(_filled(name, v, batch, step, generator, dtype) for v in given)
    if not isinstance(given, torch.Tensor):
        return given
    shape = given.shape if name.endswith("_ids") or "rotary" in name else (batch, *given.shape[1:])
    if name == "timestep":
        return torch.full(shape, step if not given.is_floating_point() else step / 1000)
    if name.endswith("mask"):
        return torch.ones(shape, dtype=given.dtype)
    if not given.is_floating_point():
        return torch.zeros(shape, dtype=given.dtype)
    return torch.randn(shape, generator=generator).to(dtype)
