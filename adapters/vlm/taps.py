"""Notes on forwards in flight: what hooks tell each other, records of features, and the taps that make them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import arguments, members, words
from tokred.adapters.encoder.taps import split_heads
from tokred.adapters.swap import Hook, host_class
from tokred.adapters.vlm.layout import Picture
from tokred.core.attention import Attention
from tokred.vlm.clips import Runs

if TYPE_CHECKING:
    from weakref import WeakKeyDictionary

    from transformers import PreTrainedModel

    from tokred.adapters.vlm.forward import Forward
    from tokred.adapters.vlm.hooks import VisualSettings
    from tokred.adapters.vlm.tokens.sound import Heard
    from tokred.adapters.vlm.tower.film import Film
    from tokred.vlm.shots import Shots


class Fused(NamedTuple):
    """Noted parts of an attention with one projection for queries, keys and values (Qwen's towers).

    Attributes:
        attention: the module.
        projected: ``(T, 3 * H * D)`` its projection's output; None until that has run.
        tables: cosines and sines ``(T, D)``.
    """

    attention: Any
    projected: Tensor | None
    tables: tuple[Tensor, Tensor]


@dataclass
class Tap:
    """Notes of the taps while one feature getter runs.

    Attributes:
        core: the model with vision.
        given: arguments of the getter, by name.
        modality: "image" or "video".
        inputs: ``(rows, N, Ct)`` of the projector; None before it ran, and where the tower has it inside.
        heads: queries and keys of tower layers, by layer and "q" or "k"; see :class:`Record`.
        fused: of the tower's last attention, where that projects all at once.
        pixels: ``(S, F)`` patches that the tower was given, where a method reads them.
        film: frames of its clips in the tower, where a method merges them there.
    """

    core: Any
    given: dict[str, Any]
    modality: str
    inputs: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fused: Fused | None = None
    pixels: Tensor | None = None
    film: Film | None = None


@dataclass
class Record:
    """Features that one call of a getter gave, and how they came about.

    Attributes:
        pictures: in the order of the placeholders.
        tower: ``(rows, N, Ct)`` input of the projector, with its gradient, or None.
        heads: queries and keys ``(rows, H, P + N, D)`` of tower layers, by layer and "q" or "k".
        layer: which layer's features are used, of ``depth``.
        prefix: class tokens in them.
        scale: of the tower's attention.
        received: gives what the tokens of a picture receive, ``(H, N)``, by its number; None: see ``heads``.
        marks: ``(T,)`` int64 one number for each feature, by which it is found again.
        pixels: gives the pixels of a picture's tokens, ``(N, F)``, by its number; None: nobody asks, or they are not
            known.
        shots: what became of the frames of each clip in the tower, by the clip's first token among all of the call.
    """

    pictures: list[Picture]
    tower: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    layer: int = 0
    depth: int = 0
    prefix: int = 0
    scale: float | None = None
    received: Callable[[int], Tensor] | None = None
    marks: Tensor | None = None
    pixels: Callable[[int], Tensor] | None = None
    shots: dict[int, Shots] = field(default_factory=dict)


class Modality(NamedTuple):
    """Placeholders of one modality and the features that fill them.

    Attributes:
        visual: ``(B, L)`` bool.
        counts: placeholders of each sample.
        record: of the features; None where they were not made by the patched model.
        runs: of pictures that belong together, of each sample; None: every picture by itself.
    """

    visual: Tensor
    counts: tuple[int, ...]
    record: Record | None
    runs: Runs | None = None


@dataclass
class Call:
    """Facts of one forward that are known before its language model runs.

    Attributes:
        modalities: placeholders and their features; empty for text alone.
        mask: ``(B, all)`` the caller's padding mask, or None.
        end: tokens of the prompt where drafts follow, counted from the cache's begin; None: all.
        physical: ``(B, rows)`` the padding mask of the rows that layer 0 holds and of those that come, where masks for
            pairs of tokens are made outside the language model; None: elsewhere, or nothing is hidden.
        records: of the features that getters gave inside the forward, by modality.
        towers: whether the vision tower ran inside the forward, by a getter or without.
        entered: whether the hook before the language model has run.
        sound: ``(B, L)`` bool, the places of what is heard, where the model hears and ids tell them; else None.
        heard: notes of the attention of the encoder of sound; None: it did not run in the forward.
    """

    modalities: list[Modality] = field(default_factory=list)
    mask: Tensor | None = None
    end: int | None = None
    physical: Tensor | None = None
    records: dict[str, Record | None] = field(default_factory=dict)
    towers: bool = False
    entered: bool = False
    sound: Tensor | None = None
    heard: Heard | None = None

    def add(self, visual: Tensor, record: Record | None, runs: Runs | None) -> None:
        """Note the placeholders ``(B, L)`` of one modality, and its runs of pictures."""
        self.modalities.append(Modality(visual, tuple(visual.sum(1).tolist()), record, runs))

    def move(self, device: torch.device) -> None:
        """Everything to where the tokens are."""
        self.modalities = [one._replace(visual=one.visual.to(device)) for one in self.modalities]
        self.mask = None if self.mask is None else self.mask.to(device)
        self.physical = None if self.physical is None else self.physical.to(device)
        self.sound = None if self.sound is None else self.sound.to(device)


@dataclass(eq=False)
class CoreRun:
    """A forward of a model with vision that is under way.

    Attributes:
        module: the model with vision.
        call: what is known of the forward; the getters and the hook of the language model fill it.
        given: the arguments of ``module``, by name.
        settings: of the patch whose hook made this; another patch of the same language model is told apart by it.
        before: the forward around this one, which is under way again when this one ends.
    """

    module: nn.Module
    call: Call
    given: dict[str, Any]
    settings: VisualSettings
    before: CoreRun | None


@dataclass(eq=False)
class LanguageRun:
    """A forward of a language model that is under way.

    Attributes:
        module: the language model.
        forward: what leaves in it, and where.
        layers: the list of decoder layers that hands them out for ``forward``; None: no list is exchanged.
        before: the forward around this one, which is under way again when this one ends.
    """

    module: nn.Module
    forward: Forward
    layers: nn.Module | None
    before: LanguageRun | None


@dataclass(eq=False)
class InFlight(threading.local):
    """Everything that one thread knows of the forwards under way in it, and of the last one.

    Hooks see one module each, and nothing that a host hands from one to the next survives all of its versions and
    wrappers; what one hook tells another therefore goes through here. Each thread has its own fields, so that two
    threads can run two models, or the same one.

    Attributes:
        core: the innermost forward of a model with vision; None outside of all.
        language: the innermost forward of a language model; None outside of all.
        tap: notes of the feature getter that runs; None outside of all.
        labels: ``(B, L)`` int64, taken from the arguments of the model with a head until it is known which tokens are
            left; None: it was given none.
        done: the language model's forward that has ended, where labels wait for it.
        last: records of the features that this thread made last, by model and modality; None: it has made none.
        own_sizes: whether caches tell each layer's own sizes to those who make masks, see :func:`.columns.own_sizes`.
    """

    core: CoreRun | None = None
    language: LanguageRun | None = None
    tap: Tap | None = None
    labels: Tensor | None = None
    done: Forward | None = None
    last: WeakKeyDictionary[nn.Module, dict[str, Record | None]] | None = None
    own_sizes: bool = False


in_flight = InFlight()


@contextlib.contextmanager
def tapped(core: nn.Module, given: dict[str, Any], modality: str) -> Iterator[Tap]:
    """Inside, a feature getter runs, and hooks note what they see of it; those of a getter around it wait.

    Args:
        core: the model with vision.
        given: arguments of the getter, by name.
        modality: "image" or "video".
    """
    before = in_flight.tap
    tap = in_flight.tap = Tap(core, given, modality)
    try:
        yield tap
    finally:
        in_flight.tap = before


class ProjectorTap(Hook):
    """Hook before the projector: its input is noted, of a map ``(B, C, H, W)`` the cells row by row."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tap = in_flight.tap
        if tap is not None and tap.inputs is None and args:
            tap.inputs = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]


class TowerTap(Hook):
    """Hook after the vision tower: there are features in this forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if in_flight.core is not None:
            in_flight.core.call.towers = True


class HeadTap(Hook):
    """Hook after a projection of the tower's attention: queries or keys are noted.

    Args:
        layer: of the tower.
        which: "q" or "k".
        heads: to split the output into.
    """

    def __init__(self, layer: int, which: str, heads: int) -> None:
        self.layer = layer
        self.which = which
        self.heads = heads

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tap = in_flight.tap
        if tap is not None and output.ndim == 3:
            tap.heads[self.layer, self.which] = split_heads(output.detach(), self.heads)


class TablesTap(Hook):
    """Hook before the tower's last attention: its rotary tables are noted."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap = in_flight.tap
        tables = words.TABLES.of(kwargs)
        if tap is not None and tables is not None:
            tap.fused = Fused(module, None, tables)


class FusedTap(Hook):
    """Hook after that attention's one projection: its output is noted."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tap = in_flight.tap
        if tap is not None and tap.fused is not None:
            tap.fused = tap.fused._replace(projected=output.detach())


class PixelTap(Hook):
    """Hook before a tower of packed patches: its pixels are noted."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap = in_flight.tap
        if tap is not None:
            tap.pixels = args[0] if args else words.STATES.of(kwargs)


def pixels_of(patches: Tensor, tower: Any, grids: Tensor, picture: int) -> Tensor:
    """``(N, F)`` float32: the pixels of each token's patches, channel after channel.

    Args:
        patches: ``(S, F')`` of all pictures, those of one token together.
        tower: the vision tower.
        grids: ``(pictures, 3)`` frames, rows and columns of patches.
        picture: which one.
    """
    unit = int(words.JOINED.need(tower)) ** 2
    sizes = grids.prod(1).tolist()
    start = sum(sizes[:picture])
    own = patches[start : start + sizes[picture]].detach().float()
    channels = 3 if own.shape[1] % 3 == 0 else 1
    return own.view(-1, unit, channels, own.shape[1] // channels).transpose(1, 2).flatten(1)


def last_attention(core: PreTrainedModel) -> Any:
    """The attention of the tower's last block, where it is of this kind and attends to whole frames; else None."""
    # Qwen 2.5's blocks attend within windows, all but some; windowed columns say nothing about the whole frame.
    tower = members.TOWER.part(core)
    blocks = words.BLOCKS.part(tower)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    attention = words.SELF.part(blocks[-1])
    if not is_fused(attention):
        return None
    whole = words.WHOLE_BLOCKS.part(tower)
    return attention if whole is None or len(blocks) - 1 in whole else None


def is_fused(attention: Any) -> bool:
    """True for an attention whose one projection, and rotary tables, say what its columns are."""
    return attention is not None and words.TOGETHER.on(attention) and _rotary(attention) is not None


def _rotary(attention: Any) -> Any:
    return words.TOWER_TURN.part(sys.modules[host_class(attention).__module__])


def received(fused: Fused, tower: Any, grids: Tensor, picture: int) -> Tensor:
    """``(H, N)`` float32: what each token's patches receive from all patches of their frame.

    Args:
        fused: what was noted.
        tower: the vision tower.
        grids: ``(pictures, 3)`` frames, rows and columns of patches.
        picture: which one.
    """
    attention, projected, tables = fused
    assert projected is not None  # the attention has run
    unit = int(words.JOINED.need(tower)) ** 2
    sizes = grids.prod(1).tolist()
    start, count = sum(sizes[:picture]), sizes[picture]
    some = slice(start, start + count)
    frames = int(grids[picture, 0])
    q, k, _ = projected[some].reshape(count, 3, words.TOWER_HEADS.need(attention), -1).permute(1, 0, 2, 3).unbind(0)
    q, k = _rotary(attention)(q, k, tables[0][some], tables[1][some])
    q, k = (t.reshape(frames, count // frames, *t.shape[1:]).transpose(1, 2) for t in (q, k))
    scores = Attention(q, k, scale=words.SCALE.part(attention)).columns()
    scores = scores.transpose(0, 1).reshape(scores.shape[1], count // unit, unit).sum(-1)
    if not words.WHOLE_BLOCKS.on(tower):
        return scores
    from transformers.vision_utils import get_vision_window_index

    # Patches run in the order of their windows.
    sides = {word: word.need(tower) for word in (words.JOINED, words.SIDE, words.PATCH)}
    cells = arguments(get_vision_window_index, sides)
    order, _ = get_vision_window_index(grids, **cells)
    places = order[start // unit : (start + count) // unit].to(scores.device) - start // unit
    return torch.empty_like(scores).index_copy(1, places, scores)
