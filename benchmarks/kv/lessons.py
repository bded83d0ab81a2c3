"""What the learned caches learn from: texts that SmolLM2 has read and repeated once, for all four of them.

KVzap, FastCache, TokenButler and ADORE learn from what the frozen model attends to, and each recipe lets the model read
its texts anew at every step. Here it reads each text once: what the four losses are about is kept in a file, and every
step of a training takes a file. The losses are the methods' own.

Texts are of :data:`PROMPT` tokens, from the first :data:`SHARE` of the Debian handbook and from modules of Python's
standard library that ``benchmarks/kv/texts.py`` cuts no sample from. Measured is on what is left of the handbook, and
on others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import tokred
from benchmarks.kv import texts
from benchmarks.zoo import data
from tokred.kv.engine import Engine

SHARE = 0.6
MODULES = (
    "asyncio/base_events", "bdb", "cgitb", "codecs", "csv", "dataclasses", "datetime", "decimal", "doctest",
    "email/message", "enum", "ftplib", "functools", "heapq", "http/client", "json/decoder", "locale", "mailbox",
    "nntplib", "optparse", "pathlib", "pickle", "platform", "pstats", "random", "shutil", "smtplib", "socket",
    "statistics", "subprocess", "textwrap", "threading", "traceback", "typing", "unittest/mock", "urllib/request",
    "uuid", "zipfile",
)  # fmt: skip
PROMPT = 480  # half of what ``kv/tasks`` has: a text costs a third
REFERENCES = 64  # queries of the repetition, of each layer
SINKS, RECENT = 4, 16  # first and newest tokens that always stay, of methods that have such
THRESHOLDS = "thresholds.json"  # of KVzap, by the share of rows that they keep
_TILE = 120  # queries at a time


def parted() -> tuple[str, str]:
    """The handbook, cut at a blank: what is learned from, and what is measured on."""
    book = data.handbook()
    cut = book.index(" ", int(len(book) * SHARE))
    return book[:cut], book[cut:]


def lessons(tokenizer: Any, seed: int = 0) -> Iterator[Tensor]:
    """``(N,)`` ids of texts without end: two of prose, one of code."""
    maker = texts.Maker(tokenizer, prose=[parted()[0]], code=["\n".join(_modules())])
    for i in itertools.count():
        rng = random.Random(f"lesson {i} {seed}")
        source = maker.code if i % 3 == 2 else maker.prose
        yield maker.stretch(source, 0, rng, PROMPT)


def _modules() -> Iterator[str]:
    for name in MODULES:
        try:
            yield texts.standard_library(name)
        except FileNotFoundError:  # another Python has it no more
            continue


class Listener(Engine):
    """KVzip+ at its work, of which everything is written down and nothing evicted."""

    def __init__(self, policy: Any, depth: int) -> None:
        super().__init__(policy, depth)
        self.read: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "hidden": [], "asked": []}
        self.attended: Tensor | None = None
        self.found: Tensor | None = None

    def observe(self, layer: Any, site: Any, before: int) -> None:
        if self.probe is not None:
            chosen = torch.linspace(0, site.q.shape[2] - 1, REFERENCES).round().long()
            self.read["asked"].append(site.q[0, :, chosen].clone())
        else:
            for name in ("q", "k", "v"):
                self.read[name].append(getattr(site, name)[0].clone())
            self.read["hidden"].append(site.hidden[0].clone())
            self._attend(site)
        super().observe(layer, site, before)

    def _attend(self, site: Any) -> None:
        """Add up the weights of all heads and layers."""
        n, groups = site.q.shape[2], site.q.shape[1] // site.k.shape[1]
        if self.attended is None:
            self.attended = torch.zeros(n, n)
        for start in range(0, n, _TILE):
            end = min(start + _TILE, n)
            ahead = torch.arange(end) > torch.arange(start, end)[:, None]
            keys = site.k[0, :, None, :end].mT
            q = site.q[0, :, start:end].view(len(keys), groups, end - start, -1)
            logits = (q @ keys).float() * site.scale
            self.attended[start:end, :end] += logits.masked_fill_(ahead, -torch.inf).softmax(-1).sum((0, 1))

    def judged(self, probe: Any) -> None:
        waiting, self._waiting = self._waiting, {}
        scores = [probe.scores(i, site, None)[0] for i, (_, site, _) in sorted(waiting.items())]
        self.found = torch.stack(scores)


@torch.inference_mode()
def heard(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the four losses are about, of one text ``(N,)``.

    Returns:
        ``q`` ``[L, H, N, D]``, ``k`` and ``v`` ``[L, Hk, N, D]``, ``hidden`` ``[L, N, C]``, ``asked`` ``[L, H, m, D]``
        queries of the repetition, in the model's type; ``attended`` ``[N, N]`` float32 weights, added up over heads and
        layers; ``found`` ``[L, Hk, N]`` float32, KVzip+'s scores, infinite on the first tokens; ``ids``.
    """
    policy = tokred.make("kvzip", norm="plus", budget=0.5, sinks=SINKS)
    with tokred.applied(model, policy):
        cache = tokred.kv_cache(model)
        engine = Listener(policy, len(cache.layers))
        cache.engine = engine
        for layer in cache.layers:
            layer.engine = engine
        model.model(ids[None], past_key_values=cache)
    assert engine.found is not None
    assert engine.attended is not None
    return {
        **{name: torch.stack(found) for name, found in engine.read.items()},
        "attended": engine.attended,
        "found": engine.found,
        "ids": ids,
    }


def collect(model: Any, tokenizer: Any, folder: Path, count: int) -> Iterator[Path]:
    """Files of the first ``count`` texts; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, ids in zip(range(count), lessons(tokenizer), strict=False):
        path = folder / f"{i:04}.safetensors"
        if not path.exists():
            aside = path.with_suffix(".part")
            save_file({name: t.contiguous() for name, t in heard(model, ids).items()}, str(aside))
            aside.replace(path)
        yield path


def load(path: Path, *names: str) -> list[Tensor]:
    """Some tensors of a file."""
    with safe_open(str(path), "pt") as f:
        return [f.get_tensor(name) for name in names]
