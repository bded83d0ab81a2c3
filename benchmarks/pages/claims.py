"""Claims in prose: paragraphs of the documentation, written by hand, in which a word of rank stands beside a figure.

Who is better than whom is said by the marked parts of a page, which are made from the tables with their intervals. A
sentence that was typed stays as it is when the table changes, and knows of no interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

WORDS = re.compile(
    r"\b(best|better|worst|worse|lowest|highest|fastest|faster|slowest|slower|nearest|nearer|farthest|farther|cheapest|cheaper|"
    r"strongest|weakest|beats?|beaten|wins?|won|winners?|outperforms?|outperformed|superior|leads?|ahead of)\b",
    re.IGNORECASE,
)
# A number that was measured: with a decimal point, or with a unit behind it.
FIGURE = re.compile(r"\d+\.\d+|\d+ ?%|\d+ (times|points?|dB|ms|milliseconds|seconds|MiB|MB|GB|keys)\b|\d+x\b")
FENCE = re.compile(r"^[ ]*```.*?^[ ]*```", re.MULTILINE | re.DOTALL)
MADE = re.compile(r"<!-- results: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
# Numbers that name something: a paper, a version, a setting.
NAMES = re.compile(
    r"arXiv[: ]\d{4}\.\d+|`[^`]*`|\]\([^)]*\)|\b(torch|transformers|timm|diffusers|Python|Stable Diffusion|SD|"
    r"Qwen|LLaVA|Llama|Mistral|version|and) ?-?v?\d+(\.\d+)*|\(?>=[^,)]*"
)


class Claim(NamedTuple):
    """A paragraph with a word of rank and a figure.

    Attributes:
        line: where it begins, from 1.
        words: of rank, in it.
        text: the paragraph, in one line.
    """

    line: int
    words: tuple[str, ...]
    text: str


def paragraphs(page: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, items of lists and rows of tables that were written by hand, each with the line it begins at."""
    blank = FENCE.sub(lambda m: "\n" * m[0].count("\n"), MADE.sub(lambda m: "\n" * m[0].count("\n"), page))
    start, held = 1, list[str]()
    for number, line in enumerate([*blank.splitlines(), ""], 1):
        begins = re.match(r"\s*([-*|]|\d+\.|#+) ?", line)
        if held and (begins or not line.strip()):
            yield start, " ".join(held)
            held = []
        if line.strip():
            start = start if held else number
            held.append(line.strip())


def claims(page: str) -> list[Claim]:
    """All paragraphs of a page in which a word of rank stands beside a figure."""
    found = []
    for line, text in paragraphs(page):
        words = tuple(dict.fromkeys(m[0].lower() for m in WORDS.finditer(re.sub(r"`[^`]*`", "", text))))
        if words and FIGURE.search(NAMES.sub("", text)):
            found.append(Claim(line, words, text))
    return found
