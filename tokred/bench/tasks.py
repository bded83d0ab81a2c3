"""Tasks of a benchmark: which labelled images, which photos, and whether there is a map to restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred.bench import embedded, probe
from tokred.bench import images as photos
from tokred.bench.images import Images
from tokred.bench.models import NoModelError, Subject, zoo

ZOO = ("fashion", "textile", "photos")
NOISE = "noise"


@dataclass(frozen=True)
class Task:
    """Measures besides speed.

    Attributes:
        test: images for top-1; None: there are no labels.
        train: images that a linear probe is fitted on; None: the model's own head answers.
        outputs: which output of the head each class of ``test`` is.
        photos: images for the features' cosine, and for the saliency map.
        saliency: from restored patch tokens and a size to maps ``(B, 1, size, size)``, or None.
    """

    photos: Images
    test: Images | None = None
    train: Images | None = None
    outputs: list[int] | None = None
    saliency: Callable[[Tensor, int], Tensor] | None = None

    @property
    def kind(self) -> str:
        """The way in which top-1 comes about."""
        if self.test is None:
            return ""
        return "head" if self.train is None else "linear probe"


def choose(subject: Subject, data: str | None, *, count: int = 1000, seed: int = 0) -> Task:
    """The task for a model and data that the user names; what it needs is asked for before anything is measured.

    Args:
        subject: the model.
        data: a folder of images; ``fashion``, ``textile`` or ``photos`` of the zoo; ``noise``; None: what suits the
            model.
        count: at most so many labelled images to test on (and as many to fit a probe on).
        seed: of the choice and the split.

    Raises:
        NoModelError: the data needs a checkout of tokred, or is absent.
        FileNotFoundError, ValueError: the folder is not one of images.
        ImportError: a probe has to be fitted, and scikit-learn is not installed.
    """
    task = _choose(subject, data, count, seed)
    if task.train is not None:
        probe.linear_models()
    return task


def _choose(subject: Subject, data: str | None, count: int, seed: int) -> Task:
    if data == NOISE:
        return Task(_noise(subject))
    if data is not None and data not in ZOO:
        if not Path(data).is_dir():
            raise FileNotFoundError(f"{data!r} is neither a folder of images nor one of {', '.join(ZOO)}, {NOISE}")
        return _folder(subject, Path(data), count, seed)
    if subject.name == "embedded" and data is None:
        try:
            sample = embedded.sample(min(count, 2000))
        except FileNotFoundError as error:
            raise NoModelError(str(error)) from error
        test = Images(sample.images, sample.labels, embedded.CLASSES, embedded.NAME)
        return Task(test, test, None, list(range(10)))
    if data is None and subject.weights == "random":
        return Task(_noise(subject))
    if subject.channels != 3:
        raise ValueError(f"{subject.name} takes images of {subject.channels} channel(s); {data} has three")
    return _zoo(subject, data or ("fashion" if subject.classes == 0 else "photos"), count, seed)


def _noise(subject: Subject, count: int = 64) -> Images:
    shape = (count, *subject.shape[1:])
    return Images(torch.randn(shape, generator=torch.Generator().manual_seed(0)), None, (), "noise")


def _folder(subject: Subject, folder: Path, count: int, seed: int) -> Task:
    classes = photos.find(folder).classes
    outputs = photos.fit_head(classes, subject.classes) if classes and subject.classes else None
    probed = bool(classes) and outputs is None
    wanted = 2 * count if probed else count
    found = photos.load(folder, subject.size, subject.channels, crop=subject.crop, count=wanted, seed=seed)
    if probed:
        train, test = found.split(count, seed)
        return Task(test, test, train)
    return Task(found, found, None, outputs) if classes else Task(found)


def _zoo(subject: Subject, data: str, count: int, seed: int) -> Task:
    """Real photos, and a labelled set: a probe on it, or the head's answers where the labels are ImageNet's."""
    carriers, source = zoo("carriers"), zoo("data")
    size = subject.size[0]
    if subject.size[0] != subject.size[1]:
        raise ValueError(f"the zoo's images are square, but {subject.name} takes {subject.size}; give a folder")
    try:
        found = source.photos(size, ("sklearn", "skimage", "imagenet"))
        seen = Images(found.images, None, (), f"{len(found.images)} photos")
        if data == "photos":
            task = _imagenet(subject, source, seen)
        else:
            train, test = _labelled(source, data, size, count, seed)
            task = Task(seen, test, train)
    except carriers.MissingWeights as error:
        raise NoModelError(str(error)) from error
    if subject.name == "dinov2":
        head: Any = zoo("dinov2").load_saliency_head()
        task = replace(task, saliency=head)
    return task


def _imagenet(subject: Subject, source: Any, seen: Images) -> Task:
    if subject.classes != 1000:
        return Task(seen)
    found = source.labelled_photos("imagenet", subject.size[0])
    test = Images(found.images, found.labels, (), f"{len(found.images)} photos of ImageNet classes")
    return Task(seen, test, None, list(range(1000)))


def _labelled(source: Any, data: str, size: int, count: int, seed: int) -> tuple[Images, Images]:
    if data == "fashion":
        parts = [source.split(source.fashion_mnist(p), count, 0, seed)[0] for p in ("train", "test")]
        found = [source.as_rgb(p, size) for p in parts]
        name = "Fashion-MNIST"
    else:
        found = list(source.split(source.textile(size), count, min(count, 1000), seed))
        name = "textile defects"
    train, test = (Images(f.images, f.labels, f.classes, name) for f in found)
    return train, test
