"""timm: VisionTransformer in all its forms, EVA and the RoPE families, BEiT, relative-position ViTs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.block import Recipe
from tokred.adapters.host import Host, argument_names
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError

# Block classes that are x + f(attn(norm1(x))), then x + g(mlp(norm2(x))): they may be split in the middle. The names
# are all that their forward may use: a later version that does more is run whole and reduced at its end.
SPLIT = {
    "timm.models.vision_transformer.Block",
    "timm.models.eva.EvaBlock",
    "timm.models.beit.Block",
    "timm.models.vision_transformer_relpos.RelPosBlock",
}
SPLIT_NAMES = {
    "norm1", "attn", "ls1", "drop_path1", "gamma_1", "norm2", "mlp", "ls2", "drop_path2", "gamma_2",
}  # fmt: skip

FAMILIES = {
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
    "timm.models.eva.Eva",
    "timm.models.beit.Beit",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
}

# Their attention adds a bias to each pair of tokens, so its columns do not follow from queries, keys and sizes.
RELATIVE = {"Beit", "VisionTransformerRelPos"}

WINDOWED = "its attention runs in windows on a grid, which dropping tokens would break"
REFUSED = {
    "SwinTransformer": WINDOWED,
    "SwinTransformerV2": WINDOWED,
    "SwinTransformerV2Cr": WINDOWED,
    "Hiera": "it pools mask units of a fixed grid between its stages",
    "VisionTransformerSAM": "its blocks work on (B, H, W, C) maps with windows and decomposed relative positions",
    "NaFlexVit": "its pooling uses the padding mask of the original length",
    "Cait": "its talking-heads attention is not fused, so sizes could not reach it",
    "Xcit": "it attends between channels, not between tokens",
    "MultiScaleVit": "its attention pools keys and values on a grid",
}


def match(model: nn.Module) -> Host | None:
    """The host record of a timm vision transformer; None when ``model`` is not one.

    Raises:
        UnsupportedModelError: ``model`` is a timm model that cannot be reduced rightly; the message says why.
    """
    cls = host_class(model)
    names = [f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__]
    if not any(n.startswith("timm.models.") for n in names) or not hasattr(model, "forward_features"):
        return None
    reason = next((REFUSED[c.__name__] for c in cls.__mro__ if c.__name__ in REFUSED), None)
    if reason is None and not FAMILIES & set(names):
        reason = "it has no flat list of attention blocks over one token sequence"
    if reason is not None:
        raise UnsupportedModelError(f"timm's {cls.__name__} cannot run with fewer tokens here: {reason}")
    return _host(model)


def _host(model: Any) -> Host:
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    if not blocks:
        raise UnsupportedModelError(f"timm's {type(model).__name__} has no blocks")
    _check_fused(blocks)
    first = blocks[0][1]
    rope = getattr(model, "rope", None) is not None
    positions = {"rope": gather_rope} if rope else {}
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    supplies = {"x", "q", "k", "v"}
    if getattr(model, "cls_token", None) is not None:
        supplies.add("class_attention")
    if not any(c.__name__ in RELATIVE for c in host_class(model).__mro__):
        supplies.add("attention")
    splits = all(_splits(b) for _, b in blocks)
    if splits:
        supplies.add("queries")
        if all(isinstance(getattr(b.attn, "proj", None), nn.Linear) for _, b in blocks):
            supplies.add("transform")
    grid = getattr(model.patch_embed, "grid_size", None)
    supplies.add("grid")
    return Host(
        family=f"timm {host_class(model).__name__}",
        model=model,
        blocks=blocks,
        recipe=Recipe(splits, positions, argument_names(first)),
        prefix=prefix,
        supplies=frozenset(supplies),
        pooled=getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", "token") != "token",
        tokens=lambda shape: _tokens(model, shape),
        outside_macs=lambda shape: _outside(model, shape),
        grid=tuple(grid) if grid is not None else None,
        # Keys before rotary embedding: similarity should not depend on where two equal patches are.
        key_norms=[_key_norm(b) for _, b in blocks] if rope else [],
    )


def _check_fused(blocks: list[tuple[str, nn.Module]]) -> None:
    for name, block in blocks:
        attentions = [m for m in block.modules() if hasattr(m, "fused_attn")]
        if not attentions:
            raise UnsupportedModelError(
                f"the attention of {name} ({type(block).__name__}) has no fused form, so sizes could not reach it"
            )
        if not all(a.fused_attn for a in attentions):
            raise UnsupportedModelError(
                f"the attention of {name} is not fused; set fused_attn = True on it "
                "(timm.layers.set_fused_attn) and apply again"
            )


def _splits(block: nn.Module) -> bool:
    cls = host_class(block)
    return f"{cls.__module__}.{cls.__qualname__}" in SPLIT and set(cls.forward.__code__.co_names) <= SPLIT_NAMES


def _key_norm(block: Any) -> nn.Module:
    attn = block.attn
    if not isinstance(getattr(attn, "k_norm", None), nn.Module):
        raise UnsupportedModelError(f"{type(attn).__name__} hides its keys before rotary embedding")
    norm: nn.Module = attn.k_norm
    return norm


def gather_rope(rope: Tensor, representative: Tensor, prefix: int) -> Tensor:
    """Rotary tables at the rows that are left; prefix tokens have none.

    Args:
        rope: ``(N, D)``, per head ``(H, N, D)`` (mixed), per sample ``(B, 1, N, D)`` or both ``(B, H, N, D)``, over
            ``N`` patches.
        representative: ``(B, M)`` original positions, prefix included.
        prefix: number of prefix tokens, which stand first.

    Returns:
        ``(B, 1 or H, M - prefix, D)``.
    """
    rows = representative[:, prefix:] - prefix
    b, m = rows.shape
    if rope.ndim == 2:
        return rope.index_select(0, rows.reshape(-1)).view(b, 1, m, -1)
    if rope.ndim == 3:
        return rope.index_select(1, rows.reshape(-1)).view(rope.shape[0], b, m, -1).transpose(0, 1)
    columns = rows[:, None, :, None].expand(b, rope.shape[1], m, rope.shape[3])
    return rope.expand(b, -1, -1, -1).gather(2, columns)


def _grid(model: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    embed = model.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        h, w = embed.dynamic_feat_size(tuple(shape[-2:]))
        return int(h), int(w)
    h, w = embed.grid_size
    return int(h), int(w)


def _tokens(model: Any, shape: tuple[int, ...]) -> int:
    h, w = _grid(model, shape)
    return h * w + int(model.num_prefix_tokens)


def _outside(model: Any, shape: tuple[int, ...]) -> int:
    """Patch embedding (counted on the meta device) and classifier."""
    from torch.utils.flop_counter import FlopCounterMode

    embed = copy.deepcopy(model.patch_embed).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embed(torch.empty(1, *shape[-3:], device="meta"))
    heads = [getattr(model, n, None) for n in ("head", "head_dist")]
    head = sum(p.numel() for m in heads if isinstance(m, nn.Module) for p in m.parameters() if p.ndim == 2)
    return int(counter.get_total_flops()) // 2 + head
