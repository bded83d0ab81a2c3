"""The mask function of a patched model: it returns the terms of a mask, from which each layer makes its own.

transformers makes one mask for all layers of a type, from the sizes of the first of them. Compressed layers differ in
their rows, so each makes its own; layers that have evicted nothing share the mask that transformers would have made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.contract import host_object, words
from tokred.kernels.decode_attention import SENTINEL, visible_positions
from tokred.kv.site import Padding


class MaskSpec:
    """Terms that a mask of one forward is made of; stands in for the mask on its way through the model.

    Args:
        arguments: of the mask function.
        tail: newest queries that the mask is for; 0: all.
    """

    def __init__(self, arguments: dict[str, Any], tail: int = 0) -> None:
        self.tail = tail
        # Offsets may be tensors that a layer changes in place before the mask is made.
        self.arguments: dict[str, Any] = {
            k: int(v) if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in arguments.items()
        }
        self._stock: dict[str, Any] = {}
        self.functions: dict[tuple[str, str], Any] = {}  # of attention, looked up once for all layers of a forward
        self._moved: dict[torch.device, MaskSpec] = {}
        mask = words.ATTENTION_MASK.of(arguments)
        self._padding = None if mask is None else Padding(mask)
        self._until: dict[int, Padding | None] = {}
        self._all_real: dict[tuple[int, int], bool] = {}

    def to(self, device: Any, **options: Any) -> MaskSpec:
        """A copy on another device, as libraries ask that spread a model over several."""
        device = torch.device(device)
        if device == torch.device(self.arguments.get("device", "cpu")):
            return self
        if device not in self._moved:
            mask = self.key_mask
            mask = None if mask is None else mask.to(device, **options)
            self._moved[device] = MaskSpec(
                {**self.arguments, words.ATTENTION_MASK.key(self.arguments): mask, "device": device}, self.tail
            )
        return self._moved[device]

    def __getitem__(self, index: Any) -> MaskSpec:
        """The mask of the newest queries, where a model cuts the last of four axes but one: ``mask[:, :, -n:, :]``.

        Raises:
            TypeError: it is cut in another way.
        """
        match index:
            case (slice(), slice(), slice(start=int() as start, stop=None, step=None), slice()) if start <= 0:
                return MaskSpec(self.arguments, min(-start, self.queries)) if start else self
        raise TypeError("a mask that stands for one of evicted rows can be cut to its newest queries alone")

    @property
    def queries(self) -> int:
        """Queries that the mask is for."""
        return self.tail or int(words.QUERIES_TO_MASK.at(self.arguments))

    @functools.cached_property
    def key_mask(self) -> Tensor | None:
        """``[B, L]`` bool by slot, False on padding, as the caller gave it."""
        mask: Tensor | None = words.ATTENTION_MASK.of(self.arguments)
        return mask

    def padding(self, seen: int) -> Padding | None:
        """Which of the first ``seen`` slots are real; None where all are."""
        if self._padding is None:
            return None
        if seen not in self._until:
            self._until[seen] = self._padding.until(seen)
        return self._until[seen]

    def later(self, first: int, last: int) -> Tensor | None:
        """``[B, last - first]`` bool: which of some slots are real; None where all are known to be.

        Kept rows are never padding, so this is all that has to be asked after an eviction at ``first``.
        """
        if self.key_mask is None:
            return None
        part = self.key_mask[:, first:last]
        if part.device.type != "cpu":
            return part  # looking at it would wait for the device
        if (first, last) not in self._all_real:
            self._all_real[first, last] = bool(part.all())
        return None if self._all_real[first, last] else part

    def stock(self, implementation: str) -> Any:
        """The mask that transformers would have made for ``implementation``, made once for all layers."""
        if implementation not in self._stock:
            mapping = host_object("mask functions")
            if implementation not in mapping:
                return None
            arguments = dict(self.arguments)
            if words.LOCAL.of(arguments) is None and words.FIRST_KEY.at(arguments):
                # Sizes of a layer that has evicted rows; this mask is for one that has not.
                words.KEYS_TO_MASK.put(arguments, words.KEYS_TO_MASK.at(arguments) + words.FIRST_KEY.at(arguments))
                words.FIRST_KEY.put(arguments, 0)
            mask = mapping[implementation](**arguments)
            self._stock[implementation] = mask if mask is None or not self.tail else mask[:, :, -self.tail :]
        return self._stock[implementation]

    def part(self, queries: int, keys: int) -> MaskSpec:
        """The specification for the first ``queries`` queries and the slots until ``keys``."""
        mask, changed = self.key_mask, dict(self.arguments)
        words.QUERIES_TO_MASK.put(changed, queries)
        words.KEYS_TO_MASK.put(changed, keys)
        words.FIRST_KEY.put(changed, 0)
        words.ATTENTION_MASK.put(changed, None if mask is None else mask[:, :keys])
        return MaskSpec(changed)

    def chosen(self, columns: Tensor, valid: Tensor | None) -> MaskSpec:
        """The specification where some of the tokens leave before the first layer.

        Args:
            columns: ``[B, M]`` which of the newest tokens that this mask is for are left, in order.
            valid: ``[B, L - n + M]`` bool of the slots that there are then, False on padding; None: all are real.
        """
        count, changed = columns.shape[1], dict(self.arguments)
        gone, held = self.queries - count, 0 if valid is None else valid.shape[1] - count
        words.QUERIES_TO_MASK.put(changed, count)
        words.KEYS_TO_MASK.put(changed, words.KEYS_TO_MASK.at(changed) - gone)
        words.ATTENTION_MASK.put(changed, valid)
        if not self.plain:
            # The host's rule may look up tables by place, which are those of all tokens.
            rule, now = words.RULE.at(changed), columns + held
            before = torch.arange(held, device=columns.device).expand(len(columns), -1)
            places = torch.cat([before, now], 1)
            words.RULE.put(changed, lambda b, h, q, k: rule(b, h, places[b, q], places[b, k]))
        return MaskSpec(changed)

    @functools.cached_property
    def plain(self) -> bool:
        """True where every query sees exactly the real tokens up to its own."""
        return words.RULE.at(self.arguments) is host_object("causal rule")

    @functools.cached_property
    def light(self) -> bool:
        """True for one query that is known to see all rows there are."""
        if self.queries != 1 or not self.plain:
            return False
        # Elsewhere looking would wait for the device.
        mask = self.key_mask
        return mask is None or (mask.device.type == "cpu" and bool(mask.all()))

    def visible(self, first: int, count: int, positions: Tensor, ragged: bool) -> Tensor | None:
        """Mask of the rows of a compressed layer that each query sees.

        Args:
            first: slot of the first query.
            count: queries; their own rows are the newest.
            positions: ``[B, Hk, K]`` slots of the rows.
            ragged: whether some rows may be empty.

        Returns:
            Bool ``[B or 1, Hk or 1, Q, K]``; None: every query sees every row. A query that would see nothing (a
            padded one) sees the first row, so that no NaN arises.
        """
        b, heads, n = positions.shape
        if self.plain and self.key_mask is None and not ragged:
            if count == 1:
                return None
            rows = torch.arange(n - count, n, device=positions.device)
            return (torch.arange(n, device=positions.device) <= rows[:, None])[None, None]
        query = torch.arange(first, first + count, device=positions.device)
        if self.plain:
            seen = visible_positions(positions, None, self.key_mask)[:, :, None]
            seen = seen & (positions[:, :, None] <= query[:, None])
        else:
            # The host's rule may look up tables by position, and empty rows have a position behind all of them.
            index = positions.long().clamp(max=first + count - 1)[:, :, None]
            sample = torch.arange(b, device=positions.device)[:, None, None, None]
            head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=positions.device)
            seen = words.RULE.at(self.arguments)(sample, head, query[:, None], index)
            seen = seen.expand(b, heads, count, n) & (positions != SENTINEL)[:, :, None]
            if self.key_mask is not None:
                seen = seen & visible_positions(positions, None, self.key_mask)[:, :, None]
        blind = ~seen.any(-1, keepdim=True)
        # A softmax over nothing is NaN: as a value in the next layer it would reach real tokens past any mask.
        opened = torch.zeros(n, dtype=torch.bool, device=seen.device)
        opened[0] = True
        return seen | (blind & opened)


def mask_function(**arguments: Any) -> MaskSpec:
    """The mask function that is registered beside the attention; see :class:`MaskSpec`."""
    return MaskSpec(arguments)
