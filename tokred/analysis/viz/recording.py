"""Recordings of one forward of each method: maps of the groups of patches that every block left of every image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred import adapters, api
from tokred.core.method import Method
from tokred.core.reduction import Reduction
from tokred.core.settings import parse_setting
from tokred.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.encoder.host import EncoderHost
    from tokred.adapters.encoder.state import Shared

BATCH = 8


@dataclass(frozen=True)
class Run:
    """One method on all images. Stage 0 is before the first block, stage ``s`` after block ``s``, from 1.

    Attributes:
        label: method and setting.
        groups: ``(B, stages, P)`` int32: for each patch the patch that stands for its token, -1 where it was pruned.
            A group keeps its number from block to block while its token stays where it is.
        tokens: ``(B, stages)`` int64, real tokens of each image, protected ones included, padding not.
        macs: ``(B, stages)`` int64, multiply-adds of the blocks so far, at the tokens of each image alone.
        soft: tokens were handed out in shares; each patch is then in the group that got the largest one.
        answers: the class that the model gives each image, with its probability; empty where it gives none.
    """

    label: str
    groups: Tensor
    tokens: Tensor
    macs: Tensor
    soft: bool
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """Methods on a batch of images.

    Attributes:
        family: of the model.
        pixels: ``(B, 1 or 3, H, W)`` uint8, what is drawn.
        names: of the images.
        grid: rows and columns of patches.
        length: tokens before the first block.
        base: multiply-adds of the unpatched blocks so far, one number a stage.
        runs: one a method.
        answers: of the unpatched model, as those of the runs.
    """

    family: str
    pixels: Tensor
    names: tuple[str, ...]
    grid: tuple[int, int]
    length: int
    base: tuple[int, ...]
    runs: tuple[Run, ...]
    answers: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return len(self.base) - 1

    @property
    def protected(self) -> int:
        """Prefix and suffix tokens, which are no patches."""
        return self.length - self.grid[0] * self.grid[1]


def record(
    model: nn.Module,
    images: Tensor,
    methods: str | Method | Sequence[str | Method],
    *,
    pixels: Tensor | None = None,
    names: Sequence[str] | None = None,
    forward: Callable[[Tensor], Any] | None = None,
    grid: tuple[int, int] | None = None,
    batch: int = BATCH,
    tick: Callable[[], None] | None = None,
    classes: Sequence[str] | None = None,
) -> Recording:
    """Run every method on the images and note what each block left.

    Args:
        model: a supported model, unpatched; it is so again afterwards.
        images: ``(B, C, H, W)`` as the model takes them.
        methods: settings such as ``"tome r=13"``, method objects, or several of them.
        pixels: ``(B, 1 or 3, H, W)``, uint8 or floats in 0..1: what to draw; None: the images, each stretched to its
            own range.
        names: of the images; None: numbers.
        forward: how the model is run on images; None: ``model(images)``.
        grid: rows and columns of patches; None: the model's, or that of square patches over the image.
        batch: images of a forward.
        tick: called :func:`ticks` times.
        classes: names of the model's classes; None: its answers are noted, by number, only where its output has
            ``logits``.

    Raises:
        ValueError: images, names, pixels or grid do not fit each other, the model's tokens form no grid over the images
            (videos, sound), or the model is patched already.
        UnknownMethodError, MissingInputError, TypeError, UnsupportedModelError: as :func:`tokred.apply`.
    """
    _check_images(images, pixels, names)
    chosen = choose(methods)
    host = check(model, chosen)
    drawn = _stretched(images) if pixels is None else pixels
    named = tuple(names) if names is not None else tuple(f"image {i}" for i in range(len(images)))
    runs, length, place = list[Run](), 0, (0, 0)
    base: tuple[int, ...] = (0,)
    for label, method in chosen:
        parts, said = [], list[str]()
        with api.applied(model, method), torch.inference_mode():
            shared = _shared(host.model)
            for part in torch.split(images, batch):
                said += answers_of(model(part) if forward is None else forward(part), classes)
                length = shared.last().length
                place = place_of(host, length, (images.shape[-2], images.shape[-1]), grid)
                parts.append(_read(host, shared, len(part), place[0] * place[1]))
                if tick is not None:
                    tick()
        groups, tokens, macs = (torch.cat(found) for found in zip(*(p[:3] for p in parts), strict=True))
        runs.append(Run(label, groups, tokens, macs, any(p[3] for p in parts), tuple(said)))
        base = _unpatched(host, length)
    plain: list[str] = []
    with torch.inference_mode():
        for part in torch.split(images, batch) if runs[0].answers else ():
            plain += answers_of(model(part) if forward is None else forward(part), classes)
    return Recording(host.family, as_bytes(drawn), named, place, length, base, tuple(runs), tuple(plain))


def answers_of(output: Any, classes: Sequence[str] | None) -> list[str]:
    """The likeliest class of each image with its probability, as text; empty where an output has no logits ``(B, C)``.

    Raises:
        ValueError: there are not as many names as classes.
    """
    logits = getattr(output, "logits", None)
    if logits is None and classes is not None and isinstance(output, Tensor):
        logits = output
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        return []
    if classes is not None and len(classes) != logits.shape[1]:
        raise ValueError(f"classes has {len(classes)} names, but the model {logits.shape[1]} classes")
    likely, which = logits.float().softmax(1).max(1)
    names = [f"class {i}" if classes is None else classes[i] for i in which.tolist()]
    return [f"{name} ({p:.0%})".replace("%", " %") for name, p in zip(names, likely.tolist(), strict=True)]


def ticks(methods: int, images: int, batch: int = BATCH) -> int:
    """Number of times that :func:`record` will call ``tick``."""
    return methods * -(-images // batch)


def choose(methods: str | Method | Sequence[str | Method]) -> list[tuple[str, Method]]:
    """Labels and methods; what comes twice is kept once.

    Raises:
        ValueError: there is none, or a setting is not ``name key=value``.
        UnknownMethodError, TypeError: a method or a parameter does not exist.
    """
    given = [methods] if isinstance(methods, str | Method) else list(methods)
    found: dict[str, Method] = {}
    for one in given:
        if isinstance(one, str):
            name, parameters = parse_setting(one)
            found[" ".join(one.split())] = api.make(name, **parameters)
        else:
            method = api.make(one)
            found[label_of(method)] = method
    if not found:
        raise ValueError("no method is given; 'tome r=13' would be one")
    return list(found.items())


def label_of(method: Method) -> str:
    """Name and the parameters that differ from their defaults."""
    given, usual = (m.to_dict()["parameters"] for m in (method, type(method)()))
    changed = [f"{k}={_text(v)}" for k, v in given.items() if v != usual[k]]
    return " ".join([method.name or type(method).__name__, *changed])


def _text(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"inflect"}:
        return "({},{:g})".format(*value["inflect"])
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def check(model: nn.Module, chosen: Sequence[tuple[str, Method]]) -> EncoderHost:
    """Refuse a model that one of the methods does not run on, or whose blocks cannot be shown; its host otherwise.

    Raises:
        UnsupportedModelError, MissingInputError, ValueError: as :func:`tokred.apply`; or every block of the model gives
            full length back.
    """
    host = adapters.find(model)
    if host.where == "inside":
        raise UnsupportedModelError(
            f"{host.family} reduces inside each block and starts the next one from all tokens, so nothing adds up that "
            "could be shown over the blocks; draw a single one with tokred.viz.after and tokred.viz.paint"
        )
    for _, method in chosen:
        host.check(method)
    return host


def place_of(host: EncoderHost, length: int, size: tuple[int, int], grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the patches: as given, square ones over an image of ``size``, or the model's own.

    Raises:
        ValueError: the tokens form no such grid.
    """
    count = length - host.prefix - host.suffix
    if grid is not None:
        if grid[0] * grid[1] != count:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not fit the {count} patches of {host.family}")
        return grid
    high, wide = size
    rows = round((count * high / wide) ** 0.5)
    if rows and count % rows == 0 and abs(rows * wide - count // rows * high) < max(high, wide):
        return rows, count // rows
    if host.grid is not None and host.grid[0] * host.grid[1] == count:
        return host.grid
    raise ValueError(
        f"the {count} tokens of {host.family} form no grid over images of {high} x {wide}: give grid=(rows, columns)"
    )


def labels(total: Reduction | None, prefix: int, count: int, batch: int) -> Tensor:
    """``(B, P)`` int32: for each patch the patch that stands for its token, -1 where it was dropped.

    Groups that a protected token represents are named after their first patch.
    """
    own = torch.arange(count, dtype=torch.int32)
    if total is None:
        return own.expand(batch, -1)
    index = total.index[:, prefix : prefix + count].cpu()
    slot = torch.where(index < 0, total.slots, index)
    first = torch.full((batch, total.slots + 1), count)
    first = first.scatter_reduce(1, slot, own.long().expand(batch, -1), "amin")
    stands = torch.nn.functional.pad(total.representative.cpu() - prefix, (0, 1))
    stands = torch.where((stands < 0) | (stands >= count), first, stands)
    return torch.where(index < 0, -1, stands.gather(1, slot)).int()


def composed(steps: Sequence[Reduction], total: Reduction | None = None) -> Reduction | None:
    """Steps as one reduction, after ``total``; None where there is none. What was pruned is dropped in it, even where a
    slot stands in for it when the full length is restored."""
    for step in steps:
        if not step.inherit:
            step = replace(step, source=step.source[..., :0], target=step.target[..., :0])
        total = step if total is None else total.then(step)
    return total


def _read(host: EncoderHost, shared: Shared, batch: int, count: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Groups, tokens and multiply-adds of the last forward, a stage each."""
    shared.last()
    groups, tokens = [labels(None, host.prefix, count, batch)], [torch.full((batch,), shared.last().length)]
    macs, seen = [torch.zeros(batch, dtype=torch.int64)], 0
    total: Reduction | None = None
    soft = False
    for layer in range(host.depth):
        state = shared.records[layer].state
        total = composed(state.steps[seen:], total)
        soft |= any(not step.composes for step in state.steps[seen:])
        changed, seen = len(state.steps) != seen, len(state.steps)
        groups.append(labels(total, host.prefix, count, batch) if changed else groups[-1])
        tokens.append(_real(total, batch) if changed else tokens[-1])
        cost, middle = host.cost(host.blocks[layer][1]), host.middle(shared.method)
        before, after = tokens[-2].tolist(), tokens[-1].tolist()
        macs.append(macs[-1] + torch.tensor([cost.macs(b, a, middle) for b, a in zip(before, after, strict=True)]))
    return torch.stack(groups, 1), torch.stack(tokens, 1), torch.stack(macs, 1), soft


def _real(total: Reduction | None, batch: int) -> Tensor:
    """``(B,)`` tokens that are no padding."""
    assert total is not None  # something has changed
    return torch.full((batch,), total.slots) if total.mask is None else total.mask.sum(1).cpu()


def _unpatched(host: EncoderHost, length: int) -> tuple[int, ...]:
    found = [0]
    for _, block in host.blocks:
        found.append(found[-1] + host.cost(block).macs(length, length, True))
    return tuple(found)


def _shared(model: nn.Module) -> Shared:
    from tokred.adapters.encoder.host import shared_of

    return shared_of(model)[0][2]


def _check_images(images: Tensor, pixels: Tensor | None, names: Sequence[str] | None) -> None:
    if images.ndim != 4 or not len(images):
        more = ": videos are not drawn, give frames as images to a model of images" if images.ndim == 5 else ""
        raise ValueError(f"images must be (B, C, H, W) with at least one image, got {tuple(images.shape)}{more}")
    if pixels is not None and (pixels.ndim != 4 or len(pixels) != len(images) or pixels.shape[1] not in (1, 3)):
        raise ValueError(f"pixels must be ({len(images)}, 1 or 3, H, W), got {tuple(pixels.shape)}")
    if pixels is None and images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} channels cannot be drawn as they are: give pixels of 1 or 3")
    if names is not None and len(names) != len(images):
        raise ValueError(f"{len(images)} images need as many names, got {len(names)}")


def _stretched(images: Tensor) -> Tensor:
    flat = images.detach().float().flatten(1)
    low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
    return (images.detach().float() - low) / (high - low).clamp_min(1e-12)


def as_bytes(pixels: Tensor) -> Tensor:
    """uint8 as it is; floats in 0..1 as 0..255. On the CPU."""
    x = pixels.detach().cpu()
    return x if x.dtype == torch.uint8 else (x.float() * 255).round().clamp(0, 255).to(torch.uint8)
