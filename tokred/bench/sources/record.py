"""Records of models and data that were found by name, and what is usual for each kind of model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch


class NoModelError(Exception):
    """There is no such model, or its weights cannot be had; the message says what to do."""


class Kind(NamedTuple):
    """The usual run, metrics, methods and data of a kind of model.

    Attributes:
        run: how :func:`tokred.benchmark` runs it.
        metric: where the data has answers, labels or transcripts.
        bare: the metric where it has none.
        methods: settings that are measured where none is named; those that cannot run on a model are left out.
        data: in words, what to give.
    """

    run: str
    metric: str
    bare: str
    methods: tuple[str, ...]
    data: str


_BLOCKS = ("tome", "pitome", "evit")
KINDS: dict[str, Kind] = {
    "encoder": Kind("forward", "top1", "agreement", _BLOCKS, "a folder of images, hfds:NAME, or noise"),
    "text encoder": Kind("forward", "cosine", "cosine", _BLOCKS, "a text file, JSON lines, or hfds:NAME"),
    "dual encoder": Kind("forward", "top1", "cosine", _BLOCKS, "a folder of images, hfds:NAME, or noise"),
    "audio encoder": Kind("forward", "cosine", "cosine", _BLOCKS, "a folder of recordings (.wav), or noise"),
    "video encoder": Kind(
        "forward", "agreement", "agreement", _BLOCKS, "a folder with a folder of frames for each clip, or noise",
    ),
    "language model": Kind(
        "text", "perplexity", "perplexity", ("snapkv", "expected_attention", "keydiff"),
        "a text file, JSON lines with a field text, or hfds:NAME",
    ),
    "vision-language model": Kind(
        "generate", "contains", "overlap", ("divprune", "visionzip", "fastv"),
        "a JSON-lines or CSV file with the fields image, question and answer, or hfds:NAME with such columns",
    ),
    "speech": Kind("generate", "wer", "overlap", ("pitome", "downsample"), "a folder of recordings (.wav)"),
    "denoiser": Kind("forward", "cosine", "cosine", ("tomesd", "todo"), "noise"),
    "pipeline": Kind("pipeline", "psnr", "psnr", ("tomesd", "todo"), "a text file with a prompt a line, or --prompt"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Wishes about a model.

    Attributes:
        size: height and width of images, where the model can be built for others than its own.
        checkpoint: weights of a model of timm's that was fine-tuned.
        classes: outputs of its head; None: as the checkpoint or the model has.
        random_weights: do not load any: for speed alone.
        shapes: no weights at all, on the meta device, for questions about the model's structure.
        dtype: of the weights.
    """

    size: int | None = None
    checkpoint: Path | None = None
    classes: int | None = None
    random_weights: bool = False
    shapes: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> str:
        """Where the weights come from, in a word."""
        return "none" if self.shapes else "random" if self.random_weights else "trained"


class Reading(NamedTuple):
    """How a model wants its images.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        mean, std: of the normalisation, per channel.
        crop: share of the shorter side that it is used to.
        transform: of a picture of PIL's to a tensor ``(C, H, W)``; None: the middle, resized and normalised.
        argument: of the forward that takes the images; None: the first.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop: float = 1.0
    transform: Callable[[Any], torch.Tensor] | None = None
    argument: str | None = None


@dataclass
class Source:
    """A model that was found by name, with what is needed to feed and to read it.

    Attributes:
        name: as it was asked for.
        model: a module in evaluation mode, or a pipeline of diffusers.
        kind: one of :data:`KINDS`.
        library: that it is of.
        images: how it reads images; None: it reads none.
        tokenizer: of its texts, or None.
        processor: of images, sounds and texts together, or None.
        classes: outputs of its head; 0: none.
        weights: ``"trained"``, ``"random"`` or ``"none"``.
        origin: the name or folder that its library knows.
    """

    name: str
    model: Any
    kind: str
    library: str
    images: Reading | None = None
    tokenizer: Any = None
    processor: Any = None
    classes: int = 0
    weights: str = "trained"
    origin: str = ""

    @property
    def usual(self) -> Kind:
        """The record of what is usual for models of its kind."""
        return KINDS[self.kind]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one input with a batch of one, where the model says it; None where it does not."""
        if self.images is not None:
            return (1, self.images.channels, *self.images.size)
        config: Any = getattr(self.model, "config", None)
        inner = getattr(config, "vision_config", config)
        bins = getattr(config, "num_mel_bins", None)
        if self.kind == "text encoder":
            return (1, 128)
        if bins is not None and hasattr(config, "max_source_positions"):
            return (1, int(bins), 2 * int(config.max_source_positions))
        if bins is not None and hasattr(config, "max_length"):
            return (1, int(config.max_length), int(bins))
        side = getattr(inner, "image_size", None)
        if side is None:
            return None
        sides = (int(side),) * 2 if isinstance(side, int) else tuple(side)[:2]
        frames = (int(config.num_frames),) if self.kind == "video encoder" and hasattr(config, "num_frames") else ()
        return (1, *frames, int(getattr(inner, "num_channels", 3)), *sides)

    @property
    def module(self) -> torch.nn.Module:
        """The module that is patched: the model, or the denoiser of a pipeline."""
        from tokred import adapters

        found: torch.nn.Module = adapters.module_of(self.model)
        return found


@dataclass
class Data:
    """Batches for a model, ready for :func:`tokred.benchmark`.

    Attributes:
        batches: an iterable that can be read again.
        name: of the data.
        metric: the ready metric that fits.
        run: how the model runs on a batch.
        model: the model to measure: the source's, or one around it with a head for these data.
        labelled: True if there are right answers.
        notes: what the user has to know about how quality comes about.
        options: more arguments for :func:`tokred.benchmark`, such as ``tokenizer``.
    """

    batches: Any
    name: str
    metric: str
    run: str
    model: Any
    labelled: bool = False
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in a type, touched only where it has another: some libraries warn otherwise."""
    found = next((p.dtype for p in model.parameters()), dtype)
    return model if found == dtype else model.to(dtype)


def quiet(library: Any) -> None:
    """No bars of transformers or diffusers while weights are loaded, where there is no terminal to draw them on."""
    if not sys.stderr.isatty():
        library.utils.logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def no_download(name: str, error: BaseException) -> NoModelError:
    """The error for weights that are neither here nor within reach."""
    return NoModelError(
        f"the weights of {name!r} cannot be had ({first_line(error)}). Without a network, use a model whose weights "
        "are in the cache or in a local folder (such as hf:FOLDER), the model embedded, or --random-weights for speed"
    )


def no_settings(name: str, error: BaseException) -> NoModelError:
    """The error for a model of which not even the configuration is within reach."""
    return NoModelError(
        f"the configuration of {name!r} cannot be had ({first_line(error)}): give a local folder, or a name that is "
        "in the cache or can be downloaded"
    )
