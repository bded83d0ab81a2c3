"""Readings of metrics: of an output its tensor, images or texts; of a batch its labels, references and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.bench.outputs import Generated

LABELS = ("labels", "label")
# Keys of right answers as text, the most telling first.
REFERENCES = ("answers", "answer", "text", *LABELS)
GROUP = "group"
DENSE = "the unpatched model"
# Fields of a host's output, the most telling first.
FIELDS = ("logits", "pooler_output", "image_embeds", "image_features", "text_embeds", "last_hidden_state")
BEYOND = 1e-3  # by which rounding may carry an image's values out of [0, 1]


def _of(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _pair(batch: Any) -> Any:
    """The second part of ``(inputs, labels)``, or None."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


# ---------------------------------------------------------------------------------------------- outputs


def answer(output: Any) -> Tensor:
    """The tensor of an output that ready metrics compare: logits, else pooled features, else all tokens' features.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Generated):
        raise TypeError("the model generates, and this metric reads tensors: metrics of texts are 'exact', 'wer', ...")
    for name in FIELDS:
        if isinstance(found := _of(output, name), Tensor):
            return found
    if isinstance(output, tuple | list) and output:
        return answer(output[0])
    raise TypeError(
        f"the model returns {type(output).__name__}, in which there is none of {', '.join(FIELDS)}: "
        "give metric=a function of (output, batch)"
    )


def texts(output: Any) -> list[str]:
    """The texts of an output, one a sample: of :class:`~tokred.bench.outputs.Generated`, or strings.

    Raises:
        TypeError: there are none.
    """
    found = output.texts if isinstance(output, Generated) else output
    if isinstance(output, Generated) and found is None:
        raise TypeError("the model generates tokens without a text: give a tokenizer, by which metrics of texts read")
    if isinstance(found, Mapping):
        found = found.get("text")
    if isinstance(found, str):
        return [found]
    if isinstance(found, tuple | list) and found:
        parts = [one.get("text") if isinstance(one, Mapping) else one for one in found]
        strings = [part for part in parts if isinstance(part, str)]
        if len(strings) == len(parts):
            return strings
    raise TypeError(f"the model returns {type(output).__name__}, in which there is no text, which this metric reads")


def images(output: Any) -> Tensor:
    """The images of an output, ``(B, C, H, W)`` in [0, 1], in float32 or float64.

    Raises:
        TypeError: there are none.
        ValueError: values lie outside of [0, 1].
    """
    found = _of(output, "images") if not isinstance(output, Tensor) else output
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(f"the model returns {what}, and this metric reads images (B, C, H, W) in [0, 1]")
    low, high = float(found.min()), float(found.max())
    if low < -BEYOND or high > 1 + BEYOND:
        raise ValueError(
            f"this metric reads images in [0, 1], and the model returns values from {low:.3g} to {high:.3g}: give "
            "metric=a function of (output, batch), or 'cosine'"
        )
    return (found if found.element_size() > 2 else found.float()).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- batches


def labels(batch: Any) -> Tensor:
    """Labels ``(B,)``, or ``(B, H, W)`` of maps, of a batch: a tensor, an array, or whole numbers in lists.

    Raises:
        ValueError: it has none.
    """
    found = next((batch[k] for k in LABELS if k in batch), None) if isinstance(batch, Mapping) else _pair(batch)
    if _counted(found) or (hasattr(found, "__array__") and hasattr(found, "dtype")):
        found = torch.as_tensor(found)
    if not isinstance(found, Tensor):
        raise ValueError(
            "the batches of data have no labels, which this metric needs: give (inputs, labels) or a dict with "
            f"{LABELS[0]!r}, or metric='agreement', which needs none"
        )
    return found


def _counted(found: Any, inside: bool = False) -> bool:
    """True of a list of whole numbers, or of such lists."""
    if isinstance(found, tuple | list) and found:
        return all(_counted(x, True) for x in found)
    return inside and isinstance(found, int)


def key_of_references(batch: Any) -> str:
    """The key of a batch that holds right answers as text; ``"labels"`` of ``(inputs, labels)``; empty: none."""
    if isinstance(batch, Mapping):
        return next((name for name in REFERENCES if _wordy(batch.get(name))), "")
    return LABELS[0] if _wordy(_pair(batch)) else ""


def _wordy(found: Any) -> bool:
    """True of a text, of several, and of several a sample."""
    if isinstance(found, tuple | list) and found:
        return all(isinstance(x, str) or (isinstance(x, tuple | list) and x and _wordy(x)) for x in found)
    return isinstance(found, str)


def references(batch: Any, count: int) -> list[list[str]] | None:
    """For each of ``count`` samples the texts that are right; None where the batch has none.

    Raises:
        ValueError: there are not as many as samples.
    """
    name = key_of_references(batch)
    if not name:
        return None
    found = batch[name] if isinstance(batch, Mapping) else _pair(batch)
    found = [found] if isinstance(found, str) else list(found)
    if len(found) != count:
        raise ValueError(
            f"batch[{name!r}] has {len(found)} entries for {count} texts: give one a sample, which may be a list of "
            "several right ones"
        )
    return [[one] if isinstance(one, str) else list(one) for one in found]


def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward in a batch: what metrics alone read (labels, answers, groups) is left out."""
    # The key "text" holds references as strings; as a tensor it is an argument of dual encoders.
    aside = {GROUP, *REFERENCES} - {"text"}
    return {k: v for k, v in batch.items() if k not in aside and (k != "text" or isinstance(v, Tensor))}


def samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor; 1 where there is none."""
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return next((len(x) for x in items if isinstance(x, Tensor) and x.ndim), 1)


def groups(batch: Any, count: int) -> list[str]:
    """The key ``"group"`` of each of ``count`` values of a batch; empty where the batch has none.

    Raises:
        ValueError: there are neither as many keys as values, nor one key for the only value.
    """
    found = batch.get(GROUP) if isinstance(batch, Mapping) else None
    if found is None:
        return []
    if isinstance(found, Tensor):
        found = found.reshape(-1).tolist()
    keys = [str(key) for key in (found if isinstance(found, Sequence) and not isinstance(found, str) else [found])]
    if count == 1 and len(set(keys)) == 1:
        return keys[:1]
    if len(keys) != count:
        raise ValueError(
            f"batch[{GROUP!r}] has {len(keys)} keys and the metric {count} values: give a key a sample, and a metric "
            "that returns a number a sample"
        )
    return keys
