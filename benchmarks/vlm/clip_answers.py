"""Answers about clips alone, without times: blocks of the tower that no method looks into run once a batch for all
methods, and every wrapped method is compared with its base on the same questions."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from benchmarks.engine import Record
from benchmarks.zoo import vlm
from tokred.bench import results
from tokred.bench.entries import entry
from tokred.bench.intervals import Estimate, estimate, paired
from tokred.vlm.shots import FrameMerger

ALL = "all"  # kinds of questions together


@contextlib.contextmanager
def remembered(blocks: Sequence[nn.Module], kept: dict[bytes, Tensor]) -> Iterator[None]:
    """Inside, successive blocks of a tower run once for each input; when it comes again, so does what they gave.

    Args:
        blocks: each takes hidden states first, and returns hidden states.
        kept: what they gave, by what was given; filled here.
    """
    now: dict[str, bytes] = {}

    def first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now["key"] = hashlib.blake2b(x.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()
        return middle(x, *args, block=blocks[0], **kwargs)

    def middle(x: Tensor, *args: Any, block: nn.Module, **kwargs: Any) -> Tensor:
        if now["key"] in kept:
            return kept[now["key"]] if block is blocks[-1] else x
        x = stock[block](x, *args, **kwargs)
        if block is blocks[-1]:
            kept[now["key"]] = x
        return x

    stock: dict[nn.Module, Any] = {block: block.forward for block in blocks}
    try:
        for i, block in enumerate(blocks):
            block.forward = first if i == 0 else _of(middle, block)
        yield
    finally:
        for block in blocks:
            del block.forward


def _of(middle: Any, block: nn.Module) -> Any:
    return lambda x, *args, **kwargs: middle(x, *args, block=block, **kwargs)


@torch.inference_mode()
def rights(model: Any, tokenizer: Any, data: Sequence[Mapping[str, Any]], tokens: int = 4) -> list[float]:
    """1.0 for each answer that is right word for word up to its full stop, else 0.0."""
    found = []
    for batch in data:
        given = {name: value for name, value in batch.items() if name != "answers"}
        out = model.generate(**given, max_new_tokens=tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [float(vlm.said(text) == right) for text, right in zip(texts, batch["answers"], strict=True)]
    return found


def judged(
    model: Any,
    tokenizer: Any,
    chosen: Mapping[str, str],
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    head: Record,
    data_from: str = "",
) -> Iterator[list[Record]]:
    """Rows of the unpatched model and of each setting: for each kind of question, and where there are several for all.

    Args:
        chosen: settings by what stands in the table; ``"restore base=X share=S"`` is compared with ``"X share=S"``
            where that came before.
        data: batches of each kind, about the same clips in the same order.
        head: fields of every record.
        data_from: packages that the data come from.
    """
    blocks = [*model.model.vision_tower.encoder.layer][:-1]
    known: dict[str, dict[str, list[float]]] = {}
    source = results.here("cpu", model.dtype)
    head = {**head, **source, "versions": f"{source['versions']} {data_from}".strip()}
    kept: dict[bytes, Tensor] = {}
    for label, setting in {"unpatched": "", **chosen}.items():
        method, _, said = label.partition(" ")
        try:
            methods = list(entry(setting).methods) if setting else []
            inside = any(isinstance(m, FrameMerger) for m in methods)  # of the tower, whose blocks must run
            with (
                contextlib.nullcontext() if inside else remembered(blocks, kept),
                tokred.applied(model, methods) if methods else contextlib.nullcontext(),
            ):
                mine = {kind: rights(model, tokenizer, some) for kind, some in data.items()}
                # Of the first sample, with the line feed that stands behind a clip.
                left = tokred.report(model).layers[-1].visual[0] if setting else head["frames"] * vlm.FRAME + 1
        except (ValueError, tokred.MissingInputError) as error:
            print(f"{label}: {error}", flush=True)
            continue
        known[label] = mine
        base = known.get(said.removeprefix("base=")) if method == "restore" else None
        rows = []
        for kind in [*data, *([ALL] if len(data) > 1 else [])]:
            kinds = [*data] if kind == ALL else [kind]
            values = [v for k in kinds for v in mine[k]]
            record = {**head, "method": method, "setting": said, "asked": kind, "tokens_left": left}
            clip = [i for k in kinds for i in range(len(mine[k]))]
            record |= _fields("exact", estimate(values, [1.0] * len(values), clip)) | {"exact_count": len(values)}
            if base is not None:
                theirs = [v for k in kinds for v in base[k]]
                record |= _fields("exact_lift", paired(values, theirs, [1.0] * len(values), clip))
            rows.append(record)
        yield rows


def lifted(rows: Sequence[Record]) -> str:
    """How many wrapped methods answer more than what they wrap, at each share, in words."""
    found = []
    kinds = {row["asked"] for row in rows}
    mine = [row for row in rows if row["asked"] in ({ALL} & kinds or kinds) and "exact_lift" in row]
    for share in dict.fromkeys(row["setting"].split()[-1] for row in mine):
        lifts = [row["exact_lift"] for row in mine if row["setting"].split()[-1] == share]
        mean = sum(lifts) / len(lifts)
        found.append(f"{share}: {sum(v > 0 for v in lifts)} of {len(lifts)} lifted, {mean:+.3f} on average")
    return "\n".join(found)


def _fields(name: str, found: Estimate) -> Record:
    ends = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {field: value for field, value in ends.items() if value is not None}
