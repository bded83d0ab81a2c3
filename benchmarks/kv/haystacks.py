"""Contexts of prose with a key hidden in them, for ``kv/quality``."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEPTHS = (0.1, 0.35, 0.6, 0.85)
QUESTION = " What is the pass key? The pass key is"


class Haystack(NamedTuple):
    """A context with a key in it."""

    context: Tensor
    question: Tensor
    key: str


def begin_of(tokenizer: Any) -> Tensor:
    """``[0 or 1]`` the id that a model wants in front of every text."""
    return torch.tensor(tokenizer("").input_ids, dtype=torch.long)


def haystacks(tokenizer: Any, text: Tensor, length: int, keys: int, seed: int = 0) -> list[list[Haystack]]:
    """For each depth ``keys`` contexts of ``length`` tokens, question included."""
    begin = begin_of(tokenizer)
    rng = random.Random(length + 1_000_003 * seed)
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False).input_ids[0]
    found = []
    for depth in DEPTHS:
        group = []
        for _ in range(keys):
            key = str(rng.randrange(10000, 100000))
            needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
            hidden = tokenizer(needle, return_tensors="pt", add_special_tokens=False).input_ids[0]
            room = length - len(begin) - len(hidden) - len(question)
            start = rng.randrange(0, len(text) - room)
            straw, cut = text[start : start + room], int(room * depth)
            group.append(Haystack(torch.cat([begin, straw[:cut], hidden, straw[cut:]]), question, key))
        found.append(group)
    return found
