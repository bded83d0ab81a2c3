"""Measures of what token reduction costs, on frozen features of real weights. Nothing is trained but a linear probe.

The functions know nothing of methods: a model is a callable from normalised pictures ``[B, 3, H, W]`` to features
``[B, F]`` or tokens ``[B, N, C]``. Where one is wanted, what :func:`collect` returned for it will do as well, so that
the unpatched model of a sweep runs once, before it is patched in place::

    train, test = data.split(data.textile(112), 1000, 1000)
    model = dinov2.load_timm(112)
    features = timm_features(model)
    probe = fit_probe(features, train)
    whole = collect(features, test.images)
    score_probe(probe, whole, test).top1             # the unpatched model
    tokred.apply(model, "tome", r=4)
    score_probe(probe, features, test).top1          # the patched one
    feature_cosine(whole, features, test.images).mean
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.data import Labelled, normalise
from tokred.bench import probe as probes
from tokred.bench.probe import Probe

Function = Callable[[Tensor], Tensor]
# A callable, or the tensor that collect() made of it.
Source = Function | Tensor


def cls_and_mean(tokens: Tensor, sizes: Tensor | None = None, prefix: int = 1) -> Tensor:
    """Class token and mean of the patch tokens.

    Args:
        tokens: ``[B, N, C]``, the first ``prefix`` of them no patches, and the very first the class token.
        sizes: ``[B, N]``, how many original tokens each stands for, to weigh the mean by; all the same by default.
        prefix: leading tokens that are not part of the mean.

    Returns:
        ``[B, 2 * C]``.
    """
    patches = tokens[:, prefix:]
    if sizes is None:
        mean = patches.mean(1)
    else:
        weight = sizes[:, prefix:].to(patches)
        mean = (patches * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return torch.cat([tokens[:, 0], mean], 1)


def timm_features(model: Any, sizes: Callable[[], Tensor | None] | None = None, prefix: int = 1) -> Function:
    """Features :func:`cls_and_mean` of a timm vision transformer, patched or not.

    Args:
        model: with ``forward_features``.
        sizes: called after each forward; the sizes ``[B, N]`` of the tokens that came out, or None.
        prefix: leading tokens that are no patches.
    """

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return cls_and_mean(tokens, None if sizes is None else sizes(), prefix)

    return features


def timm_patch_tokens(model: Any, restore: Function | None = None, prefix: int = 1) -> Function:
    """Patch tokens ``[B, N, C]`` of a timm vision transformer, in their grid.

    Args:
        model: with ``forward_features``.
        restore: called with the tokens that came out, to bring them back to the full number (unmerge).
        prefix: leading tokens of the restored ones that are no patches.
    """

    def patch_tokens(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return (tokens if restore is None else restore(tokens))[:, prefix:]

    return patch_tokens


@torch.inference_mode()
def collect(function: Function, images: Tensor, batch: int = 50, device: torch.device | str = "cpu") -> Tensor:
    """Run a callable over many pictures.

    Args:
        function: from ``[B, 3, H, W]`` to ``[B, ...]``.
        images: ``[N, 3, H, W]``; uint8 ones are normalised batch by batch, others are passed on as they are.
        batch: pictures at a time.
        device: where the batches are put.

    Returns:
        ``[N, ...]`` float32 on the CPU.
    """
    out = []
    for part in images.split(batch):
        moved = part.to(device)
        out.append(function(normalise(moved) if moved.dtype == torch.uint8 else moved).float().cpu())
    return torch.cat(out)


def _collected(source: Source, images: Tensor, batch: int, device: torch.device | str) -> Tensor:
    if isinstance(source, Tensor):
        if len(source) != len(images):
            raise ValueError(f"{len(source)} collected rows were given for {len(images)} pictures")
        return source
    return collect(source, images, batch, device)


class ProbeScore(NamedTuple):
    """Share of right answers, the share of the largest class (what a blind guess reaches), and the pictures' number."""

    top1: float
    chance: float
    pictures: int


def fit_probe(
    features: Source, data: Labelled, strength: float = 0.003, batch: int = 50, device: torch.device | str = "cpu"
) -> Probe:
    """Logistic regression on standardised features; the same data gives the same probe.

    Args:
        features: of the unpatched model, ``[B, F]`` a batch.
        data: pictures and labels to train on.
        strength: inverse of the penalty on the weights (``C`` of scikit-learn); the default is the best of five-fold
            cross-validation on 1,000 pictures of textile.
        batch: pictures at a time.
        device: where the batches are put.
    """
    return probes.fit(_collected(features, data.images, batch, device), data.labels, strength=strength)


def score_probe(
    probe: Probe, features: Source, data: Labelled, batch: int = 50, device: torch.device | str = "cpu"
) -> ProbeScore:
    """Top-1 of a probe on the features of any model, patched or not.

    Args:
        probe: fitted on features of the unpatched model.
        features: ``[B, F]`` a batch.
        data: pictures and labels to test on.
        batch: pictures at a time.
        device: where the batches are put.
    """
    answers = probe.logits(_collected(features, data.images, batch, device)).argmax(1)
    top1 = (answers == data.labels).float().mean().item()
    return ProbeScore(top1, data.labels.bincount().max().item() / len(data.labels), len(data.labels))


class Cosine(NamedTuple):
    """Cosine of features, patched against unpatched: its mean over pictures, and the lowest."""

    mean: float
    lowest: float


def feature_cosine(
    reference: Source, patched: Source, images: Tensor, batch: int = 50, device: torch.device | str = "cpu"
) -> Cosine:
    """How well the features of a patched model point where those of the unpatched one do.

    Args:
        reference: features of the unpatched model, ``[B, F]`` a batch.
        patched: features of the patched one.
        images: ``[N, 3, H, W]``.
        batch: pictures at a time.
        device: where the batches are put.
    """
    a, b = (_collected(s, images, batch, device) for s in (reference, patched))
    cosine = F.cosine_similarity(a, b, dim=1)
    return Cosine(cosine.mean().item(), cosine.min().item())


class MapError(NamedTuple):
    """A dense map against its reference: mean absolute error, and means over pictures of Pearson's correlation and of
    the intersection over union of what exceeds the threshold."""

    mae: float
    correlation: float
    iou: float


def map_error(reference: Tensor, patched: Tensor, threshold: float = 0.5) -> MapError:
    """Compare maps ``[N, 1, S, S]`` in 0..1. A map that is the same everywhere correlates with nothing (0)."""
    a, b = reference.flatten(1), patched.flatten(1)
    centred_a, centred_b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = (centred_a.norm(dim=1) * centred_b.norm(dim=1)).clamp_min(1e-12)
    above_a, above_b = a > threshold, b > threshold
    both, either = (above_a & above_b).sum(1), (above_a | above_b).sum(1)
    iou = torch.where(either > 0, both / either.clamp_min(1), 1.0)
    correlation = ((centred_a * centred_b).sum(1) / scale).mean().item()
    return MapError((a - b).abs().mean().item(), correlation, iou.mean().item())


def saliency_error(
    reference: Source,
    patched: Source,
    head: Callable[[Tensor, int], Tensor],
    images: Tensor,
    batch: int = 10,
    device: torch.device | str = "cpu",
) -> MapError:
    """Error of the saliency map that is read off restored tokens, against the map of the unpatched model.

    Args:
        reference: patch tokens of the unpatched model, ``[B, G * G, C]`` a batch.
        patched: patch tokens of the patched one, restored to their grid.
        head: such as ``dinov2.load_saliency_head()``, on the CPU: tokens and a size to maps ``[B, 1, size, size]``.
        images: ``[N, 3, S, S]``; the maps have their size.
        batch: pictures at a time.
        device: where the batches of pictures are put.
    """

    @torch.inference_mode()
    def maps(source: Source) -> Tensor:
        tokens = _collected(source, images, batch, device)
        return torch.cat([head(part, images.shape[-1]) for part in tokens.split(batch)])

    return map_error(maps(reference), maps(patched))
