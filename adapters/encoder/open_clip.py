"""open_clip: its own vision transformer. Text towers are never touched; timm trunks are the timm adapter's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, terms, words
from tokred.adapters.encoder.block import Recipe
from tokred.adapters.encoder.capture import Capture, MhaCapture
from tokred.adapters.encoder.host import EncoderHost, argument_names, rewritten
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError

REFUSED = {"ModifiedResNet": "it is a convolutional network without tokens"}


def by_head(mask: Tensor, batch: int) -> Tensor:
    """A mask ``(B * H, N, N)`` as ``(B, H, N, N)``; others as they are."""
    return mask.reshape(batch, -1, *mask.shape[1:]) if mask.ndim == 3 else mask


class OwnRecipe(Recipe):
    """Blocks of open_clip's own attention, whose boolean masks hide where they are True."""

    def real(self, kwargs: dict[str, Any], x: Tensor) -> Tensor | None:
        mask = words.BLOCK_MASK.of(kwargs)
        if mask is None:
            return None
        return super().real({words.BLOCK_MASK.name: by_head(~mask if mask.dtype == torch.bool else mask, len(x))}, x)

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """A mask of each head in the shape that the attention does not take apart by the number of its tokens."""
        mask, rows = words.BLOCK_MASK.of(kwargs), state.representative
        if mask is not None and rows is not None:
            kwargs = {**kwargs, words.BLOCK_MASK.key(kwargs): by_head(mask, len(rows))}
        return super().gather(kwargs, state, prefix)


class MhaRecipe(Recipe):
    """Blocks whose attention is ``nn.MultiheadAttention``."""

    heads = False

    def real(self, kwargs: dict[str, Any], x: Tensor) -> Tensor | None:
        """Tokens that its mask leaves visible; the blocks add a boolean mask to the logits, where it hides nothing."""
        mask = words.BLOCK_MASK.of(kwargs)
        return None if mask is None else super().real({words.BLOCK_MASK.name: by_head(mask.to(x.dtype), len(x))}, x)

    def capture(self, block: nn.Module, bias: Tensor | None, state: TokenState) -> Capture:
        """Watches the call around the fused attention, which is all that a mode can see."""
        return MhaCapture(bias, state.length, state.representative)


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of open_clip's vision transformer; None for everything else, whole CLIP models included.

    Raises:
        UnsupportedModelError: ``model`` is a vision tower that cannot be reduced rightly; the message says why.
    """
    cls = host_class(model)
    for base in cls.__mro__:
        if base.__module__.startswith("open_clip.") and base.__name__ in REFUSED:
            raise UnsupportedModelError(
                f"open_clip's {cls.__name__} cannot run with fewer tokens here: {REFUSED[base.__name__]}"
            )
    if not terms.CLIP_TOWER.among([c.__name__ for c in cls.__mro__ if c.__module__.startswith("open_clip.")]):
        return None
    return _host(model)


def _host(model: Any) -> EncoderHost:
    tower = members.TOWER_OF_CLIP.need(model)
    path = f"{members.TOWER_OF_CLIP.spelled(model)}.{members.BLOCKS_OF_CLIP.spelled(tower)}"
    blocks = [(f"{path}.{i}", block) for i, block in enumerate(members.BLOCKS_OF_CLIP.need(tower))]
    if not blocks:
        raise UnsupportedModelError("open_clip's VisionTransformer has no blocks")
    if not words.BATCH_FIRST.part(tower, True):
        raise UnsupportedModelError("open_clip's VisionTransformer runs with batch_first=False; build it with True")
    first = blocks[0][1]
    attention = words.SELF.need(first)
    recipe = MhaRecipe if isinstance(attention, nn.MultiheadAttention) else OwnRecipe
    if recipe is OwnRecipe and not _fused(attention):
        raise UnsupportedModelError(
            f"the attention of {blocks[0][0]} ({type(attention).__name__}) is not fused (scaled cosine), so sizes "
            "could not reach it"
        )
    return EncoderHost(
        family="open_clip VisionTransformer",
        model=model,
        blocks=blocks,
        recipe=recipe(False, {}, argument_names(first)),
        prefix=1,
        supplies=frozenset({"x", "q", "k", "v", "class_attention", "attention", "grid"}),
        # CoCa hands all tokens on to its text decoder, through an attentional pooler or as they are.
        pooled=_pools(model),
        pools=_pools,
        own=rewritten(model, "open_clip"),
        origin=members.PATCHES_OF_CLIP.need(model),
        tokens=lambda shape: _tokens(model, shape),
        outside_macs=lambda shape: _outside(model, shape),
        grid=tuple(words.GRID.need(model)),
    )


def _pools(model: Any) -> bool:
    """True where something behind the blocks reads all tokens."""
    return (
        words.POOLER.need(model) is not None
        or members.POOL_OF_CLIP.need(model) not in terms.FIRST_TOKEN.names
        or bool(members.TOKENS_OF_CLIP.need(model))
    )


def _fused(attention: Any) -> bool:
    return words.COSINE.part(attention) is None and bool(words.FUSED_IN_CLIP.part(attention, False))


def _patches(model: Any, shape: tuple[int, ...]) -> int:
    conv = copy.deepcopy(members.PATCHES_OF_CLIP.need(model)).to("meta")
    with torch.no_grad():
        return int(conv(torch.empty(1, *shape[-3:], device="meta")).flatten(2).shape[-1])


def _tokens(model: Any, shape: tuple[int, ...]) -> int:
    return _patches(model, shape) + 1


def _outside(model: Any, shape: tuple[int, ...]) -> int:
    """Patch embedding and projection; an attentional pooler is left out."""
    matrix, patches = members.PROJECTION_OF_CLIP.need(model), members.PATCHES_OF_CLIP.need(model)
    return _patches(model, shape) * int(patches.weight.numel()) + (0 if matrix is None else int(matrix.numel()))
