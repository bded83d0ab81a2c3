"""Questions about pictures, for vision-language models."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tokred.bench.sources import pictures, tables
from tokred.bench.sources.lazily import Lazily
from tokred.bench.sources.record import Data, Source

IMAGE = pictures.COLUMNS[0]
QUESTION = ("question", "prompt", "instruction", "text", "query")
ANSWER = ("answers", "answer", "label", "response", "caption")
COUNT = 100


def data(source: Source, spec: str | None, wanted: Any) -> Data:
    """Prompts of a picture and a question each, with the right answers where the table has them.

    Args:
        source: the model, with its processor.
        spec: a JSON-lines, CSV or parquet file, or ``hfds:NAME``.
        wanted: :class:`~tokred.bench.sources.given.Wanted`.

    Raises:
        FileNotFoundError, ValueError, ImportError: there is no such table or no processor, or columns are missing.
    """
    if spec is None:
        raise ValueError(f"{source.name} brings no questions along: give --data with {source.usual.data}")
    if not tables.is_table(spec):
        raise ValueError(f"questions are read from {', '.join(tables.FILES)} or hfds:NAME, got --data {spec}")
    if source.processor is None:
        raise ValueError(
            f"{source.name} came without a processor: save one beside the weights, or let the function that makes the "
            "model return (model, processor)"
        )
    rows = tables.rows(spec)
    image, question = rows.column(IMAGE, "image"), rows.column(QUESTION, "question")
    answer = rows.has(ANSWER)
    for i in range(min(len(rows.rows), wanted.count or COUNT)):
        pictures.picture(pictures.opened(rows.rows[i][image], rows.folder))  # found out before anything is measured
        break
    order = random.Random(wanted.seed).sample(range(len(rows.rows)), min(wanted.count or COUNT, len(rows.rows)))

    def make(some: Sequence[int]) -> dict[str, Any]:
        found = [rows.rows[i] for i in some]
        images = [pictures.picture(pictures.opened(row[image], rows.folder)) for row in found]
        batch = asked(source, images, [str(row[question]) for row in found])
        if answer is not None:
            batch["answers"] = [_answers(row, answer) for row in found]
        return batch

    metric = source.usual.metric if answer is not None else source.usual.bare
    batches = Lazily(sorted(order), wanted.batch or 1, make)
    options = {"tokenizer": source.tokenizer or source.processor}
    name = f"{rows.name}, {len(order)} questions"
    return Data(batches, name, metric, "generate", source.model, answer is not None, options=options)


def _answers(row: Mapping[str, Any], column: str) -> list[str]:
    """All answers that count as right."""
    found = row[column]
    if isinstance(found, Mapping):  # such as {"text": [...]}
        found = next(iter(found.values()))
    return [str(one) for one in found] if isinstance(found, list | tuple) else [str(found)]


def asked(source: Source, images: Sequence[Any], questions: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``generate`` for pictures and questions, padded on the left."""
    processor: Any = source.processor
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.padding_side = "left"
    prompts = [_prompt(processor, question) for question in questions]
    given = processor(images=[[one] for one in images], text=prompts, return_tensors="pt", padding=len(prompts) > 1)
    return _cast(source, given)


def asked_of_clip(source: Source, frames: Sequence[Any], question: str) -> tuple[dict[str, Any], bool]:
    """The arguments of ``generate`` for one clip and a question.

    Args:
        source: the model, with its processor.
        frames: pictures of PIL's.
        question: about them.

    Returns:
        The arguments, and whether the frames go in as so many images, which :func:`tokred.vlm.clips` has to tell from
        separate ones: the processor knows no videos.
    """
    processor: Any = source.processor
    if getattr(processor, "video_processor", None) is None:
        prompt = _prompt(processor, question, count=len(frames))
        return _cast(source, processor(images=[list(frames)], text=[prompt], return_tensors="pt")), True
    prompt = _prompt(processor, question, "video")
    # All of the frames: some processors would choose among them.
    given = processor(videos=[list(frames)], text=[prompt], return_tensors="pt", do_sample_frames=False)
    return _cast(source, given), False


def _cast(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels in the type of the model's weights."""
    floating = next(source.module.parameters()).dtype
    return {
        k: v.to(floating) if hasattr(v, "is_floating_point") and v.is_floating_point() else v for k, v in given.items()
    }


def _prompt(processor: Any, question: str, kind: str = "image", count: int = 1) -> str:
    """The prompt by the model's own template; without one, the marks of pictures before the question."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": kind} for _ in range(count)), {"type": "text", "text": question}]
        found: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return found
    return f"{getattr(processor, f'{kind}_token', f'<{kind}>') * count}\n{question}"
