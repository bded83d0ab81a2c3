"""The run that a pruned one has to equal: nothing leaves, but the same columns are masked, from the same layer on, with
the original positions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tokred.adapters.contract import cache_of, host_object
from tokred.adapters.vlm.tokens.recorded import track_of

Keeps = dict[int, Tensor]


def kept(cache: Any, length: int) -> Keeps:
    """Which of the first ``length`` tokens are in the cache of which layers: ``(B, length)`` by first layer."""
    track = track_of(cache)
    found: Keeps = {}
    if track is None:
        return found
    outer = track.outer
    for group in track.groups:
        columns, valid = group.columns, group.valid
        if group.first > 0 and outer is not None:
            tail = torch.arange(outer.width, outer.width + 64).expand(columns.shape[0], -1)
            columns = torch.cat([outer.columns, tail], 1).gather(1, columns)
        keep = torch.zeros(columns.shape[0], max(length, int(columns.max()) + 1), dtype=torch.bool)
        rows = torch.arange(columns.shape[0]).unsqueeze(1).expand_as(columns)
        keep[rows[valid], columns[valid]] = True
        if length > track.covered:
            keep[:, track.covered :] = True
        found[group.first] = keep[:, :length]
    return found


@contextlib.contextmanager
def reorders(note: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Inside, ``note`` is told of a cache and of the rows ``(B,)`` that it is about to go on with, as beams do."""
    kind = host_object("any cache")
    stock = kind.reorder_cache

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        note(self, beam_idx)
        stock(self, beam_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "reorder_cache", reorder_cache)
        yield


@contextlib.contextmanager
def masked(layers: Any, keeps: Keeps, padding: Tensor | None) -> Iterator[None]:
    """Inside, decoder layers see only the columns that are kept; columns after those are seen by all.

    What is kept of a row goes where the row goes: versions that repeat images for each beam, and not all images of a
    sample together, show the beams of a sample with several images different ones.
    """
    handles, masks = [], []
    for i, layer in enumerate(layers):
        firsts = [f for f in keeps if f <= i]
        if firsts:
            keep = keeps[max(firsts)]
            masks.append(_Mask(i, keep, padding))
            handles.append(layer.register_forward_pre_hook(masks[-1], with_kwargs=True))

    def follow(cache: Any, rows: Tensor) -> None:
        for mask in masks:
            mask.keep = mask.keep.index_select(0, rows)

    try:
        with reorders(follow):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Mask:
    def __init__(self, index: int, keep: Tensor, padding: Tensor | None) -> None:
        self.index = index
        self.keep = keep
        self.padding = padding

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        cache = cache_of(kwargs)
        given = kwargs.get("attention_mask")
        past = 0
        if cache is not None and len(cache.layers) > self.index:
            past = cache.layers[self.index].get_seq_length()
        b, q = x.shape[:2]
        k = past + q
        seen = torch.arange(k) <= torch.arange(past, k).unsqueeze(1)
        seen = seen.expand(b, 1, q, k)
        if isinstance(given, Tensor):
            seen = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        elif self.padding is not None:
            seen = seen & _grow(self.padding.bool(), k)[:, None, None]
        keep = _grow(self.keep, k)[:, None, None, -seen.shape[-1] :]
        seen = seen & keep
        itself = torch.arange(k)[-seen.shape[-1] :] == torch.arange(past, k).unsqueeze(1)
        seen = seen | (itself & ~seen.any(-1, keepdim=True))
        if isinstance(given, Tensor) and given.is_floating_point():  # of the kind that eager attention adds
            seen = torch.zeros_like(seen, dtype=given.dtype).masked_fill(~seen, torch.finfo(given.dtype).min)
        return args, {**kwargs, "attention_mask": seen}


def _grow(mask: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(mask, (0, k - mask.shape[1]), value=True) if k > mask.shape[1] else mask[:, :k]


def generate(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """Sequences, logits of every step, cache."""
    torch.manual_seed(0)
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    return model.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True)


def agree(model: Any, layers: Any, method: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, Keeps]:
    """Check the law: pruned generation equals masked generation, token for token and in the logits of every step.

    Returns:
        The pruned run, and what was kept.
    """
    length = batch["input_ids"].shape[1]
    found: list[Keeps] = []
    tokred.apply(model, method)
    with reorders(lambda cache, rows: found.append(kept(cache, length))):
        pruned = generate(model, batch, **options)
    keeps = (found or [kept(pruned.past_key_values, length)])[0]
    assert keeps, "nothing was pruned"
    tokred.remove(model)
    rows = keeps[min(keeps)].shape[0]
    padding = batch.get("attention_mask")
    if padding is not None and rows != padding.shape[0]:
        padding = padding.repeat_interleave(rows // padding.shape[0], 0)
    with masked(layers, keeps, padding):
        expected = generate(model, batch, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    return pruned, keeps
