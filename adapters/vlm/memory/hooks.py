"""Hooks on an encoder that reads the prompt, on its embedding of positions, and on the decoder that reads its memory.

Rows of the memory that hold no token, in samples that have fewer left than others, are zeros, and tell the decoder so
by that: between encoder and decoder stands ``generate``, which repeats samples, reorders them, and hands on the mask of
a prompt that was longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.swap import Hook
from tokred.adapters.vlm.columns import gather_columns
from tokred.adapters.vlm.forward import Forward
from tokred.adapters.vlm.hooks import VisualSettings
from tokred.adapters.vlm.taps import in_flight


class TakePositions(Hook):
    """Hook before the encoder's forward, behind that in which tokens leave: it takes no positions, and would hand them
    on to its layers."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        run = in_flight.language
        if run is None or run.module is not module or run.forward.packed is None:
            return None
        new = dict(kwargs)
        run.forward.positions = words.POSITIONS.pop(new)
        return args, new


class AllPositions(Hook):
    """Hook before the embedding of positions, which counts from the first token on: it is asked for the whole
    prompt's."""

    def __init__(self, settings: VisualSettings) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        forward = _shortened(self.settings)
        # Nothing but the shape of what it is given matters.
        return None if forward is None else (args[0].new_zeros(1, forward.length), *args[1:])


class OwnPositions(Hook):
    """Hook after that embedding: each token that is left gets its own."""

    def __init__(self, settings: VisualSettings) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        forward = _shortened(self.settings)
        if forward is None or forward.positions is None:
            return None
        return gather_columns(output, forward.positions.to(output.device))


def _shortened(settings: VisualSettings) -> Forward | None:
    """The forward of a model's encoder that is under way, where it runs on fewer tokens than its prompt has."""
    run = in_flight.language
    forward = None if run is None else run.forward
    return forward if forward is not None and forward.settings is settings and forward.positions is not None else None


class LeaveEncoder(Hook):
    """Hook after the encoder's forward: rows without a token become zeros."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run = in_flight.language
        packed = None if run is None or run.module is not module else run.forward.packed
        if packed is None or not packed.ragged:
            return None
        states = output[0]
        states = states.masked_fill(~packed.valid.to(states.device).unsqueeze(-1), 0)
        if not isinstance(output, dict):
            return (states, *output[1:])
        words.LAST.put(output, states)
        return output


class EnterReader(Hook):
    """Hook before the decoder's forward: it sees the rows of the memory that hold a token.

    Args:
        names: of the forward's arguments.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        memory, mask = words.MEMORY.of(given), words.MEMORY_MASK.of(given)
        new = None if memory is None else mask_of(memory, mask)
        if new is None:
            return None
        words.MEMORY_MASK.put(given, new, self.names)
        return (), given


def mask_of(memory: Tensor, mask: Tensor | None) -> Tensor | None:
    """``(B, M)``: the mask of a memory, in the type of the one that was given; None: that one is right.

    Args:
        memory: ``(B, M, C)``, zeros where a row holds no token.
        mask: ``(B, L)`` of the prompt, of which the memory may hold fewer tokens; or None.

    Raises:
        ValueError: the prompt has lost tokens, and its mask is one for pairs of them.
    """
    real = (memory != 0).any(-1)
    if mask is None:
        # A mask that hides nothing is none for the host: kernels differ by whether there is one.
        return None if not torch.compiler.is_compiling() and bool(real.all()) else real
    if mask.ndim != 2:
        if mask.shape[-1] == memory.shape[1] and bool(real.all()):
            return None
        raise ValueError(
            "a mask for each pair of tokens does not fit a prompt that was pruned: give attention_mask as [B, L] with "
            "zeros on padding, or none"
        )
    real = real.to(mask)
    if memory.shape[1] < mask.shape[1]:
        return real
    # Of like lengths, it may be that one sample has kept all: then the others have rows of zeros. Not asked in Python,
    # which would wait for the device at every step.
    return torch.where(real.all(), mask, real) if memory.shape[1] == mask.shape[1] else None
