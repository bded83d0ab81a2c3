"""Models of images by name, with what is needed to give them pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokred.bench import sources
from tokred.bench.sources import NoModelError as NoModelError
from tokred.bench.sources import Options, Source
from tokred.bench.sources.embedded_models import zoo as zoo


@dataclass
class Subject:
    """A model with what is needed to run it on pictures.

    Attributes:
        name: as it was asked for.
        model: unpatched, in evaluation mode.
        size: height and width of an image.
        channels: 1 or 3.
        mean, std: of the normalisation, per channel.
        read: a forward of the model, patched or not, on normalised images.
        crop: share of an image's shorter side that it is used to.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[Tensor], object]
    crop: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one image, with a batch of one."""
        return (1, self.channels, *self.size)


def load(name: str, *, size: int | None = None, random_weights: bool = False) -> Subject:
    """A model of images by its name.

    Args:
        name: see :func:`tokred.bench.sources.model`; of models of images and text, the tower that sees is taken.
        size: height and width of the images, where the model can be built for others than its own.
        random_weights: do not load weights: for speed alone.

    Raises:
        NoModelError: there is no such model, or it is none of images.
    """
    return of(sources.model(name, Options(size=size, random_weights=random_weights)))


def of(source: Source) -> Subject:
    """A model of images that was found by name.

    Raises:
        NoModelError: it is none of images.
    """
    seen = source.images
    if seen is None or source.kind not in ("encoder", "dual encoder"):
        raise NoModelError(
            f"{source.name} is of kind {source.kind}, and this command is for encoders of images: `tokred list "
            f"{source.name}` says which methods run on it, `tokred bench {source.name}` measures them"
        )
    model = _tower(source)

    def read(images: Tensor) -> object:
        named = source.library == "transformers" or hasattr(model, "base_model")
        return model(pixel_values=images) if named else model(images)

    return Subject(source.name, model, seen.size, seen.channels, seen.mean, seen.std, read, seen.crop)


def _tower(source: Source) -> nn.Module:
    """The tower that sees, of a model of two."""
    if source.kind == "encoder":
        return source.module
    inner: Any = source.model
    found: nn.Module = getattr(inner, "vision_model", None) or getattr(inner, "visual", inner)
    return found.eval()
