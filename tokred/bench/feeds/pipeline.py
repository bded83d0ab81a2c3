"""``Pipeline``: pictures that a pipeline of diffusers, or any callable that holds modules, makes of prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokred.bench.feeds.feed import Feed, drawn
from tokred.bench.read import arguments

SEEDS = "seeds"  # of a batch's samples, by which both arms start from the same noise
FIELDS = ("images", "frames", "image")
BAR = "_progress_bar_config"


class Pipeline(Feed):
    """Pictures of prompts: texts, or a dictionary of the call's arguments; every sample has its own seed."""

    name = "pipeline"
    stages = ("attention",)
    usual = "psnr"

    def __init__(self, model: Any) -> None:
        function = model.forward if isinstance(model, torch.nn.Module) else model.__call__
        self.takes = set(inspect.signature(function).parameters)

    def prepare(self, item: Any, index: int = 0) -> dict[str, Any]:
        """The arguments of a call, with a seed a sample.

        Raises:
            TypeError: the item is neither a text, several, nor a dictionary.
        """
        if isinstance(item, str):
            item = {"prompt": [item]}
        elif isinstance(item, list | tuple) and item and all(isinstance(one, str) for one in item):
            item = {"prompt": list(item)}
        if not isinstance(item, Mapping):
            raise TypeError(
                "a batch of data for a pipeline is a prompt, a list of prompts, or a dict of the call's arguments, "
                f"got {type(item).__name__}"
            )
        batch = dict(item)
        given = batch.pop("generator", None)
        count = _samples(batch)
        if given is not None:
            # A generator has another state after each call: what it was seeded with is the same for all rows.
            several = given if isinstance(given, Sequence) else [given]
            batch[SEEDS] = [int(one.initial_seed()) for one in several]
        seeds = batch.get(SEEDS, batch.pop("seed", None))
        if seeds is None:
            seeds = [1000 * index + i for i in range(count)]
        batch[SEEDS] = [int(one) for one in (seeds if isinstance(seeds, Sequence) else torch.as_tensor(seeds).view(-1))]
        return batch

    def run(self, model: Any, batch: Any) -> Any:
        given = arguments(batch)
        seeds = given.pop(SEEDS)
        if "generator" in self.takes:
            made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            given["generator"] = made if len(made) > 1 else made[0]
        if "output_type" in self.takes:
            given = {"output_type": "pt", **given}
        with drawn(seeds[0]):  # of whatever draws from torch itself
            return model(**given)

    def finish(self, model: Any, output: Any, batch: Any) -> Tensor:
        """Pictures ``(B, C, H, W)`` in [0, 1]; the frames of a clip stand below one another.

        Raises:
            TypeError: there are none in the output.
        """
        return pictures(output)

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """The pipeline's own progress bars are off meanwhile."""
        silence = getattr(model, "set_progress_bar_config", None)
        before = getattr(model, BAR, None)
        if silence is not None:
            silence(disable=True)
        try:
            yield
        finally:
            if silence is not None:
                if before is None:
                    vars(model).pop(BAR, None)
                else:
                    setattr(model, BAR, before)

    def probe(self, model: Any, batch: Any) -> int:
        """One sample, where the arguments can be cut to one."""
        cut = _first(batch)
        self.run(model, cut)
        return _samples(cut)


def _per_sample(batch: Mapping[str, Any]) -> tuple[int, set[str]]:
    """How many prompts, or classes, a batch has, and the names of the lists that have one for each."""
    lists = {k: len(v) for k, v in batch.items() if isinstance(v, list | tuple) and k != SEEDS}
    count = next((lists[k] for k in ("prompt", *lists) if k in lists), 1)
    return count, {k for k, n in lists.items() if n == count}


def _samples(batch: Mapping[str, Any]) -> int:
    """Pictures that a call makes."""
    count = _per_sample(batch)[0] * int(batch.get("batch_size", 1))
    return count * int(batch.get("num_images_per_prompt") or 1)


def _first(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its first sample alone; whole where tensors may belong to the samples as well."""
    count, names = _per_sample(batch)
    if any(isinstance(value, Tensor) for value in batch.values()):
        return dict(batch)
    cut = {k: v[:1] if k in names and count > 1 else v for k, v in batch.items()}
    if "batch_size" in cut:
        cut["batch_size"] = 1
    return {**cut, SEEDS: batch[SEEDS][: _samples(cut)]}


def pictures(output: Any) -> Tensor:
    """Pictures ``(B, C, H, W)`` in [0, 1] of an output: of tensors, arrays, pictures of PIL, or a record of them.

    Raises:
        TypeError: it is none of these.
    """
    for name in FIELDS:
        output = getattr(output, name, output)
    if isinstance(output, list | tuple) and output:
        if isinstance(output[0], list | tuple):  # the frames of clips
            return torch.stack([torch.cat([*pictures(clip)], 1) for clip in output])
        if hasattr(output[0], "convert"):
            return torch.stack([_of_pil(one) for one in output])
        output = torch.stack([torch.as_tensor(one) for one in output]) if _arrays(output) else output[0]
    if hasattr(output, "__array__") and not isinstance(output, Tensor):
        output = torch.as_tensor(output).movedim(-1, -3)
    if not isinstance(output, Tensor):
        raise TypeError(f"run='pipeline' reads pictures, and the output is {type(output).__name__}")
    if output.ndim == 5:  # (B, F, C, H, W)
        output = output.transpose(1, 2).flatten(2, 3)
    values: Tensor = output.float()
    return values


def _arrays(values: Sequence[Any]) -> bool:
    return all(hasattr(one, "ndim") and one.ndim == 3 for one in values)


def _of_pil(picture: Any) -> Tensor:
    kind = "L" if picture.mode in ("L", "1") else "RGB"
    raw = torch.frombuffer(bytearray(picture.convert(kind).tobytes()), dtype=torch.uint8)
    wide, high = picture.size
    found: Tensor = raw.view(high, wide, -1).permute(2, 0, 1).float() / 255
    return found
