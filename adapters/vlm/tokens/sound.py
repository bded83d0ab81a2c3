"""Clips with sound: what the encoder of sound attends to, and the sites of what is seen and heard together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.kv.hooks import argument_names
from tokred.adapters.swap import Hook
from tokred.adapters.vlm.sites import Left, Place, leave, places
from tokred.adapters.vlm.taps import in_flight
from tokred.core.attention import Attention
from tokred.core.place import Place as At
from tokred.core.place import PlacedMethod
from tokred.errors import MissingInputError
from tokred.vlm.frames import moments
from tokred.vlm.sound import SoundSite, windows_of

if TYPE_CHECKING:
    from tokred.adapters.changes import Changes
    from tokred.adapters.vlm.forward import Forward


@dataclass
class Heard:
    """Notes of the last attention of an encoder of sound, while one forward runs.

    Attributes:
        attention: the module.
        lengths: ``(sounds,)`` rows of each sound in that attention.
        ends: ``(blocks + 1,)`` where the blocks begin and end that attend to themselves alone.
        heads: ``(T, C)`` queries and keys of all sounds, by "q" and "k".
    """

    attention: Any
    lengths: Tensor
    ends: Tensor | None
    heads: dict[str, Tensor]

    def scores(self) -> Tensor:
        """``(tokens,)`` float32: what each token receives, mean over heads and over the queries of its block.

        Raises:
            MissingInputError: something was not noted.
        """
        if self.ends is None or len(self.heads) < 2:
            raise MissingInputError("the attention of the sound's encoder was not noted: its layers ran without a hook")
        count, ends = words.TOWER_HEADS.need(self.attention), self.ends.tolist()
        rows = len(self.heads["q"])
        q, k = (self.heads[which].view(rows, count, -1).transpose(0, 1).unsqueeze(0) for which in "qk")
        found = []
        scale = words.SCALE.need(self.attention)
        for a, b in pairwise(ends):
            found.append(Attention(q[:, :, a:b], k[:, :, a:b], scale=scale).columns()[0].mean(0) / (b - a))
        # Features are means of two rows in a row of each sound; an odd last one goes into none.
        each = torch.split(torch.cat(found), self.lengths.tolist())
        return torch.cat([one[: len(one) // 2 * 2].view(-1, 2).mean(1) for one in each])


class EnterSound(Hook):
    """Hook before the encoder of sound: notes begin.

    Args:
        attention: the last one in it.
        names: arguments of its forward.
    """

    def __init__(self, attention: nn.Module, names: tuple[str, ...]) -> None:
        self.attention = attention
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths = words.SOUND_LENGTHS.of({**dict(zip(self.names, args, strict=False)), **kwargs})
        if in_flight.core is not None and lengths is not None:
            in_flight.core.call.heard = Heard(self.attention, lengths, None, {})


class EnterBlocks(Hook):
    """Hook before its last attention: where the blocks end."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = in_flight.core
        if run is not None and run.call.heard is not None:
            run.call.heard.ends = words.SEGMENTS.of({**dict(zip(self.names, args, strict=False)), **kwargs})


class SoundTap(Hook):
    """Hook after a projection of that attention to queries, "q", or keys, "k"."""

    def __init__(self, which: str) -> None:
        self.which = which

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        run = in_flight.core
        if run is not None and run.call.heard is not None:
            run.call.heard.heads[self.which] = output.detach()


def listen(encoder: Any, changes: Changes) -> None:
    """Note the last attention of an encoder of sound."""
    attention = words.ATTENTION.need(words.LAYERS.need(encoder)[-1])
    changes.before(encoder, EnterSound(attention, argument_names(encoder)), with_kwargs=True)
    changes.before(attention, EnterBlocks(argument_names(attention)), with_kwargs=True)
    for which, word in (("q", words.QUERY), ("k", words.KEY)):
        changes.after(word.need(attention), SoundTap(which))


def with_sound(forward: Forward, method: PlacedMethod, left: Left) -> Left:
    """The tokens of each clip and its sound that a method leaves.

    Args:
        forward: with placeholders.
        method: that acts on clips with sound.
        left: what is left so far.

    Raises:
        MissingInputError: which tokens are sound is not known, or what they receive.
    """
    sound, scores = forward.call.sound, None
    if sound is None:
        raise MissingInputError(f"{method.name!r} has to know which tokens are sound: give input_ids")
    for modality in forward.call.modalities:
        columns = modality.visual.nonzero()[:, 1]
        for place in places(modality):
            if place.part.frames is None:
                continue
            seen = columns[place.first + place.part.where.offsets(columns.device)]
            where = _stretch(seen, sound[place.sample])
            if not method.acts(len(where), At(0, 1)):
                continue
            # Made once for all clips, and only where one has sound.
            if scores is None and bool(sound[place.sample, where].any()):
                scores = _scores(forward, sound)
            site = _site(forward, place, where, seen, sound, scores)
            with torch.no_grad():
                step = method.reduce(site)
            left = leave(left, [place], where.unsqueeze(0), site, step, "x")
    return left


def _stretch(seen: Tensor, sound: Tensor) -> Tensor:
    """``(N,)`` columns of a clip and of the sound between its tokens, or right behind them.

    Args:
        seen: ``(n,)`` columns of the clip.
        sound: ``(L,)`` bool.
    """
    place = torch.arange(len(sound), device=sound.device)
    last = int(seen[-1])
    behind = int((~sound[last + 1 :]).cumsum(0).eq(0).sum())
    inside = (place > seen[0]) & (place <= last + behind)
    mine = torch.zeros_like(sound)
    mine[seen] = True
    return (mine | (inside & sound)).nonzero().squeeze(1)


def _scores(forward: Forward, sound: Tensor) -> Tensor:
    """``(B, L)`` float32: what tokens of sound receive."""
    noted: Heard | None = forward.call.heard
    found = None if noted is None else noted.scores().to(sound.device)
    count = int(sound.sum())
    if found is None or len(found) != count:
        had = "none were made in this forward" if found is None else f"{len(found)} were made"
        raise MissingInputError(
            f"the prompt has {count} places for tokens of sound, but {had}: give input_features and their mask"
        )
    return torch.zeros(sound.shape, device=sound.device).masked_scatter(sound, found)


def _site(
    forward: Forward, place: Place, where: Tensor, seen: Tensor, sound: Tensor, scores: Tensor | None
) -> SoundSite:
    part, sample = place.part, place.sample
    here = sound[sample, where]
    moment = torch.zeros(len(where), 2, dtype=torch.long, device=where.device)
    moment[~here] = moments(part.count, part.count // (part.frames or 1), where.device)
    return SoundSite(
        x=lambda: forward.embeds.detach()[sample, where].unsqueeze(0),
        sound=here,
        window=windows_of(here),
        moment=moment,
        heard=None if scores is None else scores[sample, where].unsqueeze(0),
        grid=part.grid,
        frames=part.frames,
        sample=(sample,),
        image=(place.image,),
    )
