"""Outputs of runs that are no tensors: texts that a model generated, with their lengths."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Generated(NamedTuple):
    """Answers of a batch.

    Attributes:
        ids: ``(B, n)`` generated tokens without the prompt, padded on the right.
        lengths: tokens that were generated for each sample, the end token included.
        texts: the answers as text, stripped; None where no tokenizer was given.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    texts: tuple[str, ...] | None = None
