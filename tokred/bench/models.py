"""Models that a benchmark can be run on, by name: the embedded one, DINOv2 of the zoo, timm's, transformers'."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.api import Expose
from tokred.bench import embedded
from tokred.core import environment


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


class NoModelError(Exception):
    """There is no such model, or its weights cannot be had; the message says what to do."""


def load(name: str, *, size: int | None = None, random_weights: bool = False) -> Subject:
    """A model by its name.

    Args:
        name: ``embedded``, ``dinov2``, ``hf:`` and a transformers id or local folder, or a name of timm's.
        size: height and width of the images, where the model can be built for others than its own.
        random_weights: do not load weights: for speed alone.

    Raises:
        NoModelError: see there.
    """
    if name == "embedded":
        return _embedded(random_weights)
    if name == "dinov2":
        return _dinov2(size or 224)
    if name.startswith("hf:"):
        return _transformers(name.removeprefix("hf:"), random_weights)
    return _timm(name, size, random_weights)


def skeleton(name: str) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """A model without trained weights and the shape of its input, for questions about its structure.

    Raises:
        NoModelError: there is no such model.
    """
    if name == "dinov2":
        name = "vit_small_patch14_dinov2"
    subject = load(name, random_weights=True)
    return subject.model, subject.shape


def _embedded(random_weights: bool) -> Subject:
    from tokred.bench.data.model import MEAN, STD, build

    try:
        model: Any = build().eval() if random_weights else embedded.load()
    except (OSError, ImportError, ValueError) as error:
        raise NoModelError(str(error)) from error
    return Subject(
        "embedded", model, (28, 28), 1, (MEAN,), (STD,), 10, read_timm(model), weights=_origin(random_weights)
    )


def _origin(random_weights: bool) -> str:
    return "random" if random_weights else "trained"


def zoo(module: str) -> Any:
    """A module of ``benchmarks.zoo``, which only a checkout of the repository has.

    Raises:
        NoModelError: tokred is installed as a package.
    """
    root = environment.checkout()
    if root is None or not (root / "benchmarks" / "zoo").is_dir():
        raise NoModelError(
            "real weights and data of the zoo (dinov2, photos, textile, fashion) are read by benchmarks/zoo, "
            "which only a checkout of tokred's repository has: run `pip install -e .` there, or give another --model "
            "or --images FOLDER"
        )
    if "benchmarks" not in sys.modules:
        # By its place: with the root on sys.path, its folder `kernels` would pass for another package of that name.
        place = root / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", place / "__init__.py", submodule_search_locations=[str(place)]
        )
        if spec is None or spec.loader is None:
            raise NoModelError(f"{place} cannot be imported")
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.zoo.{module}")


def _dinov2(size: int) -> Subject:
    carriers, source = zoo("carriers"), zoo("dinov2")
    data = zoo("data")
    try:
        model = source.load_timm(size)
    except (carriers.MissingWeights, carriers.WrongHash, ValueError) as error:
        raise NoModelError(str(error)) from error

    def read(images: Tensor) -> Answer:
        tokens = model.forward_features(images)
        patches = tokens[:, 1:]
        return Answer(None, torch.cat([tokens[:, 0], patches.mean(1)], 1), patches)

    # At full length, merged tokens count in the mean by their size, and the saliency head finds its grid.
    return Subject("dinov2", model, (size, size), 3, data.MEAN, data.STD, 0, read, expose="last")


def read_timm(model: Any) -> Callable[[Tensor], Answer]:
    """Features that timm's head is given, and its logits."""

    def read(images: Tensor) -> Answer:
        tokens = model.forward_features(images)
        features = model.forward_head(tokens, pre_logits=True)
        logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) else None
        return Answer(logits, features, None)

    return read


def _timm(name: str, size: int | None, random_weights: bool) -> Subject:
    try:
        import timm
    except ImportError as error:
        raise NoModelError(f"{name!r} would be a model of timm's, which is not installed: pip install timm") from error
    if not timm.is_model(name.partition(".")[0]) and "/" not in name:
        known = ["embedded", "dinov2", *timm.list_models()]
        near = [k for k in known if k.startswith(name)][:3] or difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`embedded` is always there"
        raise NoModelError(f"no model is named {name!r}; {hint} A model of transformers is written hf:NAME")
    options: dict[str, Any] = {} if size is None else {"img_size": size}
    try:
        model: Any = timm.create_model(name, pretrained=not random_weights, **options).eval()
    except OSError as error:
        raise NoModelError(_no_download(name, error)) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise NoModelError(f"timm cannot make {name!r}: {_first_line(error)}") from error
    config = timm.data.resolve_data_config({}, model=model)
    channels, high, wide = config["input_size"]
    high, wide = (size, size) if size else (high, wide)
    return Subject(
        name,
        model,
        (int(high), int(wide)),
        int(channels),
        tuple(config["mean"]),
        tuple(config["std"]),
        int(getattr(model, "num_classes", 0)),
        read_timm(model),
        crop=float(config["crop_pct"]),
        weights=_origin(random_weights),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _no_download(name: str, error: Exception) -> str:
    return (
        f"the weights of {name!r} cannot be had ({_first_line(error)}). Without a network, use a model whose "
        "weights are in the cache or in a local folder (hf:FOLDER), --model embedded, or --random-weights for speed"
    )


def _transformers(name: str, random_weights: bool) -> Subject:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    except ImportError as error:
        raise NoModelError("hf:NAME needs transformers: pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(name)
        head = any(a.endswith("ForImageClassification") for a in config.architectures or ())
        kind = AutoModelForImageClassification if head else AutoModel
        model: Any = kind.from_config(config) if random_weights else kind.from_pretrained(name)
    except OSError as error:
        raise NoModelError(_no_download(f"hf:{name}", error)) from error
    except ValueError as error:
        raise NoModelError(f"transformers cannot make {name!r}: {_first_line(error)}") from error
    # Of a model of images and text, the tower that sees.
    model = getattr(model, "vision_model", model).eval()
    config = model.config
    size = getattr(config, "image_size", 224)
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[:2]
    mean, std = _processor(name)
    return Subject(
        f"hf:{name}",
        model,
        (int(high), int(wide)),
        int(getattr(config, "num_channels", 3)),
        mean,
        std,
        int(config.num_labels) if head else 0,
        _read_transformers(model, head),
        weights=_origin(random_weights),
    )


def _read_transformers(model: Any, head: bool) -> Callable[[Tensor], Answer]:
    def read(images: Tensor) -> Answer:
        body = (model.base_model if head else model)(pixel_values=images)
        pooled = getattr(body, "pooler_output", None)
        features = body.last_hidden_state[:, 0] if pooled is None else pooled
        return Answer(model(pixel_values=images).logits if head else None, features, None)

    return read


def _processor(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the model's files name, or one half."""
    from transformers import AutoImageProcessor

    try:
        found = AutoImageProcessor.from_pretrained(name)
        return tuple(found.image_mean), tuple(found.image_std)
    except (OSError, ValueError, ImportError, AttributeError, TypeError):
        return (0.5,) * 3, (0.5,) * 3
