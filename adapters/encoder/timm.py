"""timm: VisionTransformer in all its forms, EVA and the RoPE families, BEiT, relative-position ViTs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokred.adapters.contract import members, terms, words
from tokred.adapters.encoder.block import Leaf, Recipe, refuse_padding
from tokred.adapters.encoder.host import EncoderHost, argument_names, module_macs, rewritten
from tokred.adapters.encoder.sides import Sides, convolution, of_convolution
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.encoder.timm_tables import (
    FAMILIES,
    GEMMA,
    MAPPED,
    REFUSED,
    RELATIVE,
    SAM,
    SAM_NAMES,
    SAM_PARTS,
    SPLIT,
    SPLIT_NAMES,
)
from tokred.adapters.encoder.window_host import window_host
from tokred.adapters.linear import features, macs
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError
from tokred.kernels.gather_rows import gather_rows


def match(model: nn.Module) -> EncoderHost | None:
    """The host record of a timm vision transformer; None when ``model`` is not one.

    Raises:
        UnsupportedModelError: ``model`` is a timm model that cannot be reduced rightly; the message says why.
    """
    cls = host_class(model)
    names = _names(model)
    if MAPPED & set(_names(members.ENCODER.part(model))):
        return None  # a classifier around such an encoder, which is found inside
    if not any(n.startswith("timm.models.") for n in names) or not members.FEATURES_OF_MODEL.on(model):
        return None
    _trace_no_blocks()
    if SAM in names:
        return _sam(model)
    reason = next((REFUSED[c.__name__] for c in cls.__mro__ if c.__name__ in REFUSED), None)
    if reason is None and not (FAMILIES | MAPPED) & set(names):
        reason = "it has no flat list of attention blocks over one token sequence"
    if reason is not None:
        raise UnsupportedModelError(f"timm's {cls.__name__} cannot run with fewer tokens here: {reason}")
    return _host(model)


def _trace_no_blocks() -> None:
    """Tell timm's tracers, as timm does for modules of its own, that patched blocks are leaves."""
    from timm.models import register_notrace_module

    register_notrace_module(Leaf)


def _names(module: object) -> list[str]:
    """Full names of a module's class and of those it derives from."""
    cls = host_class(module) if isinstance(module, nn.Module) else type(module)
    return [f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__]


def _sam(model: Any) -> EncoderHost:
    turned = words.ROPE_OF_MAP.part(model) is not None
    parts = replace(SAM_PARTS, rotate=rotate if turned else None)
    return window_host(
        model,
        _blocks(model),
        parts,
        frozenset(SAM_NAMES),
        family=f"timm {host_class(model).__name__}",
        map_of=lambda shape: _grid(model, shape),
        around=lambda shape: (
            _outside(model, shape)
            + module_macs(members.NECK.need(model), 1, members.WIDTH.need(model), *_grid(model, shape))
        ),
    )


def _blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """All blocks by name."""
    return [(f"{words.BLOCKS.spelled(model)}.{i}", block) for i, block in enumerate(words.BLOCKS.need(model))]


def rotate(attention: Any, rows: Tensor, representative: Tensor) -> Tensor:
    """Rotary embedding of queries or keys ``(B, H, M, D)`` at the places where they stand."""
    from timm.layers import apply_rot_embed_cat

    turned: Tensor = apply_rot_embed_cat(
        rows, gather_rope(members.TABLES_OF_ROPE.need(words.ROPE_OF_ATTENTION.need(attention))(), representative, 0)
    )
    return turned


def _host(model: Any) -> EncoderHost:
    blocks = _blocks(model)
    if not blocks:
        raise UnsupportedModelError(f"timm's {type(model).__name__} has no blocks")
    _check_fused(blocks)
    first, names = blocks[0][1], set(_names(model))
    gemma = GEMMA in names
    rope = words.ROPE_OF_MODEL.part(model) is not None or gemma
    positions: dict[str, Callable[..., Any]] = {words.ROPE_OF_BLOCK.name: gather_rope} if rope else {}
    if gemma:
        positions = {word.name: gather_embeddings for word in (words.COSINES, words.SINES)}
    prefix = int(words.PREFIX.part(model, 1))
    supplies = {"x", "q", "k", "v"}
    # Of a model of ours, tokred.learn.jumbo: what its class token looks at is what all of its rows do.
    wide = int(getattr(model, "class_rows", 0))
    if words.CLASS_TOKEN.part(model) is not None or wide:
        supplies.add("class_attention")
    if not any(c.__name__ in RELATIVE for c in host_class(model).__mro__):
        supplies.add("attention")
    splits = all(_splits(b) for _, b in blocks)
    if splits:
        supplies.add("queries")
        if all(features(members.LAST_OF_ATTENTION.part(words.SELF.need(b))) is not None for _, b in blocks):
            supplies.add("transform")
    grid, origin = words.GRID.part(words.PATCHES.need(model)), _origin(words.PATCHES.need(model), gemma)
    if origin is not None:
        supplies.add("grid")
    return EncoderHost(
        family=f"timm {host_class(model).__name__}",
        model=model,
        blocks=blocks,
        recipe=(UnpaddedRecipe if gemma else Recipe)(splits, positions, argument_names(first)),
        prefix=prefix,
        supplies=frozenset(supplies),
        pooled=_pools(model),
        pools=_pools,
        own=rewritten(model, "timm", *(word.name for word in members.BEHIND)),
        tokens=lambda shape: _tokens(model, shape),
        outside_macs=lambda shape: _outside(model, shape),
        grid=tuple(grid) if grid is not None else None,
        origin=words.PATCHES.need(model) if origin is None else origin,
        layout=_of_images if gemma else of_convolution if origin is not None else None,
        # Keys before rotary embedding: similarity should not depend on where two equal patches are.
        key_norms=[_key_norm(b) for _, b in blocks] if rope else [],
        key_heads=int(members.KEY_HEADS.need(words.SELF.need(first))) if gemma else None,
        full="last" if MAPPED & names else "none",
        class_rows=wide or 1,
    )


def _pools(model: Any) -> bool:
    """True for a model whose head looks at all tokens, by an average, their maximum or attention."""
    return (
        words.POOLER.part(model) is not None
        or words.POOL.part(model, terms.FIRST_TOKEN.name) not in terms.FIRST_TOKEN.names
    )


def _origin(embed: Any, gemma: bool) -> nn.Module | None:
    """The module whose output or input tells how patches stand."""
    if gemma:
        return embed  # type: ignore[no-any-return]
    last = members.PATCH_PROJECTION.part(embed)
    # A convolution, or what wraps one; of a hybrid without projection, an identity on the map of its network.
    return last if isinstance(last, nn.Identity) or convolution(last) is not None else None


def _of_images(module: Any, inputs: Any, output: Any) -> Sides | None:
    """Sides of the patches of images; packed patches come in any order."""
    x, *coordinates = inputs
    if not isinstance(x, Tensor) or x.ndim != 4 or (coordinates and coordinates[0] is not None):
        return None
    high, wide = words.PATCH.need(module)
    return Sides(None, x.shape[-2] // high, x.shape[-1] // wide)


class UnpaddedRecipe(Recipe):
    """Blocks that get a mask where images of several sizes are packed together."""

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """Positions at the rows that are left; padding is refused."""
        if words.BLOCK_MASK.of(kwargs) is not None:
            refuse_padding()
        return super().gather(kwargs, state, prefix)


def _check_fused(blocks: list[tuple[str, nn.Module]]) -> None:
    for name, block in blocks:
        attentions = [m for m in block.modules() if words.FUSED.on(m)]
        if not attentions:
            raise UnsupportedModelError(
                f"the attention of {name} ({type(block).__name__}) has no fused form, so sizes could not reach it"
            )
        if not all(words.FUSED.need(a) for a in attentions):
            raise UnsupportedModelError(
                f"the attention of {name} is not fused; set fused_attn = True on it "
                "(timm.layers.set_fused_attn) and apply again"
            )


def _splits(block: nn.Module) -> bool:
    cls = host_class(block)
    return f"{cls.__module__}.{cls.__qualname__}" in SPLIT and set(cls.forward.__code__.co_names) <= SPLIT_NAMES


def _key_norm(block: Any) -> nn.Module:
    attn = words.SELF.need(block)
    if not isinstance(words.KEY_NORM.part(attn), nn.Module):
        raise UnsupportedModelError(f"{type(attn).__name__} hides its keys before rotary embedding")
    norm: nn.Module = words.KEY_NORM.need(attn)
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
        return rope.index_select(0, rows.reshape(-1)).view(b, 1, m, rope.shape[-1])
    if rope.ndim == 3:
        return rope.index_select(1, rows.reshape(-1)).view(rope.shape[0], b, m, rope.shape[-1]).transpose(0, 1)
    columns = rows[:, None, :, None].expand(b, rope.shape[1], m, rope.shape[3])
    return rope.expand(b, -1, -1, -1).gather(2, columns)


def gather_embeddings(table: Tensor, representative: Tensor, prefix: int) -> Tensor:
    """A table ``(B, N, C)`` of what belongs to each position, at the rows that are left."""
    return gather_rows(table.expand(len(representative), -1, -1), representative)


def _grid(model: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    embed = words.PATCHES.need(model)
    if GEMMA in _names(model):
        return int(shape[-2]) // int(words.PATCH.need(embed)[0]), int(shape[-1]) // int(words.PATCH.need(embed)[1])
    if words.ANY_GRID.on(embed):
        h, w = words.ANY_GRID.need(embed)(tuple(shape[-2:]))
        return int(h), int(w)
    h, w = words.GRID.need(embed)
    return int(h), int(w)


def _tokens(model: Any, shape: tuple[int, ...]) -> int:
    h, w = _grid(model, shape)
    return h * w + int(words.PREFIX.need(model))


def _outside(model: Any, shape: tuple[int, ...]) -> int:
    """Patch embedding and attention that pools over all tokens (counted on the meta device), and classifier."""
    heads = [word.part(model) for word in members.HEADS]
    head = sum(macs(m) for m in heads if isinstance(m, nn.Module))
    pooler = words.POOLER.part(model)
    if pooler is not None:
        head += module_macs(pooler, 1, _tokens(model, shape), int(members.WIDTH.need(model)))
    return module_macs(words.PATCHES.need(model), 1, *shape[-3:]) + head
