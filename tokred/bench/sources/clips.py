"""Clips for video encoders: folders of frames, and noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.bench import images
from tokred.bench.sources import pictures
from tokred.bench.sources.lazily import Lazily
from tokred.bench.sources.record import Data, Reading, Source

COUNT = 100


def data(source: Source, spec: str | None, wanted: Any) -> Data:
    """Clips ``(B, frames, C, H, W)``.

    Args:
        source: the model, whose configuration says how many frames it takes.
        spec: a folder with a folder of frames for each clip, of which as many as the model takes are read at even
            distances; or ``noise``; None: noise, for a model without trained weights.
        wanted: :class:`~tokred.bench.sources.given.Wanted`.

    Raises:
        FileNotFoundError, ValueError: there is no clip.
    """
    metric = "agreement" if source.classes else "cosine"
    frames, reading = _taken(source)
    name = source.model.main_input_name
    dtype = next(source.module.parameters()).dtype
    if spec is None and source.weights != "random":
        raise ValueError(f"{source.name} brings no clips along: give --data with {source.usual.data}")
    if spec == pictures.NOISE:
        pictures.check_alone(spec)
    if spec in (None, pictures.NOISE):

        def drawn(some: Sequence[int]) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(wanted.seed + some[0])
            shape = (len(some), frames, reading.channels, *reading.size)
            return {name: torch.randn(shape, generator=generator).to(dtype)}

        return Data(
            Lazily(range(wanted.count or 4), wanted.batch or 1, drawn), "noise", metric, "forward", source.model
        )
    assert spec is not None  # or it would be noise
    found = listed(Path(spec))
    order = sorted(random.Random(wanted.seed).sample(range(len(found)), min(wanted.count or COUNT, len(found))))

    def make(some: Sequence[Sequence[Path]]) -> dict[str, Tensor]:
        return {name: torch.stack([clip(files, frames, reading) for files in some]).to(dtype)}

    batches = Lazily([found[i] for i in order], wanted.batch or 1, make)
    return Data(batches, f"{spec}, {len(order)} clips", metric, "forward", source.model)


def _taken(source: Source) -> tuple[int, Reading]:
    """Frames of a clip, and how each is read."""
    from tokred.bench.sources import hf

    config: Any = source.model.config
    # Frame by frame, without the processor's transform, which wants whole clips.
    reading = hf.reading(config, source.processor)._replace(transform=None)
    return int(getattr(config, "num_frames", 16)), reading


def listed(folder: Path) -> list[list[Path]]:
    """The frames of each clip, in the order of their names.

    Raises:
        FileNotFoundError: the folder is not there, or no folder in it holds an image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of clips, each a folder of frames")
    clips = [
        sorted(f for f in one.iterdir() if f.suffix.lower() in images.SUFFIXES)
        for one in sorted(folder.rglob("*"))
        if one.is_dir()
    ]
    found = [files for files in clips if files]
    if not found:
        raise FileNotFoundError(f"{folder} holds no clip: a clip is a folder of frames, as images")
    return found


def clip(files: Sequence[Path], frames: int, reading: Reading) -> Tensor:
    """Frames at even distances ``(frames, C, H, W)``; of a shorter clip some come twice."""
    chosen = [files[(2 * i + 1) * len(files) // (2 * frames)] for i in range(frames)]
    return torch.stack([pictures.seen(file, reading) for file in chosen])
