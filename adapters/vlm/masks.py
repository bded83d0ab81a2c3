"""Masks of decoder layers that hold other columns than the first layer, and those of sliding layers, whose window
counts the tokens of the whole conversation, dropped ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.adapters.contract import arguments, attention_of, cache_name, host_object, members, terms, words
from tokred.adapters.kv.attention import PREFIX
from tokred.adapters.kv.masks import MaskSpec
from tokred.adapters.kv.reasons import STATES
from tokred.adapters.vlm.columns import Packed
from tokred.adapters.vlm.tokens.recorded import own_sizes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import Cache, PreTrainedConfig

    from tokred.adapters.vlm.forward import Forward

    # A mask of one kind of layers (None: all is causal, nothing is hidden), and those of a model, by kind if several.
    Mask = Tensor | BlockMask | MaskSpec | None
    Masks = Mask | dict[str, Mask]


class MaskMaker:
    """Makes the mask of a group of layers in one forward.

    Args:
        config: of the language model.
        rows: ``(B, q)`` which columns of this forward are left; None: all.
        columns: ``(B, k)`` which of layer 0's rows these layers hold; their newest ones are ``rows``.
        valid: ``(B, k)`` bool, False on filler and padding; None: all real.
        total: rows of layer 0 that ``columns`` are among.
        places: gives ``(B, total)``, which token of the conversation each of them is; None where no window is shorter
            than the conversation.
        blocks: whether stock masks let some tokens see later ones (those of an image).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rows: Tensor | None,
        columns: Tensor,
        valid: Tensor | None,
        total: int,
        places: Callable[[], Tensor] | None = None,
        blocks: bool = False,
    ) -> None:
        self.config = config
        self.rows = rows
        self.columns = columns
        self.valid = valid
        self.total = total
        self.places = places
        self.blocks = blocks
        self._made: dict[tuple[int, int | None], tuple[Mask, Mask]] = {}

    def __call__(self, mask: Mask, x: Tensor, cache: Cache | None, layer: int, window: int | None) -> Mask:
        """The mask for ``layer``, whose stock mask is ``mask`` and whose input ``x`` has ``q`` tokens."""
        key = (id(mask), window)
        if key not in self._made:
            # The mask is held so that its id stays its own.
            self._made[key] = (mask, self._make(mask, x, cache, layer, window))
        return self._made[key][1]

    def _make(self, mask: Mask, x: Tensor, cache: Cache | None, layer: int, window: int | None) -> Mask:
        # Order matters: a window that counts places makes its mask whatever the host's is; flex masks come after it.
        if window is not None and self.places is not None:
            return self._slid(mask, x, cache, layer, window)
        if self.blocks and not (mask is None or isinstance(mask, Tensor)):
            raise uncut(mask)
        if mask is None and self.valid is None:
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return self.valid  # flash attention reads padding alone
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == self.total:
            return self._gathered(mask, x)
        return self._built(x, cache, layer, window is not None)

    def _slid(self, mask: Mask, x: Tensor, cache: Cache | None, layer: int, window: int) -> Tensor:
        assert self.places is not None  # see _make
        mask = tensor_of(self.config, mask)
        q = x.shape[1]
        held = min(_held(cache, layer, q), self.columns.shape[1] - q)
        columns = self.columns[:, self.columns.shape[1] - held - q :]
        valid = None if self.valid is None else self.valid[:, self.valid.shape[1] - held - q :]
        stock = None
        if mask is not None:
            before = _all_seen(mask, (len(columns), 1, q, held))
            if self.blocks:
                rows = self._rows(x)
                own = mask[..., mask.shape[-1] - mask.shape[-2] :]  # columns of this forward
                now = gather_mask(own, rows, rows, torch.ones_like(rows, dtype=torch.bool))
            else:
                now = _all_seen(mask, (len(columns), 1, q, q))
            stock = torch.cat([before, now], -1)
        return windowed(stock, self.places().gather(1, columns), q, valid, window, self.blocks)

    def _rows(self, x: Tensor) -> Tensor:
        b, q = x.shape[:2]
        return torch.arange(q, device=x.device).expand(b, -1) if self.rows is None else self.rows

    def _gathered(self, mask: Tensor, x: Tensor) -> Tensor:
        valid = self.valid
        if valid is None:
            valid = torch.ones_like(self.columns, dtype=torch.bool)
        return gather_mask(mask, self._rows(x), self.columns, valid)

    def _built(self, x: Tensor, cache: Cache | None, layer: int, sliding: bool) -> Mask:
        make = host_object("sliding mask" if sliding else "causal mask")
        given = {words.EMBEDS: x, words.ATTENTION_MASK: self.valid, words.LAYER_INDEX: layer}
        with own_sizes():
            return make(  # type: ignore[no-any-return]
                **{words.CONFIG.name: self.config},
                **arguments(make, given),
                **{cache_name(make): cache},
            )


def slid(forward: Forward, new: dict[str, Any]) -> Masks:
    """The mask of a forward of which layer 0 holds less than the conversation, with windows that count all of it.

    Args:
        forward: see :class:`tokred.adapters.vlm.forward.Forward`.
        new: the language model's arguments, with the masks that it would be given.
    """
    config, window, mask = forward.settings.config, forward.settings.window, words.ATTENTION_MASK.of(new)
    assert window is not None  # there are sliding layers, see Forward.slides
    given = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    if not given:
        make = host_object("masks of generation")
        mask = make(
            **{words.CONFIG.name: config},
            **arguments(make, {words.EMBEDS: forward.embeds, words.ATTENTION_MASK: mask}),
            **{cache_name(make): forward.cache},
        )
    places, q = forward.places(), forward.embeds.shape[1]

    def one(stock: Mask) -> Tensor:
        stock = tensor_of(config, stock)
        count = places.shape[1] if stock is None else stock.shape[-1]
        valid = None if forward.mask is None else forward.mask[:, places.shape[1] - count :]
        return windowed(stock, places[:, places.shape[1] - count :], q, valid, window, given)

    if isinstance(mask, dict):
        return {kind: one(stock) if terms.WINDOWED in kind else stock for kind, stock in mask.items()}
    return one(mask)


def windowed(stock: Tensor | None, places: Tensor, q: int, valid: Tensor | None, window: int, exact: bool) -> Tensor:
    """A mask whose window counts places in the conversation.

    Args:
        stock: ``(B, H or 1, q, k)`` bool or additive; None: all is causal.
        places: ``(B, k)`` int64 of the columns, the newest ``q`` of which are the rows.
        q: rows.
        valid: ``(B, k)`` bool, False columns are hidden; None: all are real, or ``stock`` hides the others.
        window: tokens that are seen, the own one included.
        exact: whether ``stock`` is right among the newest ``q`` columns, of which it may let some see later ones.
    """
    held = places.shape[1] - q
    rows = places[:, held:, None]
    seen = (rows >= places.unsqueeze(1)) & (rows - places.unsqueeze(1) < window)
    if stock is None:
        stock = torch.ones(len(places), 1, *seen.shape[1:], dtype=torch.bool, device=places.device)
    elif exact:
        seen[:, :, held:] = True
    if valid is not None:
        seen = seen & valid.unsqueeze(1)
    return hide(stock.expand(len(places), -1, -1, -1), seen.unsqueeze(1))


def tensor_of(config: PreTrainedConfig, mask: Mask) -> Tensor | None:
    """The mask of sliding layers as a tensor, also where a policy of the cache hands one through; None: all is causal.

    A policy makes the masks of its own layers from their rows, when these are known. Sliding layers are never its own:
    theirs is the mask that the model's attention would have been given without it.

    Raises:
        ValueError: as :func:`check_kernel`.
    """
    if isinstance(mask, MaskSpec):
        mask = mask.stock(attention_of(config).removeprefix(PREFIX))
    check_kernel(config, mask)
    assert mask is None or isinstance(mask, Tensor)  # see there
    return mask


def check_kernel(config: PreTrainedConfig, mask: Masks) -> None:
    """Refuse what counts windows itself, in the rows that are left: flash kernels and flex attention.

    Raises:
        ValueError: with what would work.
    """
    name = attention_of(config).removeprefix(PREFIX)
    if terms.FLASH in name or not (mask is None or isinstance(mask, Tensor | dict)):
        raise ValueError(
            f"attention {name!r} counts the window of sliding layers ({words.WINDOW.need(config)} tokens, less than "
            "the prompt) in the tokens that are left, which would let it reach too far back: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _all_seen(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of the kind of ``like`` that hides nothing."""
    made = like.new_ones if like.dtype == torch.bool else like.new_zeros
    return made(shape)


def _held(cache: Cache | None, layer: int, q: int) -> int:
    """Rows that the layer's attention sees of earlier forwards."""
    layers = words.LAYERS.part(cache, [])
    return int(members.MASK_SIZES.need(layers[layer])(q)[0]) - q if layer < len(layers) else 0


PAIRS = (
    "a mask for each pair of tokens does not fit a cache whose prompt was pruned: give attention_mask as [B, L] with "
    "zeros on padding, or none"
)


def gather_mask(mask: Tensor, rows: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """A mask for every pair of tokens, at the rows and columns that are left.

    Args:
        mask: ``(B or 1, H or 1, Q, K)`` bool or additive.
        rows: ``(B, q)``, columns: ``(B, k)`` int64.
        valid: ``(B, k)`` bool, False columns are hidden; a row that would see nothing sees itself.
    """
    b, q = rows.shape
    mask = mask.expand(b, -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], q, -1))
    return hide(mask, valid[:, None, None, :])


def hide(mask: Tensor, seen: Tensor) -> Tensor:
    """``mask`` (``(B, H or 1, q, k)``, bool or additive) without what is not ``seen`` (bool, broadcast); a row that
    would see nothing sees itself."""
    q, k = mask.shape[-2:]
    itself = torch.arange(k, device=mask.device) == torch.arange(k - q, k, device=mask.device).unsqueeze(1)
    if mask.dtype == torch.bool:
        found = mask & seen
        return found | (itself & ~found.any(-1, keepdim=True))
    least = torch.finfo(mask.dtype).min
    found = torch.where(seen, mask, least)
    blind = (found <= least).all(-1, keepdim=True)
    return torch.where(itself & blind, torch.zeros_like(found), found)


def uncut(mask: object) -> ValueError:
    """The refusal of a mask that is no tensor (flex attention's)."""
    return ValueError(
        f"a {type(mask).__name__} cannot be cut down to the tokens that are left: load the model with "
        "attn_implementation='sdpa' or 'eager'"
    )


def gather_any_mask(mask: Masks, packed: Packed, before: Tensor, length: int) -> Any:
    """A mask of whatever shape the model was given, at the columns that are left.

    Args:
        mask: for the rows that layers hold (sliding ones hold the newest alone), then the ``length`` columns of this
            forward.
        packed: of these.
        before: ``(B, P)`` bool, which of the rows that layer 0 holds are real.
        length: columns of this forward.

    Raises:
        ValueError: the mask does not fit these rows.
    """
    # Generation hands over masks by kind of layer.
    if isinstance(mask, dict):
        now = packed.valid if packed.ragged else None  # layers with a state are told of this forward's padding
        return {k: now if k in STATES else gather_any_mask(one, packed, before, length) for k, one in mask.items()}
    if mask is None:
        return None
    if isinstance(mask, MaskSpec):  # of a policy of the cache
        return mask.chosen(packed.columns, torch.cat([before, packed.valid], 1))
    if not isinstance(mask, Tensor):
        raise uncut(mask)
    if mask.ndim == 2:
        return torch.cat([before, packed.valid], 1)
    # A mask of a sliding layer has its window's rows alone, the newest ones.
    held = mask.shape[-1] - length
    if held < 0 or held > before.shape[1]:
        raise ValueError(PAIRS)
    rows = torch.arange(held, device=mask.device).expand(len(before), -1)
    valid = torch.cat([before[:, before.shape[1] - held :], packed.valid], 1)
    return gather_mask(mask, packed.columns, torch.cat([rows, packed.columns + held], 1), valid)
