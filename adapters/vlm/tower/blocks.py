"""Blocks of a tower that run on the frames that are left, and put out all frames again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import members, words
from tokred.adapters.encoder.packed.host import PackedHost
from tokred.adapters.encoder.packed.layout import Folding, Layout, PackedState
from tokred.adapters.encoder.packed.run import PackedRecipe
from tokred.adapters.encoder.packed.transformers import match as match_packed
from tokred.adapters.kv.hooks import argument_names
from tokred.adapters.passes import in_backward
from tokred.adapters.swap import SETTINGS
from tokred.adapters.vlm.families import (
    Facts,
    class_tokens,
    feature_layer,
    part,
    projections,
    tower_attention,
    tower_layers,
)
from tokred.adapters.vlm.taps import FusedTap, HeadTap, TablesTap, Tap, in_flight, is_fused, received
from tokred.adapters.vlm.tower.film import Film, film_of
from tokred.core.attention import Attention
from tokred.core.method import Method
from tokred.errors import UnsupportedModelError
from tokred.vlm.shots import FrameMerger


@dataclass(frozen=True, eq=False)
class Tower:
    """A tower whose blocks may run on fewer frames.

    Attributes:
        module: the tower.
        blocks: in order.
        used: the block whose output the features are.
        prefix: class tokens before the patches.
        packed: of a tower that holds all frames in one sequence; None: a frame is a row of its batch.
    """

    module: nn.Module
    blocks: list[nn.Module]
    used: int
    prefix: int
    packed: PackedHost | None

    @property
    def whole(self) -> list[int]:
        """Blocks whose attention says something about whole frames."""
        recipe = None if self.packed is None else self.packed.recipe
        some = recipe.whole if isinstance(recipe, PackedRecipe) else None
        return [i for i in range(self.used + 1) if some is None or i in some]

    def scored(self, layers: tuple[int, ...]) -> int:
        """The block whose attention scores tokens: the last where frames merge, or the first after it without windows.

        Raises:
            StopIteration: there is none.
        """
        return next(i for i in self.whole if i >= layers[-1])


def tower_of(core: Any, facts: Facts) -> Tower | None:
    """The tower of a model, where frames may leave inside it; None where nobody knows how."""
    module = part(core, facts.tower)
    packed = match_packed(module)
    if isinstance(packed, PackedHost):
        recipe = packed.recipe
        assert isinstance(recipe, PackedRecipe)  # of every such host
        # Images that a mask tells apart are no clips, and frames that see each other none that could leave.
        if recipe.batched or packed.folding.joint or not is_fused(words.SELF.part(packed.blocks[0][1])):
            return None
        return Tower(module, [block for _, block in packed.blocks], packed.depth - 1, 0, packed)
    layers = tower_layers(core, facts)
    if not layers:
        return None
    return Tower(module, layers, feature_layer(core, len(layers)), class_tokens(core, facts), None)


def check_layers(method: Method, core: Any, facts: Facts, family: str) -> None:
    """Refuse a method that names blocks of the tower which it does not have.

    Raises:
        ValueError: with those that it has.
    """
    named = getattr(method, "tower_layers", ())
    depth = len(tower_layers(core, facts)) if named and core is not None else 0
    wrong = [i for i in named if not -depth <= i < depth]
    if wrong:
        raise ValueError(
            f"{method.name!r} reads layer {wrong[0]} of the vision tower, but that of {family} has {depth} "
            f"(0 to {depth - 1})"
        )
    if not isinstance(method, FrameMerger):
        return
    tower = tower_of(core, facts)
    assert tower is not None  # it supplies what the method reads
    if method.layers[-1] > tower.used:
        raise ValueError(
            f"{method.name!r} merges frames behind block {method.layers[-1]} of the vision tower, but {family} takes "
            f"its features behind block {tower.used}: take layers from 0 to {tower.used}"
        )
    if not [i for i in tower.whole if i >= method.layers[-1]]:
        raise ValueError(
            f"{method.name!r} scores tokens by block {method.layers[-1]} of the vision tower or the first after it "
            f"that attends to whole frames, but in {family} these are {', '.join(map(str, tower.whole))}: take layers "
            f"up to {tower.whole[-1]}"
        )


def hang(method: FrameMerger, core: Any, facts: Facts, changes: Changes) -> None:
    """Let the tower's blocks run on the frames that are left. :func:`check_layers` has passed."""
    tower = tower_of(core, facts)
    assert tower is not None  # see check_layers
    scored = tower.scored(method.layers)
    block: Any = tower.blocks[scored]
    if tower.packed is not None:
        attention: Any = words.SELF.need(block)
        changes.before(attention, TablesTap(), with_kwargs=True)
        changes.after(words.TOGETHER.need(attention), FusedTap())
    else:
        attention = tower_attention(block)
        heads = int(words.TOWER_HEADS.part(attention) or words.HEADS.need(attention))
        norms = {"q": words.QUERY_NORM.part(attention), "k": words.KEY_NORM.part(attention)}
        for which, projection in projections(attention).items():
            norm = norms[which]
            changes.after(norm if isinstance(norm, nn.Module) else projection, HeadTap(scored, which, heads))
    packed = tower.packed
    recipe = None if packed is None else packed.recipe
    seat = Seat(
        method, 0, scored, argument_names(tower.blocks[0]), tower.prefix, members.FACTOR.part(attention),
        recipe if isinstance(recipe, PackedRecipe) else None, None if packed is None else packed.folding,
    )  # fmt: skip
    for i, one in enumerate(tower.blocks):
        changes.swap(one, body, seat._replace(layer=i))


class Seat(NamedTuple):
    """A block's place in its tower.

    Attributes:
        method: that decides.
        layer: the block's number.
        scored: number of the block whose attention scores tokens.
        names: of the arguments of a block, the states first.
        prefix: class tokens before the patches.
        scale: of the attention's logits; None: by the width of its heads.
        recipe, folding: of a tower that holds all frames in one sequence; None: a frame is a row of its batch.
    """

    method: FrameMerger
    layer: int
    scored: int
    names: tuple[str, ...]
    prefix: int
    scale: float | None
    recipe: PackedRecipe | None
    folding: Folding | None


def body(host: Any) -> dict[str, Any]:
    """The forward of a block: frames that became one come once, and all are there again behind it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat: Seat | None = self.__dict__.get(SETTINGS)
        if seat is None:  # removed, but a wrapper that came later still calls this
            return host.forward(self, *args, **kwargs)
        tap = in_flight.tap
        if tap is None and in_backward():
            raise UnsupportedModelError(
                f"{seat.method.name!r} cannot run in a vision tower whose blocks are computed twice: call "
                "model.gradient_checkpointing_disable(), or train without it"
            )
        film = None
        if tap is not None:
            if seat.layer == 0:
                x = args[0] if args else kwargs[seat.names[0]]
                tap.film = film_of(seat.method, tap, x.shape[0])
            film = tap.film
        if tap is None or film is None:
            return host.forward(self, *args, **kwargs)
        if film.kept is not None:
            args, kwargs = (), shorter(seat, film, tap, dict(zip(seat.names, args, strict=False)) | kwargs)
        return longer(seat, film, tap, host.forward(self, *args, **kwargs))

    return {"forward": forward}


def shorter(seat: Seat, film: Film, tap: Tap, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a block for the frames that are left."""
    assert film.kept is not None
    assert film.back is not None
    x: Tensor = given.pop(seat.names[0])
    if seat.folding is None or seat.recipe is None:
        # What each frame has of its own, such as a mask.
        n = len(film.back)
        own = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 1 and v.shape[0] == n}
        given = {**given, **{k: v.index_select(0, film.kept) for k, v in own.items()}}
    else:
        # Where frames and windows end has to be told anew.
        if film.layout is None:
            grids = [(int(t), int(high), int(wide)) for t, high, wide in words.VIDEO_GRIDS.at(tap.given).tolist()]
            film.layout = Layout.of(grids, seat.folding, x.device)
        state = replace(PackedState.begin(film.layout), kept=film.kept)
        given = seat.recipe.shorter(given, state, seat.layer)[0]
    return {seat.names[0]: x.index_select(0, film.kept), **given}


def longer(seat: Seat, film: Film, tap: Tap, output: Any) -> Any:
    """A block's output for all frames, behind what the method decides there."""
    # Some blocks put out a tuple, the states first.
    x: Tensor = output if isinstance(output, Tensor) else output[0]
    scores = received_of(seat, film, tap) if seat.layer == seat.scored else None
    if seat.layer in seat.method.layers:
        x = film.merge(x, scores)
    if scores is not None:
        film.judge(x, scores)
    if film.back is None:
        return output
    x = x.index_select(0, film.back)
    return x if isinstance(output, Tensor) else (x, *output[1:])


def received_of(seat: Seat, film: Film, tap: Tap) -> list[Tensor]:
    """``(T', N)`` float32 of each clip: what patches, or tokens, receive from their frame, mean over heads."""
    if seat.folding is None:
        q, k = (tap.heads.pop((seat.scored, which)) for which in "qk")
        found = Attention(q, k, scale=seat.scale).columns().mean(1)[:, seat.prefix :]
        return list(torch.split(found, film.counts))
    fused, tap.fused = tap.fused, None
    assert fused is not None  # the attention has run
    grids, counts = words.VIDEO_GRIDS.at(tap.given).clone(), film.counts
    grids[:, 0] = torch.tensor(counts, device=grids.device)
    tower = members.TOWER.need(tap.core)
    return [received(fused, tower, grids, i).mean(0).view(count, -1) for i, count in enumerate(counts)]
