"""The embedded default: a small vision transformer that finds a garment in a photograph, and a sample of such pictures.

    model = tokred.bench.embedded.load()
    images, labels = tokred.bench.embedded.sample()

Needs ``pip install 'tokred[bench]'``; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.bench.data.model import MEAN, MODEL, SIZE, STD, build
from tokred.bench.data.scenes import Scenes, compose, normalise

FOLDER = Path(__file__).parent / "data"
WEIGHTS, SAMPLE = "vit_clutter.safetensors", "clutter_sample.npz"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHAPE = (1, 3, SIZE, SIZE)
NAME = "garments of Fashion-MNIST's test set on photographs"


class Sample(NamedTuple):
    """Normalised images ``(N, 3, 112, 112)`` float32 and their labels ``(N,)`` int64."""

    images: Tensor
    labels: Tensor


def _file(name: str) -> Path:
    path = FOLDER / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: this copy of tokred was built without it; "
            "`python -m benchmarks encoder/train_embedded` makes it anew"
        )
    return path


def _needs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the embedded model needs {module.partition('.')[0]}: pip install 'tokred[bench]'"
        ) from error


def notes() -> dict[str, Any]:
    """Notes of the weights' file on its training: top-1 on the sample, and how many pictures it was trained on.

    Raises:
        FileNotFoundError: the weights are not in this copy of tokred.
    """
    with _needs("safetensors").safe_open(str(_file(WEIGHTS)), framework="pt") as f:
        found: dict[str, Any] = json.loads((f.metadata() or {}).get("notes", "{}"))
    return found


def load() -> nn.Module:
    """The trained timm model, in evaluation mode and float32.

    Raises:
        FileNotFoundError: the weights are not in this copy of tokred.
        ImportError: timm or safetensors is not installed.
        ValueError: the file holds weights of another architecture.
    """
    path = _file(WEIGHTS)
    with _needs("safetensors").safe_open(str(path), framework="pt") as f:
        header = f.metadata() or {}
        weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    stored = json.loads(header.get("architecture", "{}"))
    _needs("timm")
    model = build()
    if stored != MODEL or set(weights) != set(model.state_dict()):
        raise ValueError(f"{path} holds weights of another architecture than tokred.bench.data.model builds")
    model.load_state_dict(weights, strict=True)
    return model.eval()


def sample(count: int | None = None) -> Sample:
    """The first ``count`` of the pictures that travel with tokred; None: all of them, which take 300 MB.

    Each is a garment of Fashion-MNIST's test set on a crop of a photograph; neither was trained on.

    Raises:
        FileNotFoundError: the sample is not in this copy of tokred.
        ValueError: more images are asked for than there are.
    """
    with _needs("numpy").load(_file(SAMPLE)) as f:
        kept = {name: torch.from_numpy(f[name]) for name in f.files}
    labels = kept["labels"].long()
    if count is not None and not 1 <= count <= len(labels):
        raise ValueError(f"between 1 and {len(labels)} images are embedded, got count={count}")
    scenes = Scenes(*(kept[name][:count] for name in Scenes._fields))
    photos = [kept[f"photo_{i}"] for i in range(int(kept["photo"].max()) + 1)]
    return Sample(normalise(compose(scenes, kept["garments"], photos)), labels[:count])


def pixels(images: Tensor) -> Tensor:
    """Undo the normalisation: ``(..., 3, 112, 112)`` in 0..1, for drawing."""
    return (images * STD + MEAN).clamp(0, 1)
