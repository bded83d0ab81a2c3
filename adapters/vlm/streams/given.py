"""Texts as users hand them to a stream, as ids or words, and models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words


def as_ids(text: object, argument: str, tokenizer: Any) -> Tensor:
    """``(n,)`` int64: a text as users give it: ids, or words where there is a tokenizer.

    Raises:
        TypeError: it is text and there is no tokenizer, or neither text nor ids.
        ValueError: several prompts.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError(f"{argument} is text: give tokred.stream(..., tokenizer=), or ids")
        text = tokenizer(text, **{words.MARKS.name: False})[words.INPUT_IDS.name]
    if isinstance(text, list | tuple) and all(type(one) is int for one in text):
        return torch.tensor(text, dtype=torch.long)
    if not isinstance(text, Tensor) or text.is_floating_point() or text.dtype == torch.bool:
        raise TypeError(f"{argument} must be ids (a tensor or a list of integers) or text, got {named(text)}")
    if text.ndim == 2 and len(text) == 1:
        text = text[0]
    if text.ndim != 1:
        raise ValueError(f"{argument} must be ids (n,) or (1, n), one stream at a time, got {tuple(text.shape)}")
    return text.long()


def ends_of(model: Any) -> frozenset[int]:
    """Ids that end a text."""
    found = words.ENDS.part(words.SETTINGS.part(model))
    return frozenset(() if found is None else (found,) if isinstance(found, int) else found)


def named(value: object) -> str:
    """A value in a message."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def module_of(model: object) -> nn.Module:
    """The model, as a module.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model with vision of transformers, got {named(model)}")
    return model
