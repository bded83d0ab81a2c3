"""``Reader``: items of the user's data as dictionaries of ``generate``'s arguments, and ids as texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PROMPTS, IMAGES, SOUNDS = ("prompt", "prompts"), ("image", "images"), ("audio", "audios")


class Reader:
    """Texts to ids and back, by the user's tokenizer or processor, where there is one.

    Args:
        tokenizer: of transformers, or a processor that holds one; None: data are ids, and answers stay ids.
        main: the model's name of a tensor that is given alone.
    """

    def __init__(self, tokenizer: Any = None, main: str = "input_ids") -> None:
        self.tool, self.main = tokenizer, main

    def read(self, item: Any) -> dict[str, Any]:
        """The arguments of an item: a dictionary, ids, texts, or ``(arguments, answers)``.

        In a dictionary ``"prompt"`` holds a text or several, ``"images"`` their pictures and ``"audio"`` sounds, which
        the processor turns into tensors; everything else stays as it is.

        Raises:
            TypeError: it is none of these.
            ValueError: there are texts, pictures or sounds and no tokenizer or processor.
        """
        if isinstance(item, Mapping):
            return self._processed(dict(item))
        if isinstance(item, Tensor):
            return {self.main: item if item.ndim > 1 else item[None]}
        if isinstance(item, str) or (isinstance(item, list | tuple) and item and isinstance(item[0], str)):
            if isinstance(item, tuple) and len(item) == 2:
                return {**self.read(item[0]), "answers": [item[1]]}
            return self._processed({"prompt": item})
        if isinstance(item, list | tuple) and item and all(isinstance(i, int) for i in item):
            return {self.main: torch.tensor([item])}
        if isinstance(item, list | tuple) and len(item) == 2:
            first = self.read(item[0])
            return {**first, ("labels" if isinstance(item[1], Tensor) else "answers"): item[1]}
        raise TypeError(
            "a batch of data is a dict of generate's arguments, token ids (B, N), texts, or (one of these, answers), "
            f"got {type(item).__name__}"
        )

    def _processed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its texts, pictures and sounds as tensors."""
        found = {key: _taken(batch, names) for key, names in
                 (("text", PROMPTS), ("images", IMAGES), ("audio", SOUNDS))}  # fmt: skip
        given = {key: value for key, value in found.items() if value is not None}
        if not given:
            return batch
        if self.tool is None:
            raise ValueError(
                f"the batches of data have {' and '.join(given)}, and no tokenizer is given: give tokenizer=the "
                "model's tokenizer or processor, or tensors"
            )
        if "audio" in given:
            sounds = [_array(one) for one in given.pop("audio")]
            rate = getattr(getattr(self.tool, "feature_extractor", self.tool), "sampling_rate", None)
            made = self.tool(sounds, sampling_rate=rate, return_tensors="pt", **given)
        elif "images" in given:
            with self._left(len(given.get("text", ()))):
                made = self.tool(**given, padding=True, return_tensors="pt")
        else:
            made = self.ids(given["text"])
        return {**batch, **made}

    def ids(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(B, N)`` of texts, padded on the left."""
        tool = getattr(self.tool, "tokenizer", self.tool)
        with self._left(len(texts)):
            return dict(tool(list(texts), padding=len(texts) > 1, return_tensors="pt"))

    @contextmanager
    def _left(self, count: int) -> Iterator[None]:
        """The tokenizer pads on the left: with fillers behind a prompt, its answer would go on from those."""
        tool = getattr(self.tool, "tokenizer", self.tool)
        side, pad = tool.padding_side, tool.pad_token
        tool.padding_side = "left"
        if pad is None and count > 1:
            tool.pad_token = tool.eos_token
        try:
            yield
        finally:
            tool.padding_side = side
            if pad is None and count > 1:
                tool.pad_token = None

    def texts(self, ids: Sequence[Sequence[int]]) -> tuple[str, ...] | None:
        """Texts of ids; None without a tokenizer."""
        if self.tool is None:
            return None
        return tuple(text.strip() for text in self.tool.batch_decode(ids, skip_special_tokens=True))


def _taken(batch: dict[str, Any], names: Sequence[str]) -> list[Any] | None:
    """The first of these fields as a list, taken out of the batch; None where there is none, or tensors."""
    for name in names:
        if name in batch and not isinstance(batch[name], Tensor):
            found = batch.pop(name)
            return list(found) if isinstance(found, list | tuple) else [found]
    return None


def _array(sound: Any) -> Any:
    """Samples of a sound, which datasets wrap together with their rate."""
    return sound["array"] if isinstance(sound, Mapping) else sound
