"""Models that come along with tokred, or with a checkout of it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from tokred.bench import embedded as packaged
from tokred.bench.sources.record import NoModelError, Options, Reading, Source
from tokred.core import environment


def embedded(name: str, options: Options) -> Source:
    """The embedded default.

    Raises:
        NoModelError: its weights, or what reads them, are not here.
        ValueError: another size of images is asked for.
    """
    from tokred.bench.data.model import MEAN, SIZE, STD, build

    if options.size not in (None, SIZE):
        raise ValueError(f"--size {options.size}: the embedded model takes images of {SIZE} x {SIZE} only")
    try:
        # It is small, so that questions about its structure need no meta device, on which older timm cannot build it.
        hollow = options.shapes or options.random_weights
        model: Any = build().eval() if hollow else packaged.load()
    except (OSError, ImportError, ValueError) as error:
        raise NoModelError(str(error)) from error
    reading = Reading((SIZE, SIZE), 3, (MEAN,) * 3, (STD,) * 3)
    return Source(name, model, "encoder", "timm", reading, classes=10, weights=options.weights, origin=name)


def has_zoo() -> bool:
    """True in a checkout of the repository, which alone has ``benchmarks.zoo``."""
    root = environment.checkout()
    return root is not None and (root / "benchmarks" / "zoo").is_dir()


def zoo(module: str) -> Any:
    """A module of ``benchmarks.zoo``.

    Raises:
        NoModelError: tokred is installed as a package.
    """
    root = environment.checkout()
    if root is None or not has_zoo():
        raise NoModelError(
            "real weights and data of the zoo (dinov2, photos, textile, fashion) are read by benchmarks/zoo, "
            "which only a checkout of tokred's repository has: run `pip install -e .` there, or give another model "
            "or --data FOLDER"
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


def dinov2(name: str, options: Options) -> Source:
    """DINOv2 of the zoo, with the weights that ``benchmarks.zoo.fetch`` keeps.

    Raises:
        NoModelError: it is not a checkout, or the weights were not fetched.
    """
    from tokred.bench.sources import timm_models

    if options.shapes or options.random_weights:
        return timm_models.load("vit_small_patch14_dinov2", options)
    carriers, source, data = zoo("carriers"), zoo("dinov2"), zoo("data")
    size = options.size or 224
    try:
        model = source.load_timm(size)
    except (carriers.MissingWeights, carriers.WrongHash, ValueError) as error:
        raise NoModelError(str(error)) from error
    reading = Reading((size, size), 3, tuple(data.MEAN), tuple(data.STD))
    return Source(name, model, "encoder", "timm", reading, origin=name)
