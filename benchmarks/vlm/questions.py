"""Answers of the small VLM about held-out pictures, and down to which of its layers they need visual tokens.

    python -m benchmarks.zoo.fetch dinov2 smollm2 fashion questions
    python -m benchmarks vlm/questions --held 200 --samples 24 --dtype bfloat16 --threads 1 --out vlm.csv
    python -m benchmarks vlm/questions --weights benchmarks/zoo/vlm_clips.safetensors --samples 0

Asked are the colour and the shape of easy-VQA's things, each in the words that are used most, and the piece of clothing
in a scene of ``benchmarks/zoo/vlm.py``; 256 visual tokens. An answer is right if it is so word for word.
``answer_lost`` is what ``tokred.horizon`` measures: the probability of the right answer that is lost where all visual
tokens leave before a layer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import Record, threads
from benchmarks.saving import save, saving
from benchmarks.vlm.clip_answers import rights
from benchmarks.zoo import carriers, questions, vlm
from tokred.bench import results

KINDS = ("color", "shape", "clothes")
SIZE = 10  # of a batch


def about(kind: str, count: int) -> tuple[str, Tensor, list[str]]:
    """A prompt, pictures ``(count, 3, 224, 224)`` uint8 that are asked about with it, and their answers.

    Args:
        kind: of :data:`KINDS`.
        count: how many; no more than there are pictures asked about in these words.
    """
    if kind == "clothes":
        held = vlm.scenes("test", count, seed=1)
        return vlm.PROMPT, held.images, [vlm.CLASSES[y] for y in held.labels]
    every = questions.pictures("test")
    of_kind = [q for q in every.questions if q.kind == kind]
    text = Counter(q.text for q in of_kind).most_common(1)[0][0]
    chosen = [q for q in of_kind if q.text == text][:count]
    images = questions.resized(every.images[[q.picture for q in chosen]], vlm.SIZE)
    return vlm.asked(text), images, [q.answer for q in chosen]


def batches(model: Any, tokenizer: Any, prompt: str, images: Tensor, answers: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments of ``generate`` with the right answers."""
    for i in range(0, len(images), SIZE):
        given = vlm.inputs(tokenizer, images[i : i + SIZE], prompt, model.dtype)
        yield {**given, "answers": answers[i : i + SIZE], **vlm.ends(tokenizer)}


def told(model: Any, tokenizer: Any, prompt: str, images: Tensor, answers: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments of forwards that end with the right answer, a picture each."""
    for image, answer in zip(images, answers, strict=True):
        said = f" {answer}."
        given = vlm.inputs(tokenizer, image[None], prompt + said, model.dtype)
        labels = given["input_ids"].clone()
        labels[:, : -len(tokenizer(said, add_special_tokens=False).input_ids)] = -100
        yield {**given, "labels": labels}


def needed(model: Any, data: list[dict[str, Any]], step: int, head: Record) -> tuple[list[Record], str]:
    """A record for each layer, and the horizon in words."""
    found = tokred.horizon(model, data, samples=len(data), step=step)
    error = found.gains.std(0) / len(found.gains) ** 0.5
    rows = []
    for layer, lost, one in zip(found.layers, found.curve, error.tolist(), strict=True):
        rows.append({**head, "setting": f"layer={layer}", **results.mean("answer_lost", lost, one)})
    return rows, str(found).splitlines()[0]


def main() -> None:
    """Ask, measure the horizon, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=int, default=200, help="questions of each kind")
    parser.add_argument("--samples", type=int, default=24, help="of each kind, whose horizon is measured; 0: none")
    parser.add_argument("--step", type=int, default=2, help="of the layers before which visual tokens leave")
    parser.add_argument("--weights", type=Path, default=vlm.QUESTIONS, help="what was trained: a safetensors file")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    saving(parser)
    given = parser.parse_args()
    if not given.weights.exists():
        parser.error(f"--weights: there is no {given.weights}; vlm/train_questions makes one, in its --folder")
    if given.samples == 1:
        parser.error("--samples must be 0 or at least 2, of which an interval can be told; got 1")
    threads(given.threads)
    model, tokenizer = vlm.build(given.weights)
    model.to(getattr(torch, given.dtype))
    source = results.here("cpu", model.dtype)
    source["versions"] = f"{source['versions']} {carriers.cited('dinov2', 'smollm2', 'fashion', 'questions')}".strip()
    name = f"dinov2-smollm2-135m-{given.weights.stem.removeprefix('vlm_')}"
    for kind in KINDS:
        head: Record = {"model": name, "method": "unpatched", "asked": kind, **source}
        prompt, images, answers = about(kind, max(given.held, given.samples))
        asked = [*batches(model, tokenizer, prompt, images[: given.held], answers)]
        right = rights(model, tokenizer, asked)
        row = head | {"setting": "", **results.share("exact", round(sum(right)), len(right)), "exact_count": len(right)}
        save([row], "questions", given)
        print(f"{kind}: {sum(right):.0f} of {len(right)} right", flush=True)
        if given.samples:
            data = [*told(model, tokenizer, prompt, images[: given.samples], answers[: given.samples])]
            rows, said = needed(model, data, given.step, head | {"images": len(data)})
            save(rows, "horizon", given)
            print(f"{kind}: {said}", flush=True)


if __name__ == "__main__":
    main()
