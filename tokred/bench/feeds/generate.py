"""``Generate``: answers that a model writes, of language models, models with vision, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokred.bench.feeds.batches import tensors
from tokred.bench.feeds.feed import Feed, drawn
from tokred.bench.feeds.reader import Reader
from tokred.bench.outputs import Generated
from tokred.bench.read import arguments, samples

NEW = 32  # tokens of an answer, where nobody says how many
SEED = 0  # of models that sample: both arms draw alike


class Generate(Feed):
    """Answers to a dictionary of ``generate``'s arguments, greedy unless the batch says otherwise.

    Args:
        tokenizer: or a processor: makes ids of prompts that are texts, and texts of answers; None: neither.
        max_new_tokens: of an answer; None: as the batch, or else the model's generation config says, or else 32.
        main: the model's name of a tensor that is given alone.
    """

    name = "generate"
    stages = ("block", "projector", "layer", "cache")

    def __init__(self, tokenizer: Any = None, max_new_tokens: int | None = None, main: str = "input_ids") -> None:
        self.reader, self.new = Reader(tokenizer, main), max_new_tokens

    @property
    def settings(self) -> str:
        """The most tokens of an answer."""
        return f"max_new_tokens={self.new}"

    def prepare(self, item: Any, index: int = 0) -> dict[str, Any]:
        """A dictionary of ``generate``'s arguments, and labels.

        Raises:
            TypeError, ValueError: there is no tensor in it, or texts without a tokenizer.
        """
        batch = self.reader.read(item)
        if not any(True for _ in tensors(arguments(batch))):
            raise TypeError(
                f"a batch of data for run='generate' is a dict of generate's arguments, such as 'input_ids', with "
                f"'labels' or 'answers' beside them, got {type(item).__name__} without a tensor among them"
            )
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and "input_ids" in batch and not bool(mask[:, -1].all()):
            raise ValueError("attention_mask: prompts are padded on the left, so that answers stand behind them")
        return batch

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """Where a number of tokens is asked for, no longest text of the model's own, of which each call would warn."""
        config = getattr(model, "generation_config", None)
        before = getattr(config, "max_length", None)
        if self.new is None or config is None or before is None:
            yield
            return
        config.max_length = None
        try:
            yield
        finally:
            config.max_length = before

    def run(self, model: Any, batch: Any) -> Any:
        return self._generate(model, batch)

    def _generate(self, model: Any, batch: Mapping[str, Any], **more: Any) -> Any:
        given = {"do_sample": False, **arguments(batch)}
        if self.new is not None:
            given["max_new_tokens"] = self.new
        elif not given.keys() & {"max_new_tokens", "max_length"} and not _limited(model):
            given["max_new_tokens"] = NEW
        given |= more
        if "max_new_tokens" in given:
            given.setdefault("max_length", None)  # transformers warns of the two together at every call
        if not given["do_sample"]:
            return model.generate(**given)
        with drawn(SEED):
            return model.generate(**given)

    def finish(self, model: Any, output: Any, batch: Any) -> Generated:
        """The answers without their prompts, and without fillers."""
        ids: Tensor = output if isinstance(output, Tensor) else output["sequences"]
        prompt = _prompt(model, batch, len(ids))
        n = 0 if prompt is None else prompt.shape[1]
        # Some models return the answer alone: Whisper, and whatever was given embeddings.
        if prompt is not None and ids.shape[1] >= n and torch.equal(ids[:, :n], prompt.to(ids)):
            ids = ids[:, n:]
        config = model.generation_config
        ends, pad = (batch.get(k, getattr(config, k, None)) for k in ("eos_token_id", "pad_token_id"))
        ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
        rows = ids.tolist()
        lengths = tuple(_length(row, ends, pad) for row in rows)
        texts = self.reader.texts([row[:k] for row, k in zip(rows, lengths, strict=True)])
        return Generated(ids[:, : max(lengths)], lengths, texts)

    def probe(self, model: Any, batch: Any) -> int:
        """The prompt, and one token."""
        given = {name: value for name, value in batch.items() if name not in ("max_length", "min_new_tokens")}
        self._generate(model, given, max_new_tokens=1)
        return samples(batch)


def _limited(model: Any) -> bool:
    """True if the model's own settings say how long an answer may be; transformers' own default says nothing."""
    config = getattr(model, "generation_config", None)
    longest = getattr(config, "max_length", None)
    return bool(getattr(config, "max_new_tokens", None)) or longest not in (None, 20)


def _prompt(model: Any, batch: Mapping[str, Any], count: int) -> Tensor | None:
    """The tokens that an answer begins behind; of an encoder-decoder those of the decoder."""
    if not model.config.is_encoder_decoder:
        return batch.get("input_ids")
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    given: Tensor | None = batch.get("decoder_input_ids")
    return torch.full((count, 1), start) if given is None and start is not None else given


def _length(row: list[int], ends: list[int], pad: int | None) -> int:
    """Tokens up to the first end token, which counts; without one, all but the fillers at the end."""
    first = next((i for i, token in enumerate(row) if token in ends), None)
    if first is not None:
        return first + 1
    n = len(row)
    while n and row[n - 1] == pad:
        n -= 1
    return n
