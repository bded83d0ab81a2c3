"""Batches of the user's data, read as often as they are needed, and how a model of each stage runs on one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokred import adapters, api
from tokred.adapters.contract import cache_argument, cache_name
from tokred.bench.read import arguments

HELD = 2**28  # bytes of batches that are kept in memory, rather than read again for each row
SHARE = 0.75  # of a text that is the prompt
CHUNK = 8  # tokens fed at once to policies that evict while tokens are generated


class Unreadable(ValueError):
    """The data is at fault, rather than a method: no row can be measured."""


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(moved(value, device) for value in batch)
    return batch


def fingerprint(found: Iterable[Tensor]) -> str:
    """Eight letters that change with shapes and values: of each tensor some sixty values are looked at."""
    digest = hashlib.sha256()
    for x in found:
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)]
        digest.update(f"{tuple(x.shape)} {x.dtype} {some.tolist()}".encode())
    return "x" + digest.hexdigest()[:8]  # a letter first, so that no one reads a number


class Batches:
    """The user's data, which is read in the same order as often as it is needed.

    Args:
        data: an iterable of batches. An iterator, which is read once only, and small data are kept in memory.
        device: where batches go.
        prepare: makes of each item what a model's run takes.
        seed: of loaders that shuffle.

    Attributes:
        count: how many there are.
        first: the first one, on the device.
        batch: the one that :meth:`seek` made ready.
        prints: the fingerprint of each.

    Raises:
        TypeError: the data cannot be iterated over.
        ValueError: there is no batch.
    """

    def __init__(self, data: Any, device: torch.device, prepare: Callable[[Any], Any], seed: int = 0) -> None:
        wrong = isinstance(data, str | bytes | Mapping | Tensor)
        if wrong or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TypeError(f"data must be an iterable of batches, such as a DataLoader, got {type(data).__name__}")
        self._data, self._device, self._prepare, self._seed = data, device, prepare, seed
        once = isinstance(data, Iterator)
        held: list[Any] | None = []
        self.prints: list[str] = []
        size = 0
        for batch in self._read():
            self.prints.append(fingerprint(tensors(batch)))
            size += sum(x.nbytes for x in tensors(batch))
            held = None if held is None or (size > HELD and not once) else [*held, batch]
            if len(self.prints) == 1:
                self.first = moved(batch, device)
        if not self.prints:
            raise ValueError("data yields no batch: the loader is empty")
        self.count = len(self.prints)
        self._held = held
        self._at = -1
        self._source: Iterator[Any] = iter(())
        self.batch: Any = None

    def _read(self) -> Iterator[Any]:
        generator = getattr(self._data, "generator", None)
        state = None
        if isinstance(generator, torch.Generator):
            state = generator.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            # A loader draws its order when the first batch is asked for.
            source = iter(self._data)
            ahead = next(source, None)
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
        if ahead is not None:
            yield self._prepare(ahead)
            for item in source:
                yield self._prepare(item)

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
            i = self._at % self.count
            self.batch = moved(self._held[i] if self._held is not None else self._next(i), self._device)

    def _next(self, i: int) -> Any:
        try:
            if i == 0:
                self._source = self._read()
            batch = next(self._source)
        except StopIteration:
            raise Unreadable(f"data yields {i} batches where it had {self.count} before") from None
        except Exception as error:
            raise Unreadable(f"data failed at batch {i}: {type(error).__name__}: {error}") from error
        if fingerprint(tensors(batch)) != self.prints[i]:
            raise Unreadable(
                f"batch {i} of data is another one than when data was first read, so that rows cannot be compared: "
                "give list(data), or a loader that draws its order from torch and changes no sample at random"
            )
        return batch


class Feed(Protocol):
    """A stage's way to run a model on a batch."""

    def prepare(self, item: Any) -> Any:
        """The batch that an item of the data is."""

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The output of the model on a batch."""

    def probe(self, model: nn.Module, batch: Any) -> None:
        """The least run of a patched model after which its report tells what was kept."""


class Forward:
    """Encoders: one forward."""

    def prepare(self, item: Any) -> Any:
        if not any(True for _ in tensors(item)):
            raise ValueError(
                "a batch of data is a tensor, (inputs, labels), or a dict of the forward's arguments, "
                f"got {type(item).__name__} without a tensor in it"
            )
        return item

    def run(self, model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            # Given labels, models of transformers compute a loss, which is none of the work that is compared.
            return model(**arguments(batch))
        return model(batch[0] if isinstance(batch, tuple | list) else batch)

    def probe(self, model: nn.Module, batch: Any) -> None:
        self.run(model, batch)


class Chunks:
    """Language models: the first three quarters of a text are the prompt, the rest is scored from the cache.

    The output is the logits ``(B, M, V)`` of the last ``M`` tokens.
    """

    def prepare(self, item: Any) -> dict[str, Any]:
        """A dictionary with ``input_ids`` ``(B, N)``.

        Raises:
            ValueError, TypeError: there are no token ids, too few, or padding on the right.
        """
        if isinstance(item, list | tuple) and item and all(isinstance(i, int) for i in item):
            item = torch.tensor([item])
        elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
            item = item[0]
        if isinstance(item, Tensor):
            item = {"input_ids": item}
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
            raise TypeError(
                f"a batch of data for a language model is a dict with 'input_ids' (B, N), or token ids, "
                f"got {type(item).__name__}: tokenise texts first"
            )
        batch = dict(item)
        ids = batch["input_ids"] if batch["input_ids"].ndim > 1 else batch["input_ids"][None]
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"input_ids are whole numbers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] < 8:
            raise ValueError(f"a text has at least 8 tokens, of which a quarter is scored, got {ids.shape[1]}")
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and bool(mask.all()):
            mask = None
        if mask is not None:
            mask = mask.reshape(ids.shape)
            if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, self.prompt(ids) - 1].all()):
                raise ValueError(
                    "attention_mask: padding must stand on the left, within the first three quarters of each text"
                )
        return {**batch, "input_ids": ids, "attention_mask": mask}

    @staticmethod
    def prompt(ids: Tensor) -> int:
        """Tokens of the prompt, whose last one is fed with those that are scored: it predicts the first of them."""
        return int(ids.shape[1] * SHARE) - 1

    def cache(self, model: nn.Module) -> tuple[Any, bool]:
        """An empty cache, and whether its rows leave at every step."""
        found = [m for m in api.patched(model) if m.stage == "cache"]
        if not found:
            from transformers import DynamicCache

            config = getattr(model, "config", None)
            return (DynamicCache() if config is None else DynamicCache(config=config)), False
        policy: Any = found[0]
        return api.kv_cache(model), bool(policy.parts.when.every)

    def run(self, model: nn.Module, batch: Any) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache, stepwise = self.cache(model)
        n, end = self.prompt(ids), ids.shape[1] - 1
        self._forward(model, ids, mask, 0, n, cache)
        step = CHUNK if stepwise else end
        parts = [self._forward(model, ids, mask, i, min(i + step, end), cache) for i in range(n, end, step)]
        return torch.cat(parts, 1)

    def probe(self, model: nn.Module, batch: Any) -> None:
        ids = batch["input_ids"]
        self._forward(model, ids, batch["attention_mask"], 0, self.prompt(ids), self.cache(model)[0])

    @staticmethod
    def _forward(model: nn.Module, ids: Tensor, mask: Tensor | None, start: int, end: int, cache: Any) -> Tensor:
        given: dict[str, Any] = {}
        if mask is not None:
            given = {"attention_mask": mask[:, :end]}
            given["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
        if start == 0:
            given["logits_to_keep"] = 1  # of a prompt no logits are scored, and all of them may not fit
        given[_cache_name(model)] = cache
        out = model(input_ids=ids[:, start:end], use_cache=True, **given)
        logits: Tensor = out.logits
        return logits


def _cache_name(model: nn.Module) -> str:
    """Argument that takes the cache: of the model's own forward, else (``**kwargs``) of the one that it hands it to."""
    return cache_argument(model.forward) or cache_name(type(adapters.find(model, "cache").model).forward)


FEEDS: dict[str, Callable[[], Feed]] = {"block": Forward, "cache": Chunks}
