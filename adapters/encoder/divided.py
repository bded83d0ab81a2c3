"""TimeSformer: attention divided into time and space, so tokens stay a rectangle of positions and frames.

A method sees positions: one token a position, which holds that place in all frames at once, with the attention inside
the frames (its frames are so many more heads). What it decides is done in every frame alike. So a merged position is
one in each frame, the attention over time goes on along it, and the rectangle stays one.

The block is composed here of the host's own sub-modules, because its attention is written out by hand and takes no
sizes; a block that a host has changed is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.encoder.block import SETTINGS, Recipe, Settings, attention_bias, refuse_symbols
from tokred.adapters.encoder.host import EncoderHost, argument_names
from tokred.adapters.encoder.sides import convolution
from tokred.adapters.encoder.state import LayerRecord, TokenState
from tokred.adapters.encoder.windows import project
from tokred.adapters.linear import macs as macs_of
from tokred.adapters.swap import host_class
from tokred.core.place import Place
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.errors import UnsupportedModelError

KNOWN = {
    "config", "num_frames", "image_size", "patch_size", "shape", "size", "attention_type", "attention",
    "layernorm_before", "drop_path", "layernorm_after", "intermediate", "output", "reshape", "temporal_attention",
    "temporal_layernorm", "temporal_dense", "unsqueeze", "repeat", "permute", "torch", "cat", "mean",
    "qkv", "num_heads", "transpose", "scale", "softmax", "attn_drop",
}  # fmt: skip


def wide(x: Tensor, frames: int) -> Tensor:
    """``(B, 1 + P * T, C)`` to ``(B, 1 + P, T * C)``: a row a position; the class token stands there ``T`` times."""
    b, _, c = x.shape
    return torch.cat([x[:, :1].repeat(1, 1, frames), x[:, 1:].reshape(b, -1, frames * c)], 1)


def narrow(y: Tensor, frames: int) -> Tensor:
    """``(B, 1 + P, T * C)`` to ``(B, 1 + P * T, C)``, the inverse of :func:`wide`; the class token is the first."""
    b, c = y.shape[0], y.shape[-1] // frames
    return torch.cat([y[:, :1, :c], y[:, 1:].reshape(b, -1, c)], 1)


class DividedRecipe(Recipe):
    """Blocks of divided attention.

    Args:
        frames: ``T``.
    """

    def __init__(self, frames: int, argument_names: tuple[str, ...]) -> None:
        super().__init__(True, {}, argument_names)
        self.frames = frames

    def run(self, block: Any, host_forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
        """The host's own block while nothing has been reduced; else its parts."""
        refuse_symbols(x)
        settings: Settings = getattr(block, SETTINGS)
        shared, layer, t = settings.shared, settings.layer, self.frames
        if layer == 0:
            state = shared.begin(x, 1 + (x.shape[1] - 1) // t)
        else:
            state = shared.carried(layer, x)
            x = narrow(state.shorten(wide(x, t)), t) if state.exposed else x
        n = 1 + (x.shape[1] - 1) // t
        acts = settings.active and shared.method.acts(n, Place(layer, shared.depth, 1))
        rest: tuple[Any, ...] = ()
        if acts or state.representative is not None:
            if words.MAPS.of(self.bind(args, kwargs)):
                raise UnsupportedModelError("a block that runs on fewer tokens has no attention weights of all of them")
            y, state = self._composed(block, settings, state, x, acts)
        if state.representative is None:  # nothing to do, or nothing found: the host's own block
            y, *others = host_forward(x, *args, **kwargs)
            rest = tuple(others)
        shared.record(layer, n, 1 + (y.shape[1] - 1) // t, state)
        if shared.exposes(layer):
            y = narrow(state.restore(wide(y, t)), t) if state.steps else y
            state = state.with_exposed(len(state.steps) > 0)
        return (shared.attach(layer, y, state), *rest)

    def _composed(
        self, block: Any, settings: Settings, state: TokenState, x: Tensor, acts: bool
    ) -> tuple[Tensor, TokenState]:
        """The block from its parts: attention over time, attention in each frame, reduction and MLP."""
        x = x + self._time(block, x)
        place, heads = self._space(block, settings, state, x)
        x = x + place
        late = settings.shared.method.where == "end"
        if acts and not late:
            state, x = self._reduce(block, settings, state, heads, x)
        x = x + block.drop_path(block.output(block.intermediate(block.layernorm_after(x))))
        if acts and late:
            state, x = self._reduce(block, settings, state, heads, x)
        return x, state

    def _time(self, block: Any, x: Tensor) -> Tensor:
        """Output of each position's attention over its frames, to be added to the tokens; zero for the class token."""
        b, c = x.shape[0], x.shape[-1]
        rows = x[:, 1:].reshape(-1, self.frames, c)
        y = block.drop_path(block.temporal_attention(block.temporal_layernorm(rows))[0])
        return F.pad(block.temporal_dense(y.reshape(b, -1, c)), (0, 0, 1, 0))

    def _space(
        self, block: Any, settings: Settings, state: TokenState, x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Output of the attention inside each frame, to be added; queries, keys and values ``(B * T, H, 1 + P, D)``."""
        b, c, t = x.shape[0], x.shape[-1], self.frames
        patches = x[:, 1:].reshape(b, -1, t, c).transpose(1, 2).reshape(b * t, -1, c)
        rows = torch.cat([x[:, :1].repeat_interleave(t, 0), patches], 1)
        attention = block.attention.attention
        heads = project(attention, block.layernorm_before(rows), words.TOWER_HEADS.need(attention))
        bias = attention_bias(state, settings.shared.method.proportional)
        mask = None if bias is None else bias.to(x.dtype).repeat_interleave(t, 0)
        dropout = attention.attn_drop.p if attention.training else 0.0
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout, scale=attention.scale)
        y = block.drop_path(block.attention.output(y.transpose(1, 2).flatten(2)))
        own = y[:, :1].reshape(b, t, c).mean(1, keepdim=True)
        return torch.cat([own, y[:, 1:].reshape(b, t, -1, c).transpose(1, 2).reshape(b, -1, c)], 1), heads

    def _reduce(
        self, block: Any, settings: Settings, state: TokenState, heads: tuple[Tensor, Tensor, Tensor], x: Tensor
    ) -> tuple[TokenState, Tensor]:
        """The state and the tokens after the method's choice of positions, made in every frame alike."""
        shared, t = settings.shared, self.frames
        # Frames become so many more heads: one choice of positions has to serve them all.
        q, k, v = (h.reshape(-1, t * h.shape[1], *h.shape[2:]) for h in heads)
        bias = attention_bias(state, shared.method.proportional)
        rows = wide(x, t)
        site = Site(
            x=rows,
            q=q,
            k=k,
            v=v,
            bias=None if bias is None else bias[:, 0, 0],
            scale=block.attention.attention.scale,
            sizes=state.size,
            mask=state.mask,
            prefix=1,
            grid=state.grid,
            positions=state.representative,
            length=state.length,
            class_token=True,
            layer=settings.layer,
            depth=shared.depth,
        )
        step = shared.method.reduce(site)
        if step.trivial:
            return state, x
        state, rows = state.advance(step, rows, shared.keeps_dropped(state))
        return state, narrow(rows, t)


@dataclass(kw_only=True)
class DividedHost(EncoderHost):
    """TimeSformer. Tokens are counted as positions: those of one frame, and the class token.

    Attributes:
        clip: frames ``T``.
    """

    clip: int

    def plan(self, method: BlockMethod | None, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        n, rows = self.tokens(shape), []
        for layer, (_, block) in enumerate(self.blocks):
            after = n if method is None else method.tokens(n, Place(layer, self.depth, 1))
            rows.append((n, after, self.macs(block, n, after, self.middle(method))))
            n = after
        return rows

    def counted(self, layer: int, record: LayerRecord, method: BlockMethod) -> tuple[int, int]:
        block, n = self.blocks[layer][1], record.state.length
        ran = self.macs(block, record.tokens_in, record.tokens_out, self.middle(method))
        return ran, self.macs(block, n, n, True)

    def macs(self, block: Any, before: int, after: int, middle: bool) -> int:
        """Multiply-adds of one clip in a block: attention and a matrix over time, attention in space, MLP."""
        t, width = self.clip, int(block.temporal_dense.in_features)
        time = t * (before - 1) * (macs_of(block.temporal_attention) + width * width + 2 * t * width)
        space = t * before * (macs_of(block.attention) + 2 * before * width)
        rows = 1 + t * ((after if middle else before) - 1)
        return time + space + rows * (macs_of(block.intermediate) + macs_of(block.output))


def divided_host(model: Any, around: Callable[[tuple[int, ...]], tuple[int, int]]) -> EncoderHost:
    """The host record of a ``TimesformerModel``.

    Args:
        model: the encoder.
        around: positions of a frame, and multiply-adds outside the blocks, for an input shape.

    Raises:
        UnsupportedModelError: its attention is not divided, or its blocks are composed otherwise than is known here.
    """
    config, blocks = model.config, list(model.encoder.layer)
    if config.attention_type != "divided_space_time":
        raise UnsupportedModelError(
            f"transformers' TimeSformer runs attention_type={config.attention_type!r}, whose attention is written out "
            "and takes no token sizes; only 'divided_space_time' is composed here"
        )
    # The block is composed again here, so whatever a later version adds to its forward would be left out in silence.
    for module in (blocks[0], blocks[0].attention.attention):
        used = set(inspect.unwrap(host_class(module).forward).__code__.co_names)
        if not used <= KNOWN:
            raise UnsupportedModelError(
                f"the forward of {host_class(module).__name__} is not the one that is known here: it also uses "
                f"{', '.join(sorted(used - KNOWN))}"
            )
    size, patch = words.IMAGE.need(config), words.PATCH.need(config)
    return DividedHost(
        family="transformers TimesformerModel",
        model=model,
        blocks=[(f"encoder.layer.{i}", block) for i, block in enumerate(blocks)],
        recipe=DividedRecipe(config.num_frames, argument_names(blocks[0])),
        prefix=1,
        supplies=frozenset({"x", "q", "k", "v", "class_attention", "attention", "grid"}),
        pooled=False,
        grid=(size // patch, size // patch),
        origin=convolution(model.embeddings),
        tokens=lambda shape: around(shape)[0] + 1,
        outside_macs=lambda shape: around(shape)[1],
        clip=config.num_frames,
    )
