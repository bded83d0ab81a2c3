"""Texts for language models and text encoders: files and tables, as windows of tokens or line by line."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tokred.bench.sources import tables
from tokred.bench.sources.lazily import Lazily
from tokred.bench.sources.record import Data, Source

COLUMNS = ("text", "content", "prompt", "document", "sentence", "question")
WINDOWS, LEAST = 20, 64  # windows of text that are scored, and tokens of the shortest
LINES = 256


def windows(source: Source, spec: str | None, wanted: Any) -> Data:
    """Windows of token ids ``(B, length)``, spread over the texts.

    Raises:
        ValueError: there is no text, no tokenizer, or too little text for a window.
    """
    if spec == "noise":
        return _drawn(source, wanted)
    documents, name = read(source, spec)
    tokenizer = needed(source)
    length = min(wanted.length, _longest(source))
    found = []
    for text in documents:
        # One call for the whole document: how a text is split depends on what stands around.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] or [ids]
    full = [w for w in found if len(w) == length]
    short = [w for w in found if LEAST <= len(w) < length]
    if not full and not short:
        most = max(map(len, found), default=0)
        raise ValueError(f"{name} has no text of {LEAST} tokens or more, but of {most} at most: give a longer one")
    count = wanted.count or WINDOWS
    rng = random.Random(wanted.seed)
    # Windows of one length go together; shorter texts are left out unless there is nothing else.
    chosen = full if full else short
    order = sorted(rng.sample(range(len(chosen)), min(count, len(chosen))))
    batch = (wanted.batch or 1) if full else 1
    batches = Lazily([chosen[i] for i in order], batch, _ids)
    notes = []
    if len(order) < WINDOWS:
        notes.append(
            f"{len(order)} windows of text tell little: 20 or more are wanted, by more text or a lower --length"
        )
    return Data(batches, f"{name}, {len(order)} windows", "perplexity", "text", source.model, True, notes)


def _ids(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(rows)}


def _drawn(source: Source, wanted: Any) -> Data:
    """Tokens drawn at random: for speed alone."""
    generator = torch.Generator().manual_seed(wanted.seed)
    length = min(wanted.length, _longest(source))
    rows = torch.randint(3, _vocabulary(source), (wanted.count or 4, length), generator=generator).tolist()
    batches = Lazily(rows, wanted.batch or 1, _ids)
    return Data(batches, "noise", "agreement", "text", source.model, False, ["the texts are noise: only speed counts"])


def _vocabulary(source: Source) -> int:
    return int(source.model.get_input_embeddings().weight.shape[0])


def _longest(source: Source) -> int:
    """Positions that the model has."""
    config = getattr(source.model, "config", None)
    inner = getattr(config, "text_config", None) or config
    return int(getattr(inner, "max_position_embeddings", None) or 2**31)


def needed(source: Source) -> Any:
    """The tokenizer.

    Raises:
        ValueError: the model came without one.
    """
    if source.tokenizer is None:
        raise ValueError(
            f"{source.name} came without a tokenizer: save one beside the weights, let the function that makes the "
            "model return (model, tokenizer), or give --data module:function that yields token ids"
        )
    return source.tokenizer


def read(source: Source, spec: str | None) -> tuple[list[str], str]:
    """Texts, and the name of where they are from: a text file is one text, a folder of them and a table are many.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if spec is None:
        raise ValueError(f"{source.name} brings no texts along: give --data with {source.usual.data}")
    if tables.is_table(spec):
        rows = tables.rows(spec)
        column = rows.column(COLUMNS, "text")
        found = [str(row[column]) for row in rows.rows]
        return [text for text in found if text.strip()], rows.name
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{path} holds no text file (.txt)")
        return [file.read_text("utf8", errors="replace") for file in files], str(path)
    if not path.is_file():
        raise FileNotFoundError(f"{spec!r} is neither a text file, a table (.jsonl, .csv, .parquet) nor hfds:NAME")
    return [path.read_text("utf8", errors="replace")], path.name


def lines(source: Source, spec: str | None, wanted: Any) -> Data:
    """Lines or rows as token ids with a mask, padded to the longest of a batch, for text encoders.

    Raises:
        ValueError: there is no text, or no tokenizer.
    """
    if spec == "noise":
        found = _drawn(source, wanted)
        return Data(found.batches, "noise", "cosine", "forward", source.model, notes=found.notes)
    documents, name = read(source, spec)
    tokenizer = needed(source)
    split = [line.strip() for text in documents for line in _lines(text, len(documents)) if line.strip()]
    if not split:
        raise ValueError(f"{name} holds no line of text")
    rng = random.Random(wanted.seed)
    order = sorted(rng.sample(range(len(split)), min(wanted.count or LINES, len(split))))
    longest = min(wanted.length, _longest(source))

    def make(some: Sequence[str]) -> dict[str, Any]:
        given = tokenizer(list(some), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return dict(given)

    batches = Lazily([split[i] for i in order], wanted.batch or 16, make)
    return Data(batches, f"{name}, {len(order)} lines", "cosine", "forward", source.model)


def _lines(text: str, documents: int) -> Iterator[str]:
    """The lines of a file that is one text; a row of a table as it is."""
    return iter(text.splitlines() if documents == 1 else [text])
