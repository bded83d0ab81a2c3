"""Batches of the user's data, read as often as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

HELD = 2**30  # bytes of batches that are kept in memory, rather than read again for each row
ONCE = 2**31  # bytes that are kept of data that can be read only once
SAMPLES = 8  # of a batch, where a dataset yields samples and no size is asked for


class Unreadable(ValueError):
    """The data is at fault, rather than a method: no row can be measured."""


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    return (x for x in leaves(batch) if isinstance(x, Tensor))


def leaves(batch: Any) -> Iterator[Any]:
    """All values of a batch that hold no others, in order."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from leaves(value)
    else:
        yield batch


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [moved(value, device) for value in batch]
    if isinstance(batch, tuple):
        return tuple(moved(value, device) for value in batch)
    return batch


def fingerprint(found: Iterable[Any]) -> str:
    """Eight letters that change with shapes and values: of each tensor or array some sixty values are looked at."""
    digest = hashlib.sha256()
    for x in found:
        if hasattr(x, "convert") and hasattr(x, "size"):  # a picture of PIL
            x = torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8)
        elif hasattr(x, "__array__") and not isinstance(x, Tensor):
            x = torch.as_tensor(x.copy())
        if not isinstance(x, Tensor):
            plain = isinstance(x, str | bytes | int | float | None)
            digest.update(f"{type(x).__name__} {x if plain else ''}".encode())
            continue
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)]
        digest.update(f"{tuple(x.shape)} {x.dtype} {some.tolist()}".encode())
    return "x" + digest.hexdigest()[:8]  # a letter first, so that no one reads a number


def nbytes(batch: Any) -> int:
    """Bytes that a batch holds in memory; of a picture, those of three channels."""
    total = 0
    for x in leaves(batch):
        size = getattr(x, "size", None)
        if hasattr(x, "nbytes"):
            total += x.nbytes
        elif isinstance(size, tuple) and len(size) == 2:
            total += 3 * size[0] * size[1]
        else:
            total += len(x) if isinstance(x, str | bytes) else 8
    return total


def loader(data: Any, batch_size: int | None) -> Any:
    """The data as an iterable of batches, or a function that returns one each time.

    Args:
        data: an iterable of batches or a function that returns one; a dataset of torch or of Hugging Face, which
            yields samples; or, with ``batch_size``, any iterable of samples.
        batch_size: samples of a batch.

    Raises:
        TypeError: it is none of these.
        ValueError: the size is no number above 0.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, str | bytes | Mapping | Tensor) or not (iterable or callable(data)):
        raise TypeError(
            "data must be an iterable of batches, such as a DataLoader, or a function that returns one, "
            f"got {type(data).__name__}"
        )
    hugging = type(data).__module__.partition(".")[0] == "datasets"
    if isinstance(data, torch.utils.data.Dataset) or hugging:
        batch_size = batch_size or SAMPLES
    elif batch_size is not None and isinstance(data, torch.utils.data.DataLoader):
        raise ValueError(f"batch_size is {batch_size}, but data is a DataLoader, which makes batches itself")
    return data if batch_size is None else _Batched(data, batch_size)


class _Batched:
    """Samples collated into batches."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size = data, size
        self.once = isinstance(data, Iterator)

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []
        for sample in _iterate(self.data):
            held.append(sample)
            if len(held) == self.size:
                yield collate(held)
                held = []
        if held:
            yield collate(held)


def _iterate(data: Any) -> Iterator[Any]:
    if hasattr(data, "__iter__"):
        return iter(data)
    if hasattr(data, "__len__"):  # datasets of torch: they raise no IndexError that would end a loop
        return (data[i] for i in range(len(data)))
    return iter(data) if hasattr(data, "__getitem__") else iter(data())


def collate(samples: list[Any]) -> Any:
    """Samples as one batch: tensors and numbers stacked, texts and pictures as lists.

    Raises:
        ValueError: tensors or lists of numbers differ in their sizes.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        return {name: collate([sample[name] for sample in samples]) for name in first}
    if isinstance(first, tuple):
        return tuple(collate([sample[i] for sample in samples]) for i in range(len(first)))
    if isinstance(first, list) and first and isinstance(first[0], int | float | list):
        samples = [torch.tensor(sample) for sample in samples]
    elif hasattr(first, "__array__") and not isinstance(first, Tensor) and not hasattr(first, "convert"):
        samples = [torch.as_tensor(sample.copy() if hasattr(sample, "copy") else sample) for sample in samples]
    elif isinstance(first, int | float):
        return torch.tensor(samples)
    if not isinstance(samples[0], Tensor):
        return list(samples)
    shapes = {tuple(x.shape) for x in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"samples of data have {len(shapes)} shapes, such as {' and '.join(map(str, sorted(shapes)[:2]))}, so that "
            "they cannot be stacked: give batch_size=1, or a DataLoader with a collate_fn that pads"
        )
    return torch.stack(samples)


class Batches:
    """The user's data, which is read in the same order as often as it is needed.

    Args:
        data: what :func:`loader` makes batches of. An iterator, which is read once only, and small data are kept in
            memory.
        device: where batches go.
        prepare: makes of each item, and its number, what a model's run takes.
        seed: of loaders that shuffle.
        batch_size: of data that yields samples.

    Attributes:
        count: how many there are.
        first: the first one, on the device.
        batch: the one that :meth:`seek` made ready.
        prints: the fingerprint of each.
        together: how many of them may be kept at a time.

    Raises:
        TypeError: the data cannot be iterated over.
        ValueError: there is no batch, or an iterator holds more than is kept.
    """

    def __init__(
        self,
        data: Any,
        device: torch.device,
        prepare: Callable[[Any, int], Any],
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        self._data, self._device, self._prepare, self._seed = loader(data, batch_size), device, prepare, seed
        once = isinstance(self._data, Iterator) or getattr(self._data, "once", False)
        held: list[Any] | None = []
        self.prints: list[str] = []
        size, largest = 0, 1
        for batch in self._read():
            self.prints.append(fingerprint(leaves(batch)))
            size += (own := nbytes(batch))
            largest = max(largest, own)
            if once and size > ONCE:
                raise ValueError(
                    f"data is an iterator, which can be read only once, and holds more than {ONCE / 2**30:g} GiB: give "
                    "the loader itself, or a function that returns an iterator each time"
                )
            held = None if held is None or (size > HELD and not once) else [*held, batch]
            if len(self.prints) == 1:
                self.first = moved(batch, device)
        if not self.prints:
            raise ValueError("data yields no batch: the loader is empty")
        self.count, self.together = len(self.prints), max(1, HELD // largest)
        self._mine = list(range(self.count))
        self._held = held
        self._at = -1
        self._source: Iterator[Any] = iter(())
        self._read_to = 0
        self.batch: Any = None

    def _read(self) -> Iterator[Any]:
        generator = getattr(self._data, "generator", None)
        state = None
        if isinstance(generator, torch.Generator):
            state = generator.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            # A loader draws its order when the first batch is asked for.
            source = _iterate(self._data)
            ahead = next(source, None)
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
        if ahead is not None:
            yield self._prepare(ahead, 0)
            for i, item in enumerate(source, 1):
                yield self._prepare(item, i)

    @property
    def held(self) -> list[Any] | None:
        """All batches as a model's run takes them; None where they are read again for each row."""
        return self._held

    @property
    def source(self) -> Any:
        """The data that is read again."""
        return self._data

    def share(self, index: int, count: int) -> None:
        """Keep each ``count``-th batch, from batch ``index`` on, for :meth:`seek`; :attr:`first` stays.

        Raises:
            ValueError: there are fewer batches than shares.
        """
        if len(self.prints) < count:
            raise ValueError(f"data yields {len(self.prints)} batches, which {count} processes cannot share")
        self._mine = list(range(index, len(self.prints), count))
        self.count = len(self._mine)

    def restart(self) -> None:
        """Begin with the first batch again."""
        self._at, self.batch = -1, None

    def seek(self, index: int) -> None:
        """Have batch ``index`` ready; indices beyond the last begin again with the first.

        Raises:
            Unreadable: the data fails, or has other batches than before.
        """
        while self._at < index:
            self._at += 1
            i = self._mine[self._at % self.count]
            self.batch = moved(self._held[i] if self._held is not None else self._next(i), self._device)

    def _next(self, i: int) -> Any:
        try:
            if self._at % self.count == 0:
                self._source, self._read_to = self._read(), 0
            for _ in range(self._read_to, i):  # those of other processes
                next(self._source)
            batch, self._read_to = next(self._source), i + 1
        except StopIteration:
            raise Unreadable(f"data yields less than the {len(self.prints)} batches that it had before") from None
        except Exception as error:
            raise Unreadable(f"data failed at batch {i}: {type(error).__name__}: {error}") from error
        if fingerprint(leaves(batch)) != self.prints[i]:
            raise Unreadable(
                f"batch {i} of data is another one than when data was first read, so that rows cannot be compared: "
                "give list(data), or a loader that draws its order from torch and changes no sample at random"
            )
        return batch
