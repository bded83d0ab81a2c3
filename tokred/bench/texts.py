"""Scores of a text beside the right ones: ``(value, weight)`` of one sample."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

ARTICLES = ("a", "an", "the")


def words(text: str) -> str:
    """The text in small letters without punctuation, one space between words."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    # Apostrophes within words are no punctuation: "don't" is one word.
    kept = [c if unicodedata.category(c)[0] != "P" or _within(plain, i) else " " for i, c in enumerate(plain)]
    return " ".join("".join(kept).split())


def _within(text: str, i: int) -> bool:
    return text[i] == "'" and 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()


def normal(text: str) -> str:
    """The text of :func:`words` without articles; an answer that is nothing but an article (a choice "A") stays."""
    plain = words(text)
    return " ".join(w for w in plain.split() if w not in ARTICLES) or plain


def exact(said: str, right: Sequence[str]) -> tuple[float, float]:
    """1 where the text equals one of the right ones after :func:`normal`."""
    return float(normal(said) in {normal(one) for one in right}), 1.0


def contains(said: str, right: Sequence[str]) -> tuple[float, float]:
    """1 where one of the right texts occurs in it, whatever the case."""
    return float(any(_occurs(one, said) for one in right)), 1.0


def contains_all(said: str, right: Sequence[str]) -> tuple[float, float]:
    """The share of the right texts that occur in it, whatever the case."""
    return sum(_occurs(one, said) for one in right) / len(right), 1.0


def _occurs(one: str, said: str) -> bool:
    return one.strip().casefold() in said.casefold()


def overlap(said: str, right: Sequence[str]) -> tuple[float, float]:
    """F1 of the longest common subsequence of words (ROUGE-L) with the nearest of the right texts."""
    from torchmetrics.functional.text import rouge_score

    # Its own normalisation knows the letters a to z alone.
    found = rouge_score(said, [list(right)], accumulate="best", rouge_keys="rougeL", normalizer=words, tokenizer=_split)
    return float(found["rougeL_fmeasure"]), 1.0


def _split(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def word_errors(said: str, right: Sequence[str]) -> tuple[float, float]:
    """Wrong words, beside the nearest right text, a word of the first one; and how many words that has.

    A reference without words counts as one word, so that what is said in its place is wrong.
    """
    from torchmetrics.functional.text import word_error_rate

    errors = []
    for one in map(words, right):
        count = len(one.split())
        errors.append(
            round(float(word_error_rate([words(said)], [one])) * count) if count else len(words(said).split())
        )
    # Weighed by the first reference, whichever was nearest: the weights of two methods have to be the same.
    count = max(1, len(words(right[0]).split()))
    return min(errors) / count, float(count)
