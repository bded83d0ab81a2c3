"""``READY``: metrics that :func:`tokred.benchmark` knows by name; each states what it reads and what it compares with.

Most are torchmetrics' functions, taken sample by sample, so that intervals and paired differences exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.bench import probe, texts
from tokred.bench.feeds.batches import fingerprint, leaves
from tokred.bench.outputs import Generated
from tokred.bench.read import DENSE, answer, images, key_of_references, labels, references
from tokred.bench.read import texts as texts_of

Better = Literal["higher", "lower"]
SAME = 100.0  # dB of two images that are the same, whose ratio of signal to noise has no bound
IGNORED = 255  # of label maps: no class
WINDOW = 11  # pixels of the window of SSIM


class Scores(NamedTuple):
    """Values of the samples of a batch, and their weights; None: all the same."""

    values: Sequence[float]
    weights: Sequence[float] | None = None


Each = Callable[[Any, Any, Any], Scores]


@dataclass(frozen=True)
class Ready:
    """A metric that is there by its name.

    Attributes:
        doc: what the values are.
        reads: of the output: ``"tensors"``, ``"images"`` in [0, 1], ``"texts"``, or ``"losses"`` of a text's tokens.
        against: ``"labels"``; ``"dense"``, the unpatched model's output of the same batch; ``"references"``, the
            batch's right texts, or the unpatched model's where there are none; or empty.
        each: scores of an output, a batch and the unpatched model's output.
        better: the direction that is good.
        unit: ``"share"`` of one, which is shown in per cent; else what the numbers are.
        ends: between which values lie.
        check: raises what is missing before anything is measured.
        fit: of a metric that is fitted to the unpatched model: what it notes of each output and batch, and the scores
            that it makes of all notes; None: of others.
    """

    doc: str
    reads: Literal["tensors", "images", "texts", "losses"]
    against: Literal["labels", "dense", "references", ""]
    each: Each
    better: Better = "higher"
    unit: str = "share"
    ends: tuple[float, float] = (0.0, 1.0)
    check: Callable[[], object] = lambda: None
    fit: tuple[Callable[[Any, Any], Any], Callable[[Sequence[Any]], Each]] | None = None

    def compared(self, batch: Any) -> str:
        """Words for its references: the labels, a key of the batch, the unpatched model, or empty."""
        if self.against == "references":
            return key_of_references(batch) or DENSE
        return {"labels": "labels", "dense": DENSE, "": ""}[self.against]


def need_torchmetrics() -> None:
    """Import it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise ImportError("this metric needs torchmetrics: pip install 'tokred[bench]'") from error


# ---------------------------------------------------------------------------------------------- tensors


def _same_shape(output: Any, dense: Any, read: Callable[[Any], Tensor] = answer) -> tuple[Tensor, Tensor]:
    a, b = read(output), read(dense)
    if a.shape != b.shape:
        raise ValueError(
            f"the output is {tuple(a.shape)} and the unpatched model's {tuple(b.shape)}, which no value-by-value "
            "metric compares: give metric=a function of (output, batch)"
        )
    return a, b


def _classes(x: Tensor) -> int:
    """The dimension of the classes: the second of maps ``(B, C, H, W)``, else the last."""
    return 1 if x.ndim == 4 else -1


def _each(x: Tensor) -> Scores:
    """Means over all but the first dimension."""
    return Scores((x.double().flatten(1).mean(1) if x.ndim > 1 else x.double()).tolist())


def _top(k: int) -> Callable[[Any, Any, Any], Scores]:
    def hits(output: Any, batch: Any, dense: Any) -> Scores:
        logits = answer(output)
        right = _right(logits, labels(batch))
        best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
        return _each((best == right.to(best.device).unsqueeze(-1)).any(-1))

    return hits


def _right(logits: Tensor, right: Tensor) -> Tensor:
    """Labels in the shape of their logits without its last dimension; both may have dimensions of one more.

    Raises:
        ValueError: there are not as many, as of one-hot labels, or some are no class of the logits.
    """
    shape, classes = logits.shape[:-1], logits.shape[-1]
    if [n for n in right.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(
            f"this metric reads logits (B, classes) and labels (B,), got {tuple(logits.shape)} and "
            f"{tuple(right.shape)}: of one-hot or soft labels give labels.argmax(-1)"
        )
    bad = right[(right < 0) | (right >= classes) | (right != right.long())]
    if len(bad):
        raise ValueError(
            f"labels are classes from 0 to {classes - 1}, as many as logits {tuple(logits.shape)} have, got "
            f"{bad[0]:g}: leave samples without a class out of data, or give metric=a function of (output, batch)"
        )
    return right.reshape(shape)


# A probe is fitted before it scores: see :class:`tokred.bench.probe.Crossed`.
def _unfitted(output: Any, batch: Any, dense: Any) -> Scores:
    raise ValueError("metric='probe' is fitted to the unpatched model's features, which tokred.benchmark alone does")


def _noted(output: Any, batch: Any) -> probe.Seen:
    features, right = answer(output), labels(batch)
    if features.ndim != 2 or right.ndim != 1 or len(features) != len(right):
        raise ValueError(
            f"metric='probe' reads features (B, F) and labels (B,), got {tuple(features.shape)} and "
            f"{tuple(right.shape)}: give read='features', or read=a function of (output, batch) that returns them"
        )
    return probe.Seen(fingerprint(leaves(batch)), features.float().cpu(), right.cpu())


def _crossed(seen: Sequence[probe.Seen]) -> Each:
    return partial(_probed, probe.crossed(seen))


def _probed(fitted: probe.Crossed, output: Any, batch: Any, dense: Any) -> Scores:
    return _each(fitted.right(_noted(output, batch)))


def _agreement(output: Any, batch: Any, dense: Any) -> Scores:
    if isinstance(output, Generated):
        return Scores([float(a == b) for a, b in zip(_said(output), _said(dense), strict=True)])
    a, b = _same_shape(output, dense)
    return _each(a.argmax(_classes(a)) == b.argmax(_classes(b)))


def _said(output: Generated) -> list[list[int]]:
    return [row[:n] for row, n in zip(output.ids.tolist(), output.lengths, strict=True)]


def _cosine(output: Any, batch: Any, dense: Any) -> Scores:
    a, b = _same_shape(output, dense)
    return _each(F.cosine_similarity(a.double(), b.double(), dim=_classes(a)))


def _loss(output: Any, batch: Any, dense: Any) -> Scores:
    """Mean negative log-likelihood of the last tokens of each text, which the logits are about; tokens are weights."""
    logits = answer(output).float()
    target = batch["input_ids"][:, -logits.shape[1] :].to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    return Scores(_each(losses).values, [float(logits.shape[1])] * len(logits))


def _miou(output: Any, batch: Any, dense: Any) -> Scores:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    logits, right = answer(output), labels(batch)
    if logits.ndim != 4 or right.ndim != 3 or len(logits) != len(right):
        raise ValueError(
            f"metric='miou' reads logits (B, classes, H, W) and labels (B, H, W), got {tuple(logits.shape)} and "
            f"{tuple(right.shape)}"
        )
    if logits.shape[2:] != right.shape[1:]:  # segmentation heads answer at a quarter of the size
        logits = F.interpolate(logits.float(), right.shape[1:], mode="bilinear", align_corners=False)
    found, classes = logits.argmax(1).cpu(), logits.shape[1]
    right = right.cpu().long()
    values, weights = [], []
    for a, b in zip(found, right, strict=True):
        seen = bool((b != IGNORED).any())
        value = multiclass_jaccard_index(a[None], b[None], classes, ignore_index=IGNORED) if seen else 0.0
        values.append(float(value))
        weights.append(float(seen))
    if not any(weights):
        raise ValueError(f"the label maps of a batch are {IGNORED} everywhere: there is nothing to compare")
    return Scores(values, weights if not all(weights) else None)


# ---------------------------------------------------------------------------------------------- images


def _psnr(output: Any, batch: Any, dense: Any) -> Scores:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _same_shape(output, dense, images)
    found = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return Scores(found.clamp(max=SAME).tolist())


def _ssim(output: Any, batch: Any, dense: Any) -> Scores:
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _same_shape(output, dense, images)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"metric='ssim' looks through windows of {WINDOW} pixels, and the images are {a.shape[2:]}")
    found: Any = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return Scores(found.reshape(-1).tolist())


def _lpips(output: Any, batch: Any, dense: Any) -> Scores:
    a, b = _same_shape(output, dense, images)
    if a.shape[1] != 3:
        raise ValueError(f"metric='lpips' reads images of three channels, got {a.shape[1]}")
    judge = _judge().to(a.device)
    return Scores([float(judge(x[None].float(), y[None].float())) for x, y in zip(a, b, strict=True)])


@cache
def _judge() -> Any:
    """The network that LPIPS compares by.

    Raises:
        ImportError: torchmetrics or torchvision is not installed.
        ValueError: its weights are not there and cannot be fetched.
    """
    need_torchmetrics()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
    except ImportError as error:
        raise ImportError("metric='lpips' needs torchvision: pip install 'tokred[bench]'") from error
    except Exception as error:
        # Whatever a download fails by: no network, a proxy's page instead of the file, a full disk.
        raise ValueError(
            f"metric='lpips' compares by AlexNet, whose weights could not be had ({error}). Put the file that "
            f"torchvision fetches, alexnet-owt-7be5be79.pth, into {torch.hub.get_dir()}/checkpoints, or take "
            "metric='ssim', which needs none"
        ) from error


# ------------------------------------------------------------------------------------------------ texts


def _text(score: Callable[[str, list[str]], tuple[float, float]]) -> Callable[[Any, Any, Any], Scores]:
    """A score of a text beside the right ones, a sample at a time."""

    def each(output: Any, batch: Any, dense: Any) -> Scores:
        said = texts_of(output)
        right = references(batch, len(said)) or [[one] for one in texts_of(dense)]
        found = [score(a, b) for a, b in zip(said, right, strict=True)]
        weights = [weight for _, weight in found]
        return Scores([value for value, _ in found], None if set(weights) == {1.0} else weights)

    return each


READY: Mapping[str, Ready] = {
    "top1": Ready("right answers", "tensors", "labels", _top(1)),
    "top5": Ready("right answers among the five likeliest", "tensors", "labels", _top(5)),
    "agreement": Ready("answers that are the unpatched model's", "tensors", "dense", _agreement),
    "cosine": Ready("cosine to the unpatched model's output", "tensors", "dense", _cosine, unit="cosine",
                    ends=(-1.0, 1.0)),
    "probe": Ready("right answers of a linear probe, fitted to the unpatched model's features of the other half of the "
                   "samples", "tensors", "labels", _unfitted, check=probe.linear_models, fit=(_noted, _crossed)),
    "miou": Ready("overlap of maps of classes with the labels' maps, mean over the classes of each sample; labels of "
                  f"{IGNORED} are no class", "tensors", "labels", _miou, check=need_torchmetrics),
    "perplexity": Ready("perplexity of the tokens that are scored", "losses", "", _loss, "lower", "perplexity",
                        (0.0, math.inf)),
    "psnr": Ready(f"ratio of signal to noise beside the unpatched model's images; {SAME:.0f} dB of the same image",
                  "images", "dense", _psnr, unit="dB", ends=(-math.inf, SAME), check=need_torchmetrics),
    "ssim": Ready("structural similarity to the unpatched model's images", "images", "dense", _ssim, unit="similarity",
                  ends=(-1.0, 1.0), check=need_torchmetrics),
    "lpips": Ready("distance of AlexNet's features to those of the unpatched model's images", "images", "dense", _lpips,
                   "lower", "distance", (0.0, math.inf), _judge),
    "exact": Ready("answers that equal a right one, but for case, punctuation and articles", "texts", "references",
                   _text(texts.exact)),
    "contains": Ready("answers in which a right one occurs", "texts", "references", _text(texts.contains)),
    "contains_all": Ready("right ones that occur in the answer", "texts", "references", _text(texts.contains_all)),
    "overlap": Ready("longest common subsequence of words (ROUGE-L, F1)", "texts", "references", _text(texts.overlap),
                     check=need_torchmetrics),
    "wer": Ready("wrong words over words of the references, of all samples together", "texts", "references",
                 _text(texts.word_errors), "lower", ends=(0.0, math.inf), check=need_torchmetrics),
}  # fmt: skip
