"""Images for encoders: folders, tables, the sample that comes along, the zoo's photos, and noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from tokred.bench import embedded, images, probe
from tokred.bench.sources import around, tables
from tokred.bench.sources.embedded_models import has_zoo, zoo
from tokred.bench.sources.record import Data, NoModelError, Reading, Source

ZOO = ("fashion", "textile", "photos")
NOISE = "noise"
EMBEDDED = "embedded"
COLUMNS = (("image", "img", "picture", "jpg", "png"), ("label", "labels", "fine_label", "class"))


class Files(Dataset[tuple[Tensor, int]]):
    """Pictures that are read when they are asked for: ``(C, H, W)`` and the class, -1 where there is none."""

    def __init__(self, items: Sequence[tuple[Any, int]], reading: Reading) -> None:
        self.items, self.reading = items, reading

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item, label = self.items[index]
        return seen(item, self.reading), label


class Columns(Dataset[tuple[Tensor, int]]):
    """Pictures of a table."""

    def __init__(self, found: tables.Rows, reading: Reading) -> None:
        self.found, self.reading = found, reading
        self.image = found.column(COLUMNS[0], "image")
        self.label = found.has(COLUMNS[1])

    def __len__(self) -> int:
        return len(self.found.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.found.rows[index]
        label = -1 if self.label is None else int(row[self.label])
        return seen(opened(row[self.image], self.found.folder), self.reading), label


def opened(given: Any, folder: Path | None) -> Any:
    """A picture of PIL's, or the path of one, from a cell of a table."""
    if isinstance(given, str):
        path = Path(given)
        return path if path.is_absolute() or folder is None else folder / path
    return given


def picture(given: Any, mode: str = "RGB") -> Any:
    """A picture of PIL's, read from its file where need be.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    from PIL import Image

    if not isinstance(given, str | Path):
        return given.convert(mode)
    try:
        with Image.open(given) as file:
            return file.convert(mode)
    except OSError as error:
        raise ValueError(f"{given} cannot be read as an image: {error}") from error


def seen(given: Any, reading: Reading) -> Tensor:
    """A picture as a model wants it: ``(C, H, W)``, normalised."""
    found = picture(given, "RGB" if reading.channels == 3 else "L")
    if reading.transform is not None:
        return reading.transform(found)
    pixels = images.fitted(found, reading.size, reading.channels, reading.crop)
    return images.normalise(pixels, reading.mean, reading.std, torch.float32)


class Collate:
    """Batches in the form that a model's forward takes: a tensor or a dictionary, with the labels where there are some.

    Args:
        argument: of the forward, or None for the first one.
        dtype: of the images.
        outputs: the output of the head that each class is; None: there are no labels, or none that count.
    """

    def __init__(self, argument: str | None, dtype: torch.dtype, outputs: Sequence[int] | None) -> None:
        self.argument, self.dtype, self.outputs = argument, dtype, outputs

    def __call__(self, items: Sequence[tuple[Tensor, int]]) -> Any:
        x = torch.stack([one for one, _ in items]).to(self.dtype)
        y = None if self.outputs is None else torch.tensor([self.outputs[int(label)] for _, label in items])
        if self.argument is not None:
            return {self.argument: x} if y is None else {self.argument: x, "labels": y}
        return x if y is None else (x, y)


def data(source: Source, spec: str | None, wanted: Any) -> Data:
    """Images for an encoder, or for the image tower of a model of two.

    Args:
        source: the model.
        spec: a folder of images (one sub-folder a class, or images only), a table or ``hfds:NAME`` with an image in
            each row, ``noise``, or a name of the zoo; None: what the model brings along.
        wanted: :class:`~tokred.bench.sources.given.Wanted`.

    Raises:
        FileNotFoundError, ValueError, NoModelError, ImportError: there are no such images; the message says what to do.
    """
    reading = source.images
    if reading is None:
        raise ValueError(
            f"nothing says what images {source.name} takes: give --data module:function that yields its batches, or "
            "let the function that makes the model return a transform beside it"
        )
    dataset, classes, name = found(source, reading, spec)
    if not len(dataset):
        raise ValueError(f"{name} holds no image")
    labelled = bool(classes)
    outputs = images.fit_head(classes, source.classes) if classes and source.classes else None
    order = sorted(random.Random(wanted.seed).sample(range(len(dataset)), min(wanted.count or 1000, len(dataset))))
    plain = source.kind == "dual encoder"
    argument = reading.argument or ("pixel_values" if plain and source.library == "transformers" else None)
    dtype = next(source.module.parameters()).dtype
    if plain:
        return _two_towers(source, dataset, order, classes, name, wanted, dtype)
    if labelled and outputs is None:
        return _probed(source, dataset, len(classes), name, wanted, argument, dtype)

    batches = loader(dataset, order, wanted, Collate(argument, dtype, outputs))
    metric = "top1" if labelled else "agreement" if source.classes else "cosine"
    return Data(batches, name, metric, "forward", source.model, labelled)


def loader(
    dataset: Any, order: Sequence[int], wanted: Any, collate: Callable[[Sequence[tuple[Tensor, int]]], Any]
) -> Any:
    """A loader of some items in a fixed order."""
    return DataLoader(
        Subset(dataset, order),
        batch_size=min(wanted.batch or 16, len(order)),
        num_workers=wanted.workers,
        collate_fn=collate,
        persistent_workers=wanted.workers > 0,
    )


def found(source: Source, reading: Reading, spec: str | None) -> tuple[Any, tuple[str, ...], str]:
    """A dataset of ``(image, class)``, the classes' names (empty: none), and its own name."""
    if spec is None:
        spec = usual(source)
    elif spec in (EMBEDDED, NOISE) or (spec in ZOO and has_zoo()):
        check_alone(spec)
    if spec == EMBEDDED:
        sample = embedded.sample()
        return TensorDataset(sample.images, sample.labels), embedded.CLASSES, embedded.NAME
    if spec == NOISE:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, reading.channels, *reading.size, generator=generator)
        return TensorDataset(x, torch.full((64,), -1)), (), NOISE
    if spec in ZOO and not Path(spec).is_dir():
        return _zoo(source, reading, spec)
    if tables.is_table(spec):
        rows = tables.rows(spec)
        made = Columns(rows, reading)
        classes: tuple[str, ...] = rows.classes.get(made.label or "", ())
        if made.label is not None and not classes:
            seen_labels = {int(row[made.label]) for row in rows.rows}
            classes = tuple(str(i) for i in range(max(seen_labels) + 1)) if min(seen_labels) >= 0 else ()
        return made, classes, rows.name
    path = Path(spec)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{spec!r} is neither a folder of images, a table, hfds:NAME, nor one of {', '.join(ZOO)}, {NOISE}"
        )
    listed = images.find(path)
    return Files(list(zip(listed.files, listed.labels, strict=True)), reading), listed.classes, str(path)


def check_alone(spec: str) -> None:
    """Refuse the name of data that come along where a folder bears it too.

    Raises:
        ValueError: it does.
    """
    if Path(spec).is_dir():
        raise ValueError(
            f"--data {spec} is both a folder here and data that come along with tokred: write ./{spec} for the folder, "
            "or rename it for the other"
        )


def usual(source: Source) -> str:
    """The data that a model brings along.

    Raises:
        ValueError: it brings none.
    """
    if source.name == "embedded":
        return EMBEDDED
    if source.weights == "random":
        return NOISE
    if source.name == "dinov2":
        return "fashion"
    raise ValueError(f"{source.name} brings no data along: give --data with {source.usual.data}")


def _zoo(source: Source, reading: Reading, spec: str) -> tuple[Any, tuple[str, ...], str]:
    carriers, kept = zoo("carriers"), zoo("data")
    high, wide = reading.size
    if high != wide or reading.channels != 3:
        raise ValueError(f"the zoo's images are square and in colour, but {source.name} takes {reading}")
    try:
        if spec == "photos":
            read = kept.photos(high, ("sklearn", "skimage", "imagenet"))
            labels, classes = torch.full((len(read.images),), -1), ()
        elif spec == "fashion":
            read = kept.as_rgb(kept.fashion_mnist("test"), high)
            labels, classes = read.labels, tuple(read.classes)
        else:
            read = kept.textile(high)
            labels, classes = read.labels, tuple(read.classes)
    except carriers.MissingWeights as error:
        raise NoModelError(str(error)) from error
    return _Bytes(read.images, labels, reading), classes, f"{spec} of the zoo"


class _Bytes(Dataset[tuple[Tensor, int]]):
    """Images ``(N, 3, H, W)`` uint8 in memory, normalised one by one."""

    def __init__(self, pixels: Tensor, labels: Tensor, reading: Reading) -> None:
        self.pixels, self.labels, self.reading = pixels, labels, reading

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = images.normalise(self.pixels[index], self.reading.mean, self.reading.std, torch.float32)
        return x, int(self.labels[index])


def _two_towers(
    source: Source,
    dataset: Any,
    order: Sequence[int],
    classes: tuple[str, ...],
    name: str,
    wanted: Any,
    dtype: torch.dtype,
) -> Data:
    """Zero-shot classification by the names of the classes, where there are names and a tokenizer; else the tower."""
    named = classes and not all(c.isdigit() for c in classes) and source.tokenizer is not None
    if named:
        model: Any = around.zero_shot(source.model, source.tokenizer, classes)
        batches = loader(dataset, order, wanted, Collate(None, dtype, range(len(classes))))
        note = f"top-1 is zero-shot: the nearest of {len(classes)} texts such as {around.PROMPT.format(classes[0])!r}"
        return Data(batches, name, "top1", "forward", model, True, [note])
    batches = loader(dataset, order, wanted, Collate(None, dtype, None))
    return Data(batches, name, "cosine", "forward", around.Tower(source.model).eval())


def _probed(
    source: Source, dataset: Any, classes: int, name: str, wanted: Any, argument: str | None, dtype: torch.dtype
) -> Data:
    """Top-1 of a linear probe, which is fitted on some of the images for the unpatched model, and tested on others.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are too few images.
    """
    probe.linear_models()
    count = min(wanted.count or 1000, len(dataset) // 2)
    if count < 2:
        raise ValueError(f"{name} holds {len(dataset)} images, too few to fit a linear probe on half of them")
    mixed = random.Random(wanted.seed).sample(range(len(dataset)), 2 * count)
    test, train = sorted(mixed[:count]), sorted(mixed[count:])
    collate = Collate(argument or "x", dtype, range(classes))
    features, labels = [], []
    with torch.inference_mode():
        device = next(source.module.parameters()).device
        for batch in loader(dataset, train, wanted, collate):
            labels.append(batch.pop("labels"))
            features.append(around.features_of(source.module, _on(batch, device)).float().cpu())
    fitted = probe.fit(torch.cat(features), torch.cat(labels))
    model = around.Probed(source.module, fitted).eval()
    why = (
        f"the classes of {name} do not fit its head of {source.classes} outputs" if source.classes else "it has no head"
    )
    note = f"top-1 is that of a linear probe ({why}), fitted on {count} images and tested on {count} others"
    return Data(loader(dataset, test, wanted, collate), name, "top1", "forward", model, True, [note])


def _on(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items()}
