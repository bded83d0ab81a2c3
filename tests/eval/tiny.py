"""A tokenizer of whole words, a tiny Llama that reads them, and a task of lm-eval's that needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tokred.adapters.tiny.kv import build

WORDS = [f"w{i}" for i in range(80)]


def tokenizer() -> Any:
    """``<pad>``, ``<s>``, ``</s>``, ``<unk>`` and eighty words, with spaces between."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model() -> Any:
    """A Llama of three layers whose answers depend on what its cache holds."""
    return build("llama")


def prompts(count: int = 6) -> list[str]:
    """Texts of twelve to forty words, of different lengths."""
    return [" ".join(WORDS[(7 * i + 3 * j * j + j) % 80] for j in range(12 + 5 * (i % 6))) for i in range(count)]


def task(folder: Path, count: int = 6, answers: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A task that lets the model go on for some words; ``answers`` are the right ones."""
    file = folder / "texts.jsonl"
    right = answers or [f"w{i}" for i in range(count)]
    rows = [{"text": text, "answer": answer} for text, answer in zip(prompts(count), right, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }
