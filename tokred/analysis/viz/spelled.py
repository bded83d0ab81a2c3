"""Tokens as pieces of text that put together give the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # stands for bytes that are no whole character
LONGEST = 4  # tokens of one character
BLANK = "\u2581"  # how SentencePiece writes a space


def pieces_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """A piece of text for each token; of a character that is spread over several tokens, all of it for the first.

    Args:
        ids: of the tokens.
        tokenizer: of transformers; None: pieces are the numbers, with a space.
    """
    if tokenizer is None:
        return [f"{i} " for i in ids]
    found: list[str] = []
    start = 0
    while start < len(ids):
        # As many tokens as make whole characters; one alone where none do.
        for count in range(1, min(LONGEST, len(ids) - start) + 1):
            text = _decoded(ids[start : start + count], tokenizer)
            if BROKEN not in text:
                break
        else:
            count, text = 1, _decoded(ids[start : start + 1], tokenizer)
        found += [text, *[""] * (count - 1)]
        start += count
    return found


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    text = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    first = str(tokenizer.convert_ids_to_tokens([ids[0]])[0])
    # Decoders take the space off that a text of its own would not begin with.
    return f" {text}" if first.startswith(BLANK) and not text.startswith(" ") else text
