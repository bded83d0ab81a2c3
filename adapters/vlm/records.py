"""Records of features: made by call-through wrappers of the feature getters, and found again for features that a
forward is given. Those may have been made outside of it (``generate`` does so), and on the way wrappers of modules move
them to other devices or rebuild the object that they came in."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tokred.adapters.contract import parameters_at_hand
from tokred.adapters.swap import Standin
from tokred.adapters.vlm.features import Record, Tap, local

# Outputs of feature getters, and the tensors in them, to their records.
_KNOWN: Any = WeakIdKeyDictionary()
# Channels that tell tokens apart.
_CHANNELS = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Getter(Standin):
    """Stands in for a feature getter of one model; an object on the instance, so that models copy and pickle.

    Args:
        core: the model.
        name: of the method.
        modality: "image" or "video".
        describe: makes the record: ``describe(core, arguments, output, tap, modality)``.
    """

    def __init__(self, core: nn.Module, name: str, modality: str, describe: Callable[..., Record | None]) -> None:
        self.core = core
        self.name = name
        self.modality = modality
        self.describe = describe

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(getattr(type(self.core), self.name)).parameters.values())[1:]
        return inspect.Signature(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(local, "tap", None)
        tap = local.tap = Tap()
        try:
            output = getattr(type(self.core), self.name)(self.core, *args, **kwargs)
        finally:
            local.tap = before
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if hasattr(output, "pooler_output"):
            record = self.describe(self.core, given, output, tap, self.modality)
            call = getattr(local, "call", None)
            if call is not None and call[0] is self.core:
                call[1].records[self.modality] = record
            else:
                remember(self.core, self.modality, output, record)
        return output


def remember(core: nn.Module, modality: str, output: Any, record: Record | None) -> None:
    """Note what a feature getter gave; the last one of each thread is known by its values too."""
    if record is None:
        return
    features = list(output.pooler_output)
    for key in (output, output.pooler_output, *features[:1]):
        if isinstance(key, Tensor) or key is output:
            _KNOWN[key] = record
    record.marks = marks(_entering(core, record, features), _dtype(core)) if features else None
    last = getattr(local, "last", None)
    if last is None:
        last = local.last = weakref.WeakKeyDictionary()
    last.setdefault(core, {})[modality] = record


def _entering(core: Any, record: Record, features: list[Tensor]) -> Tensor:
    """``(T, C)`` the features as they enter the prompt, and the newline where the forward puts it behind them."""
    rows = torch.cat([one.flatten(0, -2) for one in features])
    if sum(p.tokens for p in record.pictures) == len(rows):
        return rows
    with parameters_at_hand(core):
        newline: Tensor = core.image_newline
        # Without it, embeddings that hold it are refused as unknown.
        return rows if newline.is_meta else torch.cat([rows, newline.detach()[None].to(rows)])


def record_of(core: nn.Module, modality: str, output: Any) -> Record | None:
    """The record of features that a forward was given; None where the patched model did not make them.

    Args:
        core: the model with vision.
        modality: of the features.
        output: what holds them, with ``pooler_output``.
    """
    features = list(output.pooler_output)
    for key in (output, output.pooler_output, *features[:1]):
        if (isinstance(key, Tensor) or key is output) and key in _KNOWN:
            found: Record = _KNOWN[key]
            return found
    record = last_record(core, modality)
    if record is None or record.marks is None or not features:
        return None
    given = marks(torch.cat([one.flatten(0, -2) for one in features]), _dtype(core))
    fits = len(given) % len(record.marks) == 0 and bool(torch.isin(given, record.marks.to(given.device)).all())
    return record if fits else None


def last_record(core: nn.Module, modality: str) -> Record | None:
    """The record of the features that this thread made last."""
    found: Any = getattr(local, "last", None)
    return None if found is None else found.get(core, {}).get(modality)


def marks(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``(...,)`` int64: a number for each row of ``(..., C)``, by its bits in ``dtype``: the same one for like rows."""
    rows = rows.detach()[..., :_CHANNELS].to(dtype).contiguous()
    bits = rows.view(_BITS[dtype.itemsize]).long()
    # Powers of an odd number, modulo 2^64.
    weights = torch.full((bits.shape[-1],), 6364136223846793005, device=rows.device).cumprod(0)
    return (bits * weights).sum(-1)


def _dtype(core: Any) -> torch.dtype:
    """The type in which features stand among the embeddings."""
    found: torch.dtype = core.get_input_embeddings().weight.dtype
    return found
