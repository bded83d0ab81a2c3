"""Models of images by name, with a function that reads their answers: for pictures, and for features beside logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.api import Expose
from tokred.bench import sources
from tokred.bench.sources import NoModelError as NoModelError
from tokred.bench.sources import Options, Source
from tokred.bench.sources.embedded_models import zoo as zoo


class Answer(NamedTuple):
    """Answers of a model to a batch: logits ``(B, classes)`` or None, features ``(B, F)``, patch tokens or None."""

    logits: Tensor | None
    features: Tensor
    patches: Tensor | None


@dataclass
class Subject:
    """A model with what is needed to feed and to read it.

    Attributes:
        name: as it was asked for.
        model: unpatched, in evaluation mode.
        size: height and width of an image.
        channels: 1 or 3.
        mean, std: of the normalisation, per channel.
        classes: outputs of the head; 0 where there is none.
        read: answers of the model, patched or not.
        expose: how a patched model is to return its tokens while its quality is measured.
        crop: share of an image's shorter side that it is used to.
        weights: where they come from.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    read: Callable[[Tensor], Answer]
    expose: Expose = "auto"
    crop: float = 1.0
    weights: str = "trained"

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
    read = _dinov2(model) if source.name == "dinov2" and source.weights == "trained" else _read(source, model)
    # At full length, merged tokens count in DINOv2's mean by their size, and the saliency head finds its grid.
    expose: Expose = "last" if source.name == "dinov2" else "auto"
    return Subject(
        source.name,
        model,
        seen.size,
        seen.channels,
        seen.mean,
        seen.std,
        source.classes,
        read,
        expose,
        seen.crop,
        source.weights,
    )


def _tower(source: Source) -> nn.Module:
    """The tower that sees, of a model of two."""
    if source.kind == "encoder":
        return source.module
    inner: Any = source.model
    found: nn.Module = getattr(inner, "vision_model", None) or getattr(inner, "visual", inner)
    return found.eval()


def _read(source: Source, model: nn.Module) -> Callable[[Tensor], Answer]:
    if source.library == "transformers" or hasattr(model, "base_model"):
        return _read_transformers(model, bool(source.classes))
    if hasattr(model, "forward_features"):
        return read_timm(model)

    def read(images: Tensor) -> Answer:
        found = model(images)
        pooled = found if isinstance(found, Tensor) else found[0]
        return Answer(None, pooled.flatten(1), None)

    return read


def read_timm(model: Any) -> Callable[[Tensor], Answer]:
    """Features that timm's head is given, and its logits."""

    def read(images: Tensor) -> Answer:
        tokens = model.forward_features(images)
        features = model.forward_head(tokens, pre_logits=True)
        logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) else None
        return Answer(logits, features, None)

    return read


def _dinov2(model: Any) -> Callable[[Tensor], Answer]:
    def read(images: Tensor) -> Answer:
        tokens = model.forward_features(images)
        patches = tokens[:, 1:]
        return Answer(None, torch.cat([tokens[:, 0], patches.mean(1)], 1), patches)

    return read


def _read_transformers(model: Any, head: bool) -> Callable[[Tensor], Answer]:
    def read(images: Tensor) -> Answer:
        body = (model.base_model if head else model)(pixel_values=images)
        pooled = getattr(body, "pooler_output", None)
        features = body.last_hidden_state[:, 0] if pooled is None else pooled
        return Answer(model(pixel_values=images).logits if head else None, features, None)

    return read
