"""Questions on long texts, in the schema of kvpress: asked before the cache is compressed, or after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokred import adapters, api
from tokred.adapters.contract import cache_argument, cache_name
from tokred.bench.outputs import Generated
from tokred.core.checks import check_choice

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens")
Asked = Literal["inside", "after"]
Match = Literal["auto", "all", "any"]
MARK = "\x00question\x00"  # where a chat template's text is cut in two


def string_match(text: str, answers: Sequence[str], every: bool = True) -> float:
    """RULER's score: the share of the answers that stand somewhere in a text, whatever their case.

    Args:
        text: what was generated.
        answers: the right ones.
        every: True: the share of them all; False: 1 if any is there, else 0.
    """
    hits = [answer.lower() in text.lower() for answer in answers]
    return sum(hits) / len(hits) if every else float(any(hits))


class ContextQA:
    """Questions on texts, as data, run and metric of :func:`tokred.benchmark`.

        qa = tokred.eval.context_qa("ruler.jsonl", tokenizer, question="after")
        tokred.benchmark(model, ["snapkv budget=0.25"], qa, qa.string_match, run=qa.run)

    Iterating yields batches: ``input_ids`` and ``attention_mask`` ``(B, N)``, padded on the left, ``answers``,
    ``max_new_tokens``, ``group`` (task and context), and where the question comes after the compression
    ``question_ids`` and ``question_mask``.

    Attributes:
        question: ``"inside"``: context and question are one prompt, and the policy has seen the question when it
            compresses; ``"after"``: the context is read and compressed, and the question follows.
    """

    def __init__(
        self, rows: list[dict[str, Any]], tokenizer: Any, question: Asked, batch_size: int, match: Match
    ) -> None:
        self._rows, self._tokenizer = rows, tokenizer
        self.question, self._size, self._match = question, batch_size, match

    def __len__(self) -> int:
        return len(self._chunks())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._batch, self._chunks())

    def _chunks(self) -> list[list[dict[str, Any]]]:
        """Samples of one batch each: those whose answers may be as long, so that none is longer for its neighbours."""
        alike: dict[int, list[dict[str, Any]]] = {}
        for row in self._rows:
            alike.setdefault(row["max_new_tokens"], []).append(row)
        return [rows[i : i + self._size] for rows in alike.values() for i in range(0, len(rows), self._size)]

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "answers": [row["answers"] for row in rows],
            "group": [row["group"] for row in rows],
            "max_new_tokens": rows[0]["max_new_tokens"],
        }
        contexts, questions = ([row[name] for row in rows] for name in ("context_ids", "question_ids"))
        if self.question == "inside":
            prompts = [a + b for a, b in zip(contexts, questions, strict=True)]
            batch["input_ids"], batch["attention_mask"] = self._padded(prompts)
        else:
            batch["input_ids"], batch["attention_mask"] = self._padded(contexts)
            batch["question_ids"], batch["question_mask"] = self._padded(questions)
        return batch

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, texts))
        pad = self._tokenizer.pad_token_id
        fill = self._tokenizer.eos_token_id if pad is None else pad
        ids = torch.full((len(texts), width), 0 if fill is None else int(fill))
        mask = torch.zeros(len(texts), width, dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, width - len(text) :] = torch.tensor(text)
            mask[i, width - len(text) :] = 1
        return ids, mask

    def run(self, model: Any, batch: Mapping[str, Any]) -> Generated:
        """The answers of a model, patched or not, to a batch; greedy."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        given: dict[str, Any] = {}
        if "question_ids" in batch:
            cache = _cache(model)
            position = (mask.cumsum(1) - 1).clamp(min=0)
            given[_cache_name(model)] = cache
            model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1, **given)
            ids, mask = torch.cat([ids, batch["question_ids"]], 1), torch.cat([mask, batch["question_mask"]], 1)
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=batch["max_new_tokens"], do_sample=False,
            pad_token_id=self._pad, **given,
        )  # fmt: skip
        new = found[:, ids.shape[1] :]
        rows = [self._ended(row) for row in new.tolist()]
        texts = tuple(self._tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
        return Generated(new, tuple(map(len, rows)), texts)

    @property
    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id
        found = self._tokenizer.eos_token_id if pad is None else pad
        return 0 if found is None else int(found)

    def _ended(self, row: list[int]) -> list[int]:
        """Tokens up to the end token, which counts."""
        end = self._tokenizer.eos_token_id
        return row[: row.index(end) + 1] if end in row else row

    def string_match(self, output: Generated, batch: Mapping[str, Any]) -> Tensor:
        """RULER's score ``(B,)`` of each sample, see :func:`string_match`.

        Raises:
            ValueError: the answers came without their texts.
        """
        if output.texts is None:
            raise ValueError("the answers have no texts: give run=qa.run, or tokenizer= to tokred.benchmark")
        every = [self._every(group) for group in batch["group"]]
        zipped = zip(output.texts, batch["answers"], every, strict=True)
        return torch.tensor([string_match(text, answers, one) for text, answers, one in zipped], dtype=torch.float64)

    def _every(self, group: str) -> bool:
        """RULER asks for all hidden values, and in its questions on paragraphs for any of the right answers."""
        return self._match == "all" or (self._match == "auto" and not group.startswith("qa"))


def _cache(model: Any) -> Any:
    """An empty cache, of the kind that a patched model needs."""
    if any(m.stage == "cache" for m in api.patched(model)):
        return api.kv_cache(model)
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _cache_name(model: Any) -> str:
    """Argument that takes the cache, of the model's own forward or of the one that it hands its arguments to."""
    return cache_argument(model.forward) or cache_name(type(adapters.find(model, "cache").model).forward)


def context_qa(
    data: Any,
    tokenizer: Any,
    *,
    question: Asked = "inside",
    batch_size: int = 1,
    limit: int | None = None,
    max_context: int | None = None,
    max_new_tokens: int | None = None,
    chat: bool = False,
    match: Match = "auto",
) -> ContextQA:
    """Batches of questions on long texts.

    Texts are joined as they are, context, question, answer prefix, and tokenised in the same two pieces either way, so
    that ``"inside"`` and ``"after"`` differ in nothing but the moment of the compression.

    Args:
        data: a ``.jsonl`` file, a dataset of Hugging Face, a frame, or dictionaries, with ``context``, ``question``,
            ``answer`` (a text, or a list of them), and if they matter ``answer_prefix``, ``max_new_tokens``, ``task``.
        tokenizer: of the model.
        question: ``"inside"`` the prompt, so that the policy sees it; or ``"after"`` the context is compressed.
        batch_size: samples of a batch.
        limit: samples at most.
        max_context: tokens of a context, at most; the first ones stay.
        max_new_tokens: of every answer; None: as the data say.
        chat: write context and question as a user's message in the tokenizer's chat template.
        match: all of a sample's answers count by share, ``"any"`` of them suffices, or ``"auto"``: any for tasks whose
            name begins with ``qa``, as in RULER.

    Raises:
        TypeError, ValueError: an argument is wrong, or a sample lacks a column or has no answer.
        OSError: the file cannot be read.
    """
    check_choice(question, "question", ("inside", "after"))
    check_choice(match, "match", ("auto", "all", "any"))
    _counts(batch_size=batch_size, limit=limit, max_context=max_context, max_new_tokens=max_new_tokens)
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
    rows = [_row(i, one, max_new_tokens) for i, one in enumerate(_read(data)) if limit is None or i < limit]
    if not rows:
        raise ValueError("data has no sample")
    for row in rows:
        head, tail = row.pop("context"), row.pop("question")
        head, tail = _in_template(tokenizer, head, tail) if chat else (head, tail)
        # A chat template writes its own first token.
        row["context_ids"] = list(tokenizer(head, add_special_tokens=not chat)["input_ids"])[:max_context]
        row["question_ids"] = list(tokenizer(tail + row.pop("prefix"), add_special_tokens=False)["input_ids"])
        if not row["context_ids"] or not row["question_ids"]:
            raise ValueError("a sample has an empty context or question")
    return ContextQA(rows, tokenizer, question, batch_size, match)


def _counts(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _read(data: Any) -> Iterable[Any]:
    if isinstance(data, str | Path):
        path = Path(data)
        if path.suffix != ".jsonl":
            raise ValueError(f"data is {str(data)!r}; a file of samples is a .jsonl file")
        return (json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip())
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        found: Iterable[Any] = data.to_dict("records")
        return found
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data is a .jsonl file, a dataset, a frame or a list of samples, got {type(data).__name__}")
    return data


def _row(index: int, one: Any, new: int | None) -> dict[str, Any]:
    """A sample with its texts checked."""
    if not isinstance(one, Mapping):
        raise TypeError(f"sample {index} of data is no dictionary, but {type(one).__name__}")
    missing = [name for name in ("context", "question", "answer") if one.get(name) is None]
    if missing:
        raise ValueError(f"sample {index} of data has no {', '.join(missing)}; it has {', '.join(map(str, one))}")
    given = one["answer"]
    answers = (
        [given] if isinstance(given, str) else [str(a) for a in given] if isinstance(given, Iterable) else [str(given)]
    )
    if not answers:
        raise ValueError(f"sample {index} of data has an empty list of answers")
    count = new if new is not None else one.get("max_new_tokens")
    if count is None:
        raise ValueError(f"sample {index} of data has no max_new_tokens: give max_new_tokens=")
    # Questions on one context are no independent draws.
    context_key = hashlib.sha256(str(one["context"]).encode()).hexdigest()[:8]
    return {
        "context": str(one["context"]), "question": str(one["question"]), "prefix": str(one.get("answer_prefix") or ""),
        "answers": answers, "max_new_tokens": int(count), "group": f"{one.get('task') or ''}:{context_key}",
    }  # fmt: skip


def _in_template(tokenizer: Any, context: str, question: str) -> tuple[str, str]:
    """A user's message in the chat template, cut where the question begins.

    Raises:
        ValueError: the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True needs a tokenizer with a chat template, and this one has none")
    message = [{"role": "user", "content": context + MARK + question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    head, _, tail = text.partition(MARK)
    return head, tail
