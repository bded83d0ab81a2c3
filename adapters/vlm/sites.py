"""Sites before the language model: the pictures of a batch, grouped by shape, and what their reductions leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.vlm.layout import Part, Picture, Span, clip_of, pictures_of
from tokred.adapters.vlm.taps import Modality, Record
from tokred.adapters.vlm.tower.film import as_pooled, shots_of
from tokred.core.attention import Attention
from tokred.core.method import Method
from tokred.core.reduction import Reduction
from tokred.encoder.motion import feature_motion
from tokred.errors import MissingInputError
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.clips import Runs

# What methods take from the tower's attention.
OF_TOWER = frozenset({"q", "k", "class_attention", "attention", "tower_layers"})
# Those of them that frames of a clip have, each for itself.
_OF_FRAMES = frozenset({"class_attention", "attention"})


class Place(NamedTuple):
    """A part of a picture in the batch.

    Attributes:
        sample: row of the batch.
        image: which picture of the sample.
        first: the picture's first token among all visual tokens of its modality, in order.
        part: what it is.
        record: the call that it comes from.
        at: the picture's first token among all that the call gave.
    """

    sample: int
    image: int
    first: int
    part: Part
    record: Record
    at: int = 0


class Shown(NamedTuple):
    """A picture in the batch; see :class:`Place`."""

    sample: int
    image: int
    first: int
    picture: Picture
    record: Record
    at: int = 0


class Context(NamedTuple):
    """Values that all sites of a batch share: embeddings, the text's mask, the projector, and what the method reads."""

    embeds: Tensor
    text: Tensor
    project: Callable[[Tensor], Tensor] | None
    reads: frozenset[str]


def shown(modality: Modality) -> list[Shown]:
    """Every picture of every sample, in the order of the placeholders.

    Raises:
        MissingInputError: features and placeholders do not fit, as when only some of the prompt's features are given.
        ValueError: the runs of pictures do not fit the samples, see :func:`tokred.vlm.clips`.
    """
    record = modality.record
    if record is None:
        return []
    have, want = sum(p.tokens for p in record.pictures), sum(modality.counts)
    # Beams and several return sequences: every sample so many times, with its pictures.
    copies = want // have if have and want % have == 0 else 0
    if copies == 0:
        raise MissingInputError(
            f"the prompt has {want} places for visual tokens, but {have} features were made: prompts that come in "
            "chunks (prefill_chunk_size), or with only some of their images, cannot be pruned"
        )
    found, first, picture, given = [], 0, 0, 0
    counts = modality.counts
    for sample in range(0, len(counts), copies):
        mine, total = [], 0
        while total < counts[sample]:
            mine.append(record.pictures[picture])
            total += record.pictures[picture].tokens
            picture += 1
        if total != counts[sample] or len({*counts[sample : sample + copies]}) > 1:
            raise MissingInputError("the images of the batch do not fit the samples' placeholders")
        if modality.runs is not None:
            mine = _joined(mine, modality.runs, sample, len(counts))
        for copy in range(copies):
            at = given
            for i, one in enumerate(mine):
                found.append(Shown(sample + copy, i, first, one, record, at))
                first, at = first + one.tokens, at + one.tokens
        given += total
    return found


def _joined(pictures: list[Picture], runs: Runs, sample: int, batch: int) -> list[Picture]:
    """The pictures of one sample, the frames of each clip as one."""
    pictures = [one for picture in pictures for one in pictures_of(picture)]
    if batch % len(runs):
        raise ValueError(f"runs has {len(runs)} rows, but the batch {batch} samples: give one for each prompt")
    # Beams and several return sequences come as copies of a prompt, one after another.
    mine, found, first = runs[sample * len(runs) // batch], [], 0
    if sum(mine) != len(pictures):
        raise ValueError(
            f"runs has {list(mine)} for a sample, {sum(mine)} pictures together, but the vision tower sees "
            f"{len(pictures)}: name them all, images by themselves as 1"
        )
    for count in mine:
        found.append(pictures[first] if count == 1 else clip_of(pictures[first : first + count]))
        first += count
    return found


def places(modality: Modality) -> list[Place]:
    """Every part of every picture; raises as :func:`shown`."""
    every = shown(modality)
    return [Place(s.sample, s.image, s.first, part, s.record, s.at) for s in every for part in s.picture.parts]


def grouped(found: list[Place]) -> Iterator[list[Place]]:
    """Places that make one site: the same shape, tile and kind."""
    groups: dict[object, list[Place]] = {}
    for place in found:
        part = place.part
        shape = (
            part.where,
            part.grid,
            part.frames,
            part.tile,
            part.patches,
            part.skip,
            part.tiles,
            len(part.clip),
            len(part.pooled),
        )
        key = (shape, part.tower >= 0, id(place.record))
        groups.setdefault(key, []).append(place)
    yield from groups.values()


def site_of(group: list[Place], columns: Tensor, context: Context) -> VisualSite:
    """The site of a group.

    Args:
        group: places of one shape.
        columns: ``(G, N)`` where their tokens stand in their samples.
        context: of the batch.
    """
    # Whatever costs something is a function, which runs for methods that read it.
    part, record = group[0].part, group[0].record
    samples = torch.tensor([p.sample for p in group], device=columns.device)
    embeds = context.embeds
    more: dict[str, Any] = {}

    def entering() -> Tensor:
        return embeds.detach()[samples.unsqueeze(1), columns]

    tower, give = [p.part.tower for p in group], record.received
    if part.tower >= 0:
        if record.tower is not None:
            more["tower"] = lambda: tower_features(group).detach()
        if record.pixels is not None and not part.clip:
            seen_pixels = record.pixels
            more["pixels"] = lambda: torch.stack([seen_pixels(i) for i in tower])
        if give is not None and not part.clip:
            more["received"] = lambda: torch.stack([give(i) for i in tower])
        if part.clip:
            # The tower's attention is that of each frame alone, so that there are scores, but no queries and keys of
            # all tokens together.
            if (record.layer, "q") in record.heads:
                more |= _frame_scores(record, part, [p.part.clip for p in group])
        elif (record.layer, "q") in record.heads:
            heads = _heads(record, part, tower)
            more["q"] = lambda: heads(record.layer)[0]
            more["k"] = lambda: heads(record.layer)[1]
            more["layer_heads"] = heads
            more["patches"] = None if part.patches is None else part.patches.offsets(columns.device)
            if part.tiles is not None and part.whole >= 0:
                more["tiles"], more["whole"] = part.tiles, _whole(record, [p.part.whole for p in group])
    elif part.pooled and (record.layer, "q") in record.heads:
        more |= _frame_scores(record, part, [p.part.pooled for p in group])
    if part.frames is not None:
        seen: Callable[[], Tensor] = more.get("tower", entering)
        frames, cells = part.frames, part.count // part.frames
        more["shots"] = lambda: tuple(shots_of(record.shots.get(p.at), frames, cells, part.grid) for p in group)
        more["motion"] = lambda: feature_motion(seen(), frames)
    if "text" in context.reads:
        more["text"] = lambda: embeds.detach()[samples]
        more["text_mask"] = context.text[samples]
    return VisualSite(
        x=entering,
        prefix=record.prefix if "k" in more else 0,
        scale=record.scale,
        grid=part.grid,
        frames=part.frames,
        tile=part.tile,
        sample=tuple(p.sample for p in group),
        image=tuple(p.image for p in group),
        project=context.project,
        **more,
    )


def check_tower(method: Method, part: Part) -> None:
    """Refuse a method that reads the tower's attention where a token is no patch.

    Raises:
        MissingInputError: with what reads features alone.
    """
    reads = sorted(method.reads & OF_TOWER)
    single = sorted(method.reads & (OF_TOWER - _OF_FRAMES))
    if single and part.clip:
        raise MissingInputError(
            f"{method.name!r} reads {', '.join(single)} of the vision tower, which saw each frame of a clip by itself: "
            "take a method that reads class_attention or attention at most, such as 'fastervlm', or leave "
            "tokred.vlm.clips out"
        )
    # Scores are pooled as the frames are; features of single patches are not.
    beyond = single or "tower" in method.reads or not part.pooled
    if reads and part.tower < 0 and beyond:
        kind = "frames of a video" if part.frames is not None else "images"
        raise MissingInputError(
            f"{method.name!r} reads {', '.join(reads)}, but here tokens are made of {kind} that the model pools or "
            "scales behind its tower, whose attention says nothing about them: take a method that reads features "
            "alone, such as 'divprune'"
        )


def _frame_scores(record: Record, part: Part, rows: list[tuple[int, ...]]) -> dict[str, Callable[[], Tensor]]:
    """``(G, H, T * N)`` what tokens receive from their frame, and from its class token where the tower has one."""
    prefix, flat = record.prefix, [row for clip in rows for row in clip]

    def heads() -> tuple[Tensor, Tensor]:
        if part.pooled:
            return record.heads[record.layer, "q"][flat], record.heads[record.layer, "k"][flat]
        return _heads(record, replace(part, where=Span.line(0, part.where.columns)), flat)(record.layer)

    def scores(queries: slice) -> Tensor:
        found = Attention(*heads(), scale=record.scale).columns(rows=queries)[..., prefix:]
        if part.pooled:
            found = as_pooled(found, part.grid)
        return found.view(len(rows), -1, *found.shape[1:]).transpose(1, 2).flatten(2)

    found = {"received": lambda: scores(slice(None))}
    return found | {"class_attention": lambda: scores(slice(0, 1))} if prefix else found


def _heads(record: Record, part: Part, rows: list[int]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Queries and keys of some rows of the tower's batch, all of its patches, by layer."""
    patches = None if part.patches is None else part.patches.offsets(torch.device("cpu"))
    least = part.count if patches is None else int(patches[-1]) + 1

    def heads(layer: int) -> tuple[Tensor, Tensor]:
        index = layer if layer >= 0 else record.depth + layer
        if (index, "q") not in record.heads:
            raise MissingInputError(
                f"the attention of tower layer {layer} was not noted: the tower has {record.depth} layers, of "
                "which the method names in tower_layers those that it reads"
            )
        q, k = record.heads[index, "q"][rows], record.heads[index, "k"][rows]
        whole = k.shape[2] - record.prefix
        if whole < least or (patches is None and whole != least):
            raise MissingInputError(
                f"the tower's attention has {whole} patches for {part.count} visual tokens, so that attention of "
                "single patches says nothing about them"
            )
        return q, k

    return heads


def tower_features(group: list[Place]) -> Tensor:
    """``(G, N, Ct)`` the projector's inputs of a group's tokens, with their gradient."""
    part, inputs = group[0].part, group[0].record.tower
    assert inputs is not None  # asked for where the site has them
    if part.clip:
        rows = inputs[[row for p in group for row in p.part.clip]][:, part.skip :]
        return rows.reshape(len(group), -1, rows.shape[-1])
    found = inputs[[p.part.tower for p in group]]
    return found[:, part.skip :] if part.patches is None else found[:, part.patches.offsets(found.device)]


def _whole(record: Record, rows: list[int]) -> Callable[[int], Tensor]:
    """The class token's attention to the tiles that show whole images, by layer of the tower."""

    def attention(layer: int) -> Tensor:
        index = layer if layer >= 0 else record.depth + layer
        q, k = record.heads[index, "q"][rows], record.heads[index, "k"][rows]
        return Attention(q, k, scale=record.scale).columns(rows=slice(0, 1))[..., record.prefix :]

    return attention


class Left(NamedTuple):
    """The visual tokens that are left so far, while one group after another is reduced.

    Attributes:
        gone: ``(B, L)`` bool, the columns that leave; None where none does.
        embeds: with merged tokens in the place of their representatives.
        dropped: how many leave, of each sample.
        sizes: ``(B, L)`` float32, tokens that each visual one stands for, 0 on text; None: nobody asks.
    """

    gone: Tensor | None
    embeds: Tensor
    dropped: tuple[int, ...]
    sizes: Tensor | None = None


def without_newlines(left: Left, pictures: list[Shown], columns: Tensor) -> Left:
    """Newlines of rows that have lost all their tokens leave too."""
    gone, dropped = left.gone, list(left.dropped)
    if gone is None or all(one.picture.lines is None for one in pictures):
        return left
    gone = gone.clone()
    for one in pictures:
        lines = one.picture.lines
        if lines is not None:
            where = columns[one.first + lines.offsets(columns.device)].view(lines.rows, lines.columns)
            empty = gone[one.sample, where[:, :-1]].all(1)
            gone[one.sample, where[:, -1]] = empty
            dropped[one.sample] += int(empty.sum())
    return left._replace(gone=gone, dropped=tuple(dropped))


def with_last(left: Left, last: Tensor) -> Left:
    """The prompt's last token stays as it is, beside what its image keeps: what follows is told from it.

    Args:
        left: with something gone.
        last: ``(B, 1)`` int64 where it stands.
    """
    assert left.gone is not None
    lost = left.gone.gather(1, last)
    dropped = tuple(n - back for n, back in zip(left.dropped, lost.squeeze(1).long().tolist(), strict=True))
    return left._replace(gone=left.gone.scatter(1, last, False), dropped=dropped)


def leave(left: Left, group: list[Place], columns: Tensor, site: VisualSite, step: Reduction, space: str) -> Left:
    """Take one group's reduction into account; merging is differentiable."""
    if step.trivial:
        return left
    # One column more than there are: slots that are padding point there, and it is cut off again.
    b, length = left.embeds.shape[:2]
    embeds = left.embeds
    samples = torch.tensor([p.sample for p in group], device=columns.device).unsqueeze(1)
    stays = columns.gather(1, step.representative)
    gone = torch.zeros(b, length + 1, dtype=torch.bool, device=embeds.device)
    if left.gone is not None:
        gone[:, :length] = left.gone
    gone[samples, columns] = True
    kept = stays if step.mask is None else torch.where(step.mask, stays, length)
    gone[samples, kept] = False
    gone = gone[:, :length]
    if step.mode != "keep":
        known = group[0].part.tower >= 0 and group[0].record.tower is not None
        if space == "tower" and site.project is not None and known:
            values = site.project(step.merge(tower_features(group))).to(embeds.device)
        else:
            values = step.merge(embeds[samples, columns])
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, 1)).index_put((samples, kept), values.to(embeds.dtype))
        embeds = embeds[:, :length]
    dropped = list(left.dropped)
    sizes = [step.slots] * len(group) if step.mask is None else step.mask.sum(1).tolist()
    for place, size in zip(group, sizes, strict=True):
        dropped[place.sample] += columns.shape[1] - int(size)
    size = left.sizes
    if size is not None:
        size = torch.nn.functional.pad(size, (0, 1)).index_put((samples, kept), step.sizes().float())[:, :length]
    return Left(gone, embeds, tuple(dropped), size)
