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

from tokred.adapters.contract import members, terms, words
from tokred.adapters.encoder.block import SETTINGS, Recipe, Settings, attention_bias, refuse_symbols
from tokred.adapters.encoder.host import EncoderHost, argument_names
from tokred.adapters.encoder.running import LayerRecord
from tokred.adapters.encoder.sides import convolution
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.encoder.transformers_tables import DIVIDED_NAMES
from tokred.adapters.encoder.windows import project
from tokred.adapters.linear import macs as macs_of
from tokred.adapters.swap import host_class
from tokred.core.place import Place
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.errors import UnsupportedModelError


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
            rows = wide(x, t)
            state, fitted = shared.fitted(layer, shared.carried(layer, x), rows)
            x = x if fitted is rows else narrow(fitted, t)
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
        hidden = members.MLP_FIRST.need(block)(members.MLP_NORM.need(block)(x))
        x = x + members.DEPTH_OF_BOTH.need(block)(members.MLP_LAST.need(block)(hidden))
        if acts and late:
            state, x = self._reduce(block, settings, state, heads, x)
        return x, state

    def _time(self, block: Any, x: Tensor) -> Tensor:
        """Output of each position's attention over its frames, to be added to the tokens; zero for the class token."""
        b, c = x.shape[0], x.shape[-1]
        rows = x[:, 1:].reshape(-1, self.frames, c)
        y = members.TIME.need(block)(members.TIME_NORM.need(block)(rows))[0]
        y = members.DEPTH_OF_BOTH.need(block)(y)
        return F.pad(members.TIME_OUTPUT.need(block)(y.reshape(b, -1, c)), (0, 0, 1, 0))

    def _space(
        self, block: Any, settings: Settings, state: TokenState, x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Output of the attention inside each frame, to be added; queries, keys and values ``(B * T, H, 1 + P, D)``."""
        b, c, t = x.shape[0], x.shape[-1], self.frames
        patches = x[:, 1:].reshape(b, -1, t, c).transpose(1, 2).reshape(b * t, -1, c)
        rows = torch.cat([x[:, :1].repeat_interleave(t, 0), patches], 1)
        around = members.SPACE.need(block)
        attention = members.SPACE_ITSELF.need(around)
        heads = project(attention, members.SPACE_NORM.need(block)(rows), words.TOWER_HEADS.need(attention))
        bias = attention_bias(state, settings.shared.method.proportional)
        mask = None if bias is None else bias.to(x.dtype).repeat_interleave(t, 0)
        scale = members.FACTOR.need(attention)
        dropout = members.DROPOUT_INSIDE.need(attention).p if attention.training else 0.0
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout, scale=scale)
        y = members.SPACE_OUTPUT.need(around)(y.transpose(1, 2).flatten(2))
        y = members.DEPTH_OF_BOTH.need(block)(y)
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
            scale=members.FACTOR.need(members.SPACE_ITSELF.need(members.SPACE.need(block))),
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

    def spent(self, layer: int, before: int, after: int, method: BlockMethod | None) -> int:
        return self.macs(self.blocks[layer][1], before, after, self.middle(method))

    def counted(self, layer: int, record: LayerRecord, method: BlockMethod) -> tuple[int, int]:
        block, n = self.blocks[layer][1], record.state.length
        ran = self.macs(block, record.tokens_in, record.tokens_out, self.middle(method))
        return ran, self.macs(block, n, n, True)

    def macs(self, block: Any, before: int, after: int, middle: bool) -> int:
        """Multiply-adds of one clip in a block: attention and a matrix over time, attention in space, MLP."""
        t, width = self.clip, int(members.TIME_OUTPUT.need(block).in_features)
        time = t * (before - 1) * (macs_of(members.TIME.need(block)) + width * width + 2 * t * width)
        space = t * before * (macs_of(members.SPACE.need(block)) + 2 * before * width)
        rows = 1 + t * ((after if middle else before) - 1)
        return time + space + rows * (macs_of(members.MLP_FIRST.need(block)) + macs_of(members.MLP_LAST.need(block)))


def divided_host(model: Any, around: Callable[[tuple[int, ...]], tuple[int, int]]) -> EncoderHost:
    """The host record of a ``TimesformerModel``.

    Args:
        model: the encoder.
        around: positions of a frame, and multiply-adds outside the blocks, for an input shape.

    Raises:
        UnsupportedModelError: its attention is not divided, or its blocks are composed otherwise than is known here.
    """
    config, encoder = words.CONFIG.need(model), members.DIVIDED_ENCODER.need(model)
    blocks, kind = list(members.DIVIDED_LAYERS.need(encoder)), words.DIVIDED.need(config)
    if kind not in terms.IN_TIME_AND_SPACE.names:
        raise UnsupportedModelError(
            f"transformers' TimeSformer runs attention_type={kind!r}, whose attention is written out "
            f"and takes no token sizes; only {terms.IN_TIME_AND_SPACE.name!r} is composed here"
        )
    # The block is composed again here, so whatever a later version adds to its forward would be left out in silence.
    for module in (blocks[0], members.SPACE_ITSELF.need(members.SPACE.need(blocks[0]))):
        used = set(inspect.unwrap(host_class(module).forward).__code__.co_names)
        if not used <= DIVIDED_NAMES:
            raise UnsupportedModelError(
                f"the forward of {host_class(module).__name__} is not the one that is known here: it also uses "
                f"{', '.join(sorted(used - DIVIDED_NAMES))}"
            )
    size, patch = words.IMAGE.need(config), words.PATCH.need(config)
    frames = words.FRAMES.need(config)
    path = f"{members.DIVIDED_ENCODER.spelled(model)}.{members.DIVIDED_LAYERS.spelled(encoder)}"
    return DividedHost(
        family="transformers TimesformerModel",
        model=model,
        blocks=[(f"{path}.{i}", block) for i, block in enumerate(blocks)],
        recipe=DividedRecipe(frames, argument_names(blocks[0])),
        prefix=1,
        supplies=frozenset({"x", "q", "k", "v", "class_attention", "attention", "grid"}),
        pooled=False,
        grid=(size // patch, size // patch),
        origin=convolution(members.EMBEDDINGS.need(model)),
        tokens=lambda shape: around(shape)[0] + 1,
        outside_macs=lambda shape: around(shape)[1],
        clip=frames,
    )
