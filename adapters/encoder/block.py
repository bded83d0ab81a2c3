"""A patched block: the host's own block, run with fewer tokens.

Each block keeps its parameters, name and place; its class is exchanged for a subclass that adds the steps here. Where
its composition is known, tokens are reduced between attention and MLP; everywhere else after it. The host's own forward
runs untouched when there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.adapters.encoder.capture import Capture
from tokred.adapters.encoder.masks import PADDED as PADDED
from tokred.adapters.encoder.masks import refuse_padding as refuse_padding
from tokred.adapters.encoder.masks import seen, visible
from tokred.adapters.encoder.state import Shared, TokenState
from tokred.adapters.encoder.taps import KeyTap
from tokred.adapters.linear import value_transform
from tokred.adapters.swap import SETTINGS as SETTINGS
from tokred.core.learned import Learned
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.site import Site
from tokred.encoder.padding import reduce_each
from tokred.errors import UnsupportedModelError
from tokred.kernels.attention import size_bias

Gather = Callable[[dict[str, Any], TokenState, int], dict[str, Any]]


class Recipe:
    """How the blocks of one host class are run; data and small functions, shared by all blocks of a model.

    Args:
        split: the block is a pre-norm composition of ``norm1, attn, norm2, mlp`` that may be split in the middle.
        positions: names of keyword arguments that hold rotary tables or ids, and how to gather them.
        argument_names: parameter names of the host block's forward after the tokens, for positional arguments.
    """

    def __init__(self, split: bool, positions: dict[str, Callable[..., Any]], argument_names: tuple[str, ...]) -> None:
        self.split = split
        self.positions = positions
        self.argument_names = argument_names
        # Whether tokens that a mask hides are padding, which leaves before any other.
        self.drops_hidden = False

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """The arguments with their position data at the rows that are left."""
        if state.representative is None or not self.positions:
            return kwargs
        given = {name: fn for name, fn in self.positions.items() if kwargs.get(name) is not None}
        return {**kwargs, **{name: fn(kwargs[name], state.representative, prefix) for name, fn in given.items()}}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.argument_names, args, strict=False)), **kwargs}

    # Whether the capture sees each head's answer and can leave heads out.
    heads: ClassVar[bool] = True

    @property
    def supplies(self) -> frozenset[str]:
        """Inputs of a method that come from the way in which blocks are run."""
        if type(self).run is not Recipe.run:
            return frozenset()
        return frozenset({"carried", "module", "entry"} | ({"heads", "gates"} if self.heads else set()))

    def capture(self, block: nn.Module, bias: Tensor | None, state: TokenState) -> Capture:
        return Capture(bias, state.length, state.representative)

    def real(self, kwargs: dict[str, Any], x: Tensor) -> Tensor | None:
        """``(B, N)`` bool over the original tokens, False on those that the host's own mask hides; None: it hides none.

        Raises:
            UnsupportedModelError: it hides pairs of tokens, not tokens.
        """
        mask = words.BLOCK_MASK.of(kwargs)
        return None if mask is None else visible(seen(mask), len(x), words.BLOCK_MASK.name)

    def run(self, block: Any, host_forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
        """One forward of a patched block. Hosts whose blocks are no chain over one token sequence have their own."""
        refuse_symbols(x)
        return run_block(block, host_forward, x, args, kwargs)


def refuse_symbols(x: Any) -> None:
    """Raise where torch.fx traces a block, since it cannot write down how many tokens are left and their state.

    Raises:
        UnsupportedModelError: ``x`` is a symbol, not a tensor.
    """
    if isinstance(x, torch.fx.Proxy):
        raise UnsupportedModelError(
            "torch.fx cannot trace into a patched block: trace with timm.models.create_feature_extractor or "
            "get_graph_node_names, which take it as a leaf (a tracer of your own does if its leaf_modules hold "
            "tokred.adapters.encoder.block.Leaf), or export the model with torch.export.export"
        )


class _Leaves(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(getattr(module, "__dict__", {}).get(SETTINGS), Settings)


class Leaf(metaclass=_Leaves):
    """The class of all patched blocks, to ``isinstance``: tracers are told by class which modules are leaves."""


class Settings:
    """Settings of one patched block: its place, the model's shared state and its recipe."""

    def __init__(self, shared: Shared, layer: int, name: str, recipe: Recipe, tap: KeyTap | None, active: bool) -> None:
        self.shared = shared
        self.layer = layer
        self.site = str(layer)
        self.name = name
        self.recipe = recipe
        self.tap = tap
        self.active = active


def body(host: Any) -> dict[str, Any]:
    """Methods of a patched block's class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings: Settings | None = self.__dict__.get(SETTINGS)
        if settings is None:  # removed, but a wrapper that came later still calls this
            return host.forward(self, *args, **kwargs)
        settings.shared.watch.ran(settings.site)
        run = settings.recipe.run
        if args:
            return run(self, partial(host.forward, self), args[0], args[1:], kwargs)
        x = words.STATES.pop(kwargs)
        return run(self, partial(host.forward, self), x, (), kwargs)

    return {"forward": forward}


def run_block(block: Any, host_forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
    """One forward of a patched block."""
    settings: Settings = getattr(block, SETTINGS)
    shared, recipe = settings.shared, settings.recipe
    state, x = shared.enter(settings.layer, x)
    n, method = x.shape[1], shared.method
    place = Place(settings.layer, shared.depth, shared.prefix, shared.suffix)
    acts = settings.active and method.acts(n, place)
    if acts and method.where == "before":
        step, state = decide(settings, Capture(None, state.length, state.representative), state, x)
        state, x = follow(shared, step, state.lean(), x)
        acts = False
    bias = attention_bias(state, method.proportional)
    if not acts and bias is None and state.representative is None and state.heads is None and state.gate is None:
        out = host_forward(x, *args, **kwargs)
        y, rest = _first(out)
        return _again(shared.leave(settings.layer, y, state, n), rest)
    kwargs = recipe.bind(args, kwargs)
    state, hidden = look(recipe, kwargs, state, x, shared) if acts else (state, None)
    kwargs = recipe.gather(kwargs, state, shared.prefix)
    capture = recipe.capture(block, bias, state)
    capture.left, capture.gate, capture.hidden = state.heads, state.keys, hidden
    capture.watch_answers = acts and "heads" in method.reads
    rest = None
    if acts and recipe.split and method.where != "end":
        state, x = _first_half(block, settings, capture, state, x, kwargs)
        y = x + branch(block, words.MLP.need(block)(members.NORM2.need(block)(x)), 2)
    else:
        with capture:
            out = host_forward(x, **kwargs)
        y, rest = _first(out)
        check_capture(capture, settings)
        if acts:
            step, state = decide(settings, capture, state, y)
            capture.release()
            state, y = follow(shared, step, state, y)
    state, y = _unmoved(state).finish(y)
    if settings.tap is not None:
        settings.tap.take()  # keys that nobody asked for are not kept alive
    return _again(shared.leave(settings.layer, y, state, n), rest)


def _first_half(
    block: Any, settings: Settings, capture: Capture, state: TokenState, x: Tensor, kwargs: dict[str, Any]
) -> tuple[TokenState, Tensor]:
    """Attention, its residual, and the reduction between it and the MLP."""
    shared = settings.shared
    normed, attention = members.NORM1.need(block)(x), words.SELF.need(block)
    capture.transform = lambda: transformed(attention, normed, capture)
    if shared.method.where != "queries":
        with capture:
            x = x + branch(block, attention(normed, **kwargs), 1)
        check_capture(capture, settings)
        step, state = decide(settings, capture, state, x)
        capture.release()
        return follow(shared, step, state, x)
    # Queries can only be left out inside the attention, once they and the keys are there and before they are used.
    before, known = x, [state]

    def decision() -> Reduction:
        step, known[0] = decide(settings, capture, state, before)
        return step

    capture.decide = decision
    capture.size = state.size
    with capture:
        y = attention(normed, **kwargs)
    check_capture(capture, settings)
    taken, state = capture.step, known[0]
    capture.release()
    if taken is None or taken.trivial:
        state = state if taken is None else follow(shared, taken, state, x)[0]
        return state, x + branch(block, y, 1)
    after, x = follow(shared, taken, state, x)
    # Answers come back at the old length, as the host reshapes them; those that count stand at the representatives.
    return after, x + branch(block, taken.gather(y), 1)


def look(
    recipe: Recipe, kwargs: dict[str, Any], state: TokenState, x: Tensor, shared: Shared
) -> tuple[TokenState, Tensor | None]:
    """The state with what the host's mask hides, or ``(B, M)`` bool: the rows that it hides, which stay as they are.

    They go on asking like all others, and what they answer may be read; only nobody sees them, or merges with them.
    """
    moved = state.representative
    if recipe.drops_hidden and (moved is not None or state.mask is not None):
        return state, None
    real = recipe.real(kwargs, x)
    if real is None:
        return state, None
    if recipe.drops_hidden:
        return replace(state, mask=real, lengths=real.sum(1)), None
    if shared.suffix:
        refuse_padding()
    protected = torch.arange(real.shape[1], device=real.device) < shared.prefix
    real = real | protected
    state = state if state.lengths is not None else replace(state, lengths=real.sum(1))
    hidden = ~real if moved is None else ~real.gather(1, moved)
    return state, hidden


def attention_bias(state: TokenState, proportional: bool) -> Tensor | None:
    """``(B, 1, 1, M)`` log of the sizes, and -inf on padding; None where every row counts the same."""
    if proportional and state.size is not None:
        return size_bias(state.size, torch.float32)
    if state.mask is not None:
        return size_bias(state.mask.float(), torch.float32)
    return None


def _unmoved(state: TokenState) -> TokenState:
    """The state without its padding while no token has moved, since the host's own mask still hides it."""
    moved = state.representative is not None or state.mask is None
    return state if moved else replace(state, mask=None, lengths=None)


def _check_traced(name: str, module: nn.Module) -> None:
    # Weights outside of the model are constants of a trace, which may not need gradients; torch prints them all.
    tracing: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if tracing and any(p.requires_grad for p in module.parameters()):
        raise UnsupportedModelError(
            f"torch.jit.trace cannot hold the weights of {name!r} while they learn: use torch.export, or freeze them "
            "first with `for p in tokred.parameters(model): p.requires_grad_(False)`"
        )


def decide(settings: Settings, capture: Capture, state: TokenState, x: Tensor) -> tuple[Reduction, TokenState]:
    """The method's reduction at this block, and the state with what the method keeps for later blocks."""
    shared, hidden = settings.shared, capture.hidden
    if capture.causal:
        raise UnsupportedModelError("causal attention cannot carry fewer tokens: their order is not kept")
    learned = Learned(shared.module, state.gate)
    if shared.module is not None:
        _check_traced(shared.method.name, shared.module)
    if hidden is not None and (learned.training or shared.method.sums):
        raise UnsupportedModelError(f"{shared.method.name!r} cannot {'learn' if learned.training else 'run'} on these "
                                    f"inputs: {PADDED}")  # fmt: skip
    tapped = settings.tap.take() if settings.tap is not None else None
    real = state.mask
    if hidden is not None:
        real = ~hidden if real is None else real & ~hidden
        hidden = hidden if state.mask is None else hidden & state.mask
    site = Site(
        x=x,
        q=lambda: capture.q,
        k=tapped if tapped is not None else lambda: capture.k,
        v=lambda: capture.v,
        attention=lambda: capture.attention(real),
        transform=capture.transform,
        sizes=state.size,
        mask=real,
        prefix=shared.prefix,
        suffix=shared.suffix,
        grid=state.grid,
        frames=state.frames,
        motion=lambda: state.motion(shared.prefix, shared.suffix),
        pixels=None if state.sides is None else state.sides.pixels,
        positions=state.representative,
        length=state.length,
        class_token=shared.class_token,
        layer=settings.layer,
        depth=shared.depth,
        totals=state.lengths,
        answers=lambda: capture.answers,
        alive=state.heads,
        learned=learned,
        rows=None if state.rows is None else dict(state.rows),
        notes=None if state.notes is None else dict(state.notes),
    )
    method = shared.method
    # Samples with different numbers of real tokens are asked one by one: most methods would merge padding into them.
    padded = site.mask is not None and state.lengths is not None and not method.by_mask
    alone = padded or hidden is not None
    step = reduce_each(method, site, hidden) if alone else method.reduce(site)
    shared.collect(learned)
    if site.rows or site.notes or site.alive is not None:
        state = replace(state, heads=site.alive, rows=site.rows, notes=site.notes)
    return step, state


def follow(shared: Shared, step: Reduction, state: TokenState, x: Tensor) -> tuple[TokenState, Tensor]:
    """The state and the tokens after the reduction that the method chose."""
    if step.gate is not None:
        state = state.soften(step)
    if step.trivial:
        return state, x
    return state.advance(step, x, shared.keeps_dropped(state))


def transformed(attn: Any, normed: Tensor, capture: Capture) -> tuple[Tensor, Tensor]:
    """The attention's normalised input, and what its value and output projections make of each token alone."""
    q, v = capture.q, capture.v
    assert q is not None  # asked for after the attention has run
    assert v is not None
    return normed, value_transform(attn, normed, v, q.shape[1])


def check_capture(capture: Capture, settings: Settings) -> None:
    """Attention that the capture did not see has neither the bias nor the rows right: never go on silently."""
    if capture.calls == 0:
        raise UnsupportedModelError(
            f"the attention of {settings.name} did not run F.scaled_dot_product_attention, so sizes could not reach "
            "it; switch the host to fused attention (timm: fused_attn, transformers: attn_implementation='sdpa')"
        )


def branch(block: Any, y: Tensor, i: int) -> Tensor:
    """Layer scale and stochastic depth of the first or second residual branch, whichever the block has."""
    scale, gamma = members.SCALES[i - 1].part(block), members.GAMMAS[i - 1].part(block)
    if scale is not None:
        y = scale(y)
    if gamma is not None:
        y = gamma * y
    out: Tensor = members.DEPTHS[i - 1].need(block)(y)
    return out


def _first(out: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    return (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, None)


def _again(y: Tensor, rest: tuple[Any, ...] | None) -> Any:
    return y if rest is None else (y, *rest)
