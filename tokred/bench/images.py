"""Images for a benchmark: folders of files, with or without classes, and what a model's head knows of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Found(NamedTuple):
    """Files of a folder, and the class of each (-1 where the folder is flat)."""

    files: list[Path]
    labels: list[int]
    classes: tuple[str, ...]


def find(folder: Path) -> Found:
    """List a folder of images: one sub-folder a class, or all images in one place.

    Raises:
        FileNotFoundError: the folder is not there, or holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    by_class = {d.name: _images(d) for d in sorted(folder.iterdir()) if d.is_dir()}
    by_class = {name: files for name, files in by_class.items() if files}
    if by_class:
        classes = tuple(by_class)
        pairs = [(f, i) for i, name in enumerate(classes) for f in by_class[name]]
        return Found([f for f, _ in pairs], [i for _, i in pairs], classes)
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}), nor a folder a class with some"
        )
    return Found(files, [-1] * len(files), ())


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def gather(paths: Sequence[Path], count: int) -> list[tuple[Path, str]]:
    """Files and their names: those given as they are, and of each folder at most ``count``, evenly spaced.

    Raises:
        FileNotFoundError: a path is not there, or a folder holds no image.
    """
    out = []
    for path in paths:
        if path.is_dir():
            files = find(path).files
            few = min(count, len(files))
            picked = [files[i * len(files) // few] for i in range(few)]
            out += [(file, file.relative_to(path).as_posix()) for file in picked]
        elif path.is_file():
            out.append((path, path.name))
        else:
            raise FileNotFoundError(f"{path} is neither an image nor a folder of images")
    return out


def clip(path: Path, count: int) -> list[Any]:
    """The frames of a clip as pictures of PIL's: at most ``count``, evenly spaced, the first and the last among them.

    Args:
        path: a folder of images, in the order of their names, or one animated picture (GIF, WebP, PNG).
        count: at most so many.

    Raises:
        FileNotFoundError: it is not there, or a folder without images.
        ValueError: the file cannot be read as a picture, or has a single frame.
    """
    from PIL import Image, ImageSequence

    from tokred.analysis.viz.drawing import evenly

    if path.is_dir():
        files = find(path).files
        return [_opened(file) for file in evenly(files, count)]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder of frames nor an animated picture")
    try:
        with Image.open(path) as file:
            there = int(getattr(file, "n_frames", 1))
            chosen = set(evenly(range(there), count))
            found = [one.convert("RGB") for i, one in enumerate(ImageSequence.Iterator(file)) if i in chosen]
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if there < 2:
        raise ValueError(
            f"{path} is a single picture: a clip is a folder of frames, in the order of their names, or an animated "
            "GIF, WebP or PNG"
        )
    return found


def _opened(path: Path, mode: str = "RGB") -> Any:
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read(path: Path, size: tuple[int, int], channels: int, crop: float = 1.0) -> Tensor:
    """One image ``(C, H, W)`` uint8: the middle of it at the aspect of ``size``, resized.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    picture = _opened(path, "RGB" if channels == 3 else "L")
    return fitted(picture, size, channels, crop)


def fitted(picture: Any, size: tuple[int, int], channels: int, crop: float = 1.0) -> Tensor:
    """A picture of PIL's as ``(C, H, W)`` uint8: the middle of it at the aspect of ``size``, resized."""
    from PIL import Image

    high, wide = size
    scale = min(picture.width / wide, picture.height / high) * crop
    half_w, half_h = wide * scale / 2, high * scale / 2
    x, y = picture.width / 2, picture.height / 2
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    small = picture.resize((wide, high), Image.Resampling.BICUBIC, box=box)
    return _tensor(small, channels)


def _tensor(picture: Any, channels: int) -> Tensor:
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, channels).permute(2, 0, 1).contiguous()


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 images to what a model takes; floats are taken to be normalised already."""
    if images.dtype != torch.uint8:
        return images.to(dtype)
    m, s = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - m) / s).to(dtype)


def fit_head(classes: Sequence[str], outputs: int) -> list[int] | None:
    """The output of a head that each class is; None where they do not fit, so that a probe has to be trained.

    Three kinds of names fit: as many classes as the head has outputs (in sorted order, as torchvision's ``ImageFolder``
    numbers them); indices; and WordNet ids for a head of 1,000 ImageNet classes.
    """
    if classes and all(c.isdigit() for c in classes) and all(int(c) < outputs for c in classes):
        return [int(c) for c in classes]
    if len(classes) == outputs:
        return list(range(outputs))
    if outputs == 1000 and all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        from timm.data import ImageNetInfo

        ids = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if all(c in ids for c in classes):
            return [ids[c] for c in classes]
    return None
