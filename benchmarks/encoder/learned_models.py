"""Models that ``encoder/train_learned`` trains, with pictures to train on and to test on: garments in clutter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.encoder import clutter
from benchmarks.encoder.learned_arms import covered, foreground
from benchmarks.encoder.train_embedded import Data
from benchmarks.zoo import data as zoo
from benchmarks.zoo import dinov2
from tokred.bench import embedded, probe
from tokred.bench.data.model import PATCH, SIZE
from tokred.bench.data.scenes import Scenes, compose, normalise

# DINOv2's scenes: shown at twice their size, a token is 7 of their pixels, and a garment as many tokens as elsewhere.
SMALL, SCALE = 56, 2
STRENGTH = 0.03  # of the penalty on the head's weights; its inverse, as in scikit-learn


@dataclass(frozen=True)
class Look:
    """How scenes are shown to a model.

    Attributes:
        size: pixels of a scene each way.
        patch: of a token, in the scene's pixels.
        scale: pixels of a picture for one of the scene.
        normalise: pictures in 0..1 as the model wants them.
    """

    size: int
    patch: int
    scale: int
    normalise: Callable[[Tensor], Tensor]

    def pictures(self, scenes: Scenes, garments: Tensor, photos: Sequence[Tensor]) -> Tensor:
        """``(N, 3, scale * size, scale * size)`` float32, normalised; arguments as of ``compose``."""
        found = compose(scenes, garments, photos, self.size)
        if self.scale > 1:
            found = F.interpolate(found, scale_factor=self.scale, mode="bilinear")
        return self.normalise(found)

    def shown(self, scenes: Scenes, garments: Tensor) -> Tensor:
        """``(N, G, G)`` bool: the patches that a garment covers by at least half."""
        kept = garments[scenes.garment]
        return covered(kept, scenes.flip, scenes.place, self.size, self.patch) >= 0.5


LOOKS = {
    "embedded": Look(SIZE, PATCH, 1, normalise),
    "dinov2": Look(SMALL, dinov2.PATCH // SCALE, SCALE, lambda pictures: zoo.normalise(255 * pictures)),
}


@dataclass(frozen=True)
class Subject:
    """A model before any training of ours, and what it is tested on.

    Attributes:
        name: of :data:`LOOKS`.
        model: a timm model with a classifier, in evaluation mode, without a patch.
        images: ``(N, 3, H, W)`` float32, normalised.
        labels: ``(N,)`` int64.
        shown: ``(N, P)`` bool, the patches that a garment covers by at least half.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    shown: Tensor


def subject(name: str, data: Data, test: int, fitted: int, folder: Path) -> Subject:
    """The model of a name, and the first ``test`` of its pictures to test on.

    Args:
        name: of :data:`LOOKS`.
        data: garments and photographs.
        test: number of pictures.
        fitted: pictures that the classifier of a model without one is fitted on.
        folder: where that classifier is kept, so that it is fitted once.

    Raises:
        MissingWeights: the weights of ``dinov2`` were not fetched.
    """
    if name == "embedded":
        images, labels = embedded.sample(test)
        return Subject(name, embedded.load(), images, labels, foreground(test))
    model, look = with_head(data, fitted, folder / f"head-{fitted}.safetensors"), LOOKS[name]
    scenes = clutter.draw(torch.arange(test), data.held_photos, look.size, torch.Generator().manual_seed(0))
    images = look.pictures(scenes, data.held_garments, data.held_photos)
    return Subject(name, model, images, data.held_labels[:test], look.shown(scenes, data.held_garments).flatten(1))


def with_head(data: Data, count: int, path: Path) -> nn.Module:
    """DINOv2-S with a linear classifier of the class token, fitted on ``count`` training scenes; kept in ``path``.

    No other weight learns here. The draws are the same in every run, whatever the seed of what is trained after.
    """
    from safetensors.torch import load_file, save_file

    look = LOOKS["dinov2"]
    model: Any = dinov2.load_timm(look.size * look.scale)
    model.reset_classifier(10)
    if not path.exists():
        g = torch.Generator().manual_seed(1)
        index = torch.randint(len(data.labels), (count,), generator=g)
        found = []
        with torch.inference_mode():
            for part in index.split(50):
                x = look.pictures(clutter.draw(part, data.photos, look.size, g), data.garments, data.photos)
                found.append(model.forward_head(model.forward_features(x), pre_logits=True))
        fit = probe.fit(torch.cat(found), data.labels[index], strength=STRENGTH)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": fit.weight, "bias": fit.bias}, str(path))
    model.head.load_state_dict(load_file(path))
    return model.eval()
