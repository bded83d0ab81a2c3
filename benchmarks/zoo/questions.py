"""Questions with answers of a word: about pictures of easy-VQA, and about clips that are drawn here.

easy-VQA has pictures of 64 pixels, each of one coloured shape, and some ten questions about each: its shape, its
colour, whether there is something. 13 answers; without looking, 67 % can be right. A clip shows a piece of clothing
that moves over a photo, through all of it or through one half; asked is what moves, which way, and when it is seen.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo import data, dinov2, vlm
from benchmarks.zoo.carriers import open_carrier

# Steps of a moving piece in (down, right), by the answer to which way it moves.
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPANS = {"first": (0.0, 0.5), "last": (0.5, 1.0), "always": (0.0, 1.0)}
ASKED = {"what": "what is moving?", "way": "which way does it move?", "when": "when is it seen?"}


class Question(NamedTuple):
    """One question: its text, the answer's word, the kind of question, and the number of its picture or clip."""

    text: str
    answer: str
    kind: str
    picture: int


class Asked(NamedTuple):
    """Pictures ``[N, 3, S, S]`` or clips ``[N, T, 3, S, S]`` uint8, and the questions about them; of clips also the
    share of each patch of 14 pixels that the piece covers, ``[N, T, S / 14, S / 14]``."""

    images: Tensor
    questions: tuple[Question, ...]
    covered: Tensor | None = None

    def about(self, index: Sequence[int]) -> Asked:
        """Those pictures alone, in that order, with their questions."""
        place = {one: i for i, one in enumerate(index)}
        kept = tuple(q._replace(picture=place[q.picture]) for q in self.questions if q.picture in place)
        return Asked(self.images[list(index)], kept, None if self.covered is None else self.covered[list(index)])


def kind(question: str) -> str:
    """``"color"``, ``"shape"`` or ``"yes/no"``, of a question of easy-VQA."""
    if re.search(r"colou?r", question):
        return "color"
    return "shape" if question.startswith("what") else "yes/no"


def pictures(part: str = "test") -> Asked:
    """Pictures of easy-VQA, 64 pixels: 4,000 and 38,575 questions of ``"train"``, 1,000 and 9,673 of ``"test"``.

    Raises:
        ValueError: there is no such part.
        MissingWeights: the package is absent.
    """
    from PIL import Image

    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    carrier = open_carrier("questions")
    names = [n for n in carrier.names(".png") if n.startswith(f"{part}/images/")]
    place = {int(n.split("/")[-1][:-4]): i for i, n in enumerate(names)}
    images = []
    for blob in carrier.read_all(names):
        with Image.open(io.BytesIO(blob)) as picture:
            images.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1))
    found = json.loads(carrier.read(f"{part}/questions.json"))
    asked = tuple(Question(text, answer, kind(text), place[one]) for text, answer, one in found)
    return Asked(torch.stack(images), asked)


def resized(images: Tensor, size: int) -> Tensor:
    """Pictures ``[..., 3, H, W]`` uint8 at ``size`` pixels, bicubic."""
    flat = images.flatten(0, -4).float()
    grown = F.interpolate(flat, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return grown.round().clamp(0, 255).byte().unflatten(0, images.shape[:-3])


def clips(part: str, count: int, frames: int = 8, size: int = 224, seed: int = 0) -> Asked:
    """Clips of clothes that move over photos, three questions about each; the same for the same arguments.

    A piece is 3/8 to 5/8 of the frame wide and moves over at least a quarter of it while it is seen. Photos and pieces
    of ``"train"`` and ``"test"`` differ.

    Args:
        part: "train" or "test".
        count: how many; no piece twice.
        frames: of each, at least 4.
        size: height and width.
        seed: of everything that is drawn by chance.

    Raises:
        ValueError: fewer than 4 frames.
        MissingWeights: a package is absent.
    """
    if frames < 4:
        raise ValueError(f"frames must be at least 4, so that each half of a clip has two, got {frames}")
    draw = torch.Generator().manual_seed(seed)
    items = data.fashion_mnist(part)
    chosen = torch.randperm(len(items.images), generator=draw)[:count]
    photos = data.photos(size * 5 // 4).images
    photos = photos[1::2] if part == "test" else photos[::2]
    images, covered, asked = [], [], list[Question]()
    for i, item in enumerate(chosen.tolist()):
        way, span = (tuple(t)[int(torch.randint(len(t), (), generator=draw))] for t in (WAYS, SPANS))
        photo = photos[int(torch.randint(len(photos), (), generator=draw))]
        clip, cover = _clip(items.images[item], photo, frames, size, way, span, draw)
        images.append(clip)
        covered.append(F.avg_pool2d(cover, dinov2.PATCH))
        answers = {"what": vlm.CLASSES[int(items.labels[item])], "way": way, "when": span}
        asked += [Question(ASKED[k], a, k, i) for k, a in answers.items()]
    return Asked(torch.stack(images), tuple(asked), torch.stack(covered))


def _clip(
    item: Tensor, photo: Tensor, frames: int, size: int, way: str, span: str, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The photo seen by a slowly moving camera, and before it the piece on its way.

    Returns:
        ``[frames, 3, size, size]`` uint8, and ``[frames, size, size]``, 1 where the piece is, else 0.
    """

    def between(low: float, high: float) -> int:
        return int(torch.randint(int(low), int(high) + 1, (), generator=draw))

    side = between(size * 3 / 8, size * 5 / 8)
    piece = F.interpolate(item[None].float(), (side, side), mode="bicubic", align_corners=False)[0].clamp(0, 255)
    shape = (piece > 20).float()
    free = size - side
    length = between(size / 4, free) if free > size / 4 else free
    down, right = WAYS[way]
    start = [between(0, free), between(0, free)]
    for axis, step in enumerate((down, right)):
        if step:
            start[axis] = between(0, free - length) if step > 0 else between(length, free)
    begin, end = (round(x * frames) for x in SPANS[span])
    room = photo.shape[-1] - size
    corner = [between(0, room), between(0, room)]
    found, covers = [], []
    for t in range(frames):
        y, x = (c + (room - 2 * c) * t // (2 * frames) for c in corner)
        frame = photo[:, y : y + size, x : x + size].float().clone()
        cover = torch.zeros(size, size)
        if begin <= t < end:
            done = length * (t - begin) // max(end - begin - 1, 1)
            top, left = start[0] + down * done, start[1] + right * done
            box = (slice(None), slice(top, top + side), slice(left, left + side))
            frame[box] = frame[box] * (1 - shape) + piece * shape
            cover[box[1:]] = shape[0]
        found.append(frame.round().byte())
        covers.append(cover)
    return torch.stack(found), torch.stack(covers)
