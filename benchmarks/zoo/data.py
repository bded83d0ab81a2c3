"""Real data from packages: pictures with labels or captions, photos, videos, English text, and speech.

Pictures come as ``uint8`` tensors ``[N, channels, H, W]``; :func:`normalise` makes of them what the models expect.
Every function raises :class:`benchmarks.zoo.carriers.MissingWeights` where its package is absent.
"""

from __future__ import annotations

import gzip
import html
import io
import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.carriers import debian_folder, open_carrier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TEXTILE = ("nominal", "local", "global")
# Topics of the fortunes that are in good taste.
TOPICS = ("computers", "food", "law", "love", "medicine", "science", "sports", "politics", "education", "work")
PHOTOS = {
    "sklearn": ("china.jpg", "flower.jpg"),
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
}
VIDEOS = {
    "bikes": ("clips", "bikes.mp4"),
    "carphone": ("clips", "carphone_pristine.mp4"),
    "bigbuckbunny": ("clips", "bigbuckbunny.mp4"),
    "vtest": ("opencv", "vtest.avi"),
    "megamind": ("opencv", "Megamind.avi"),
}


class Labelled(NamedTuple):
    """Pictures ``[N, channels, H, W]`` uint8, their labels ``[N]`` int64, and the classes' names (may be empty)."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def subset(self, index: Tensor) -> Labelled:
        return Labelled(self.images[index], self.labels[index], self.classes)


class Photos(NamedTuple):
    """Pictures ``[N, 3, S, S]`` uint8 and their names."""

    images: Tensor
    names: tuple[str, ...]


class Captioned(NamedTuple):
    """Pictures ``[N, 3, S, S]`` uint8, an English caption and a category for each."""

    images: Tensor
    captions: tuple[str, ...]
    categories: tuple[str, ...]


class Texts(NamedTuple):
    """Short texts and the topic of each."""

    texts: tuple[str, ...]
    topics: tuple[str, ...]


class Recording(NamedTuple):
    """One recording: its name, and ``[samples]`` float32 in -1..1 at 16 kHz."""

    name: str
    audio: np.ndarray


def normalise(images: Tensor) -> Tensor:
    """``[N, 3, H, W]`` uint8 to float32 with the mean and deviation of ImageNet, on the same device."""
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def split(data: Labelled, train: int, test: int, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Two disjoint random subsets, the same for the same seed.

    Raises:
        ValueError: there are fewer than ``train + test`` pictures.
    """
    n = len(data.labels)
    if train + test > n:
        raise ValueError(f"{train} + {test} pictures were asked for, but there are {n}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    return data.subset(order[:train]), data.subset(order[train : train + test])


def as_rgb(data: Labelled, size: int) -> Labelled:
    """Grey pictures ``[N, 1, H, W]`` as three equal channels of ``size`` pixels, bilinear."""
    images = F.interpolate(data.images.float(), size=(size, size), mode="bilinear", align_corners=False)
    return data._replace(images=images.round().byte().expand(-1, 3, -1, -1).contiguous())


def _square(picture: Any, size: int) -> Tensor:
    """The middle square of a PIL picture, resized: ``[3, size, size]`` uint8."""
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    small = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def _read(blob: bytes, size: int) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(blob)) as picture:
        return _square(picture, size)


def fashion_mnist(part: str = "test") -> Labelled:
    """Fashion-MNIST ``[N, 1, 28, 28]``: 60,000 pictures of ``"train"`` or 10,000 of ``"test"``, 10 balanced classes."""
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    stem = debian_folder("fashion") / ("train" if part == "train" else "t10k")
    with gzip.open(f"{stem}-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(f"{stem}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8).astype(np.int64)
    return Labelled(torch.from_numpy(images.copy()), torch.from_numpy(labels), FASHION)


def handwritten_digits() -> Labelled:
    """5,000 handwritten digits ``[N, 1, 20, 20]``, 500 of each class."""
    from PIL import Image

    with Image.open(debian_folder("opencv") / "digits.png") as picture:
        sheet = np.asarray(picture.convert("L"))
    images = sheet.reshape(50, 20, 100, 20).swapaxes(1, 2).reshape(-1, 1, 20, 20)
    labels = torch.arange(10).repeat_interleave(500)
    return Labelled(torch.from_numpy(images.copy()), labels, tuple("0123456789"))


def textile(size: int = 112) -> Labelled:
    """2,000 pictures of textile ``[N, 3, size, size]``: 1,000 nominal, 500 with a local, 500 with a global defect."""
    carrier = open_carrier("textile")
    names = carrier.names(".jpg")
    images = torch.stack([_read(blob, size) for blob in carrier.read_all(names)])
    labels = torch.tensor([TEXTILE.index(n.split("/")[0]) for n in names])
    return Labelled(images, labels, TEXTILE)


def labelled_photos(kind: str = "imagenet", size: int = 224) -> Labelled:
    """20 pictures ``[20, 3, size, size]`` of imagenet, cifar10, cifar100, fashionMNIST or mnist, with class indices."""
    carrier = open_carrier("photos")
    names = [n for n in carrier.names() if re.fullmatch(rf"{re.escape(kind)}_\d+_\d+\.(png|jpg)", n)]
    if not names:
        raise ValueError(f"kind must be imagenet, cifar10, cifar100, fashionMNIST or mnist, got {kind!r}")
    images = torch.stack([_read(blob, size) for blob in carrier.read_all(names)])
    return Labelled(images, torch.tensor([int(Path(n).stem.split("_")[-1]) for n in names]), ())


def photos(size: int = 224, sources: Sequence[str] = ("sklearn", "imagenet")) -> Photos:
    """Real photos, the middle square of each.

    Args:
        size: height and width.
        sources: of ``"sklearn"`` (2 photos), ``"skimage"`` (5) and ``"imagenet"`` (20).

    Raises:
        ValueError: a source is not one of these.
    """
    images, names = list[Tensor](), list[str]()
    for source in sources:
        if source == "imagenet":
            found = labelled_photos("imagenet", size)
            images += found.images.unbind()
            names += [f"imagenet_{i:02}_{c}" for i, c in enumerate(found.labels.tolist())]
        elif source == "sklearn":
            from sklearn.datasets import load_sample_image

            pictures = [load_sample_image(n) for n in PHOTOS[source]]
            images += [_square(_from_array(p), size) for p in pictures]
            names += [Path(n).stem for n in PHOTOS[source]]
        elif source == "skimage":
            images += [_read(blob, size) for blob in open_carrier("skimage").read_all(list(PHOTOS[source]))]
            names += [Path(n).stem for n in PHOTOS[source]]
        else:
            raise ValueError(f"a source must be sklearn, skimage or imagenet, got {source!r}")
    return Photos(torch.stack(images), tuple(names))


def _from_array(picture: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(picture)


def stamps(size: int = 224) -> Captioned:
    """430 photos and realistic pictures with an English caption; the folder's name is the category.

    Cartoons and symbols are left out. Pictures are put on a white square.
    """
    from PIL import Image

    base = debian_folder("stamps")
    images, captions, categories = list[Tensor](), list[str](), list[str]()
    for path in sorted(base.rglob("*.png")):
        parts, caption = path.relative_to(base).parts, path.with_suffix(".txt")
        if parts[0] == "symbols" or any(p.startswith("cartoon") for p in parts) or not caption.exists():
            continue
        with Image.open(path) as picture:
            stamp = picture.convert("RGBA")
        side = max(stamp.size)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        canvas.paste(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2), stamp)
        images.append(_square(canvas, size))
        captions.append(caption.read_text("utf8", "replace").splitlines()[0].strip())
        categories.append(parts[0])
    return Captioned(torch.stack(images), tuple(captions), tuple(categories))


def video(name: str, frames: int, size: int = 224) -> Tensor:
    """Evenly spaced frames of a video, the middle square of each: ``[frames, 3, size, size]`` uint8.

    Args:
        name: ``bikes`` (250 frames), ``carphone`` (120), ``bigbuckbunny`` (132), ``vtest`` (795, people walking
            before a fixed camera) or ``megamind`` (270).
        frames: how many; fewer come back where the video is shorter.
        size: height and width.

    Raises:
        ImportError: there is no OpenCV to decode it.
        ValueError: there is no video of this name.
    """
    if name not in VIDEOS:
        raise ValueError(f"a video must be one of {', '.join(VIDEOS)}, got {name!r}")
    source, file = VIDEOS[name]
    if source == "opencv":
        return _decode(debian_folder("opencv") / file, frames, size)
    with open_carrier(source).unpacked(file) as folder:
        return _decode(folder / file, frames, size)


def _decode(path: Path, frames: int, size: int) -> Tensor:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("decoding a video needs OpenCV: pip install opencv-python-headless") from error
    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    wanted, out = set(np.linspace(0, total - 1, frames).astype(int).tolist()), list[Tensor]()
    for i in range(total):
        fine, frame = capture.read()
        if not fine:
            break
        if i in wanted:
            out.append(_square(_from_array(frame[..., ::-1].copy()), size))
    capture.release()
    return torch.stack(out)


def handbook() -> str:
    """The Debian Administrator's Handbook as plain text: 1.17 million characters of English."""
    parts = []
    for path in sorted(debian_folder("handbook").glob("*.html")):
        text = re.sub(r"(?s)<(script|style).*?</\1>", "", path.read_text("utf8", "replace"))
        parts.append(re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))))
    return " ".join(parts)


def devils_dictionary() -> str:
    """Ambrose Bierce's dictionary of 1911: 383 thousand characters of English."""
    with gzip.open(debian_folder("devil") / "devil.dict.dz") as f:
        text = f.read().decode("utf8", "replace")
    return text[text.index("PREFACE") :]


def fortunes(topics: Sequence[str] = TOPICS) -> Texts:
    """Short texts with their topics, 3,987 of the ten default ones."""
    folder, texts, labels = debian_folder("fortunes"), list[str](), list[str]()
    for topic in topics:
        parts = (folder / topic).read_text("utf8", "replace").split("\n%\n")
        found = [" ".join(p.split()) for p in parts if p.strip()]
        texts += found
        labels += [topic] * len(found)
    return Texts(tuple(texts), tuple(labels))


def speech(names: Sequence[str] | None = None) -> list[Recording]:
    """Recordings of one speaker, telephone prompts at 8 kHz brought to 16.

    Args:
        names: such as ``"vm-goodbye"`` or ``"digits/7"``; all 568 by default. Digits and letters are named by what is
            said; of the others, there is no transcript.
    """
    base = next(p for p in sorted(debian_folder("speech").iterdir()) if p.is_dir())
    if names is None:
        names = sorted(p.relative_to(base).with_suffix("").as_posix() for p in base.rglob("*.wav"))
    return [Recording(n, _sound(base / f"{n}.wav")) for n in names]


def _sound(path: Path, rate: int = 16_000) -> np.ndarray:
    with wave.open(str(path)) as f:
        given = f.getframerate()
        audio = np.frombuffer(f.readframes(f.getnframes()), np.int16).astype(np.float32) / 32768
    if given == rate:
        return audio
    n = len(audio) * rate // given
    return np.interp(np.arange(n) * given / rate, np.arange(len(audio)), audio).astype(np.float32)
