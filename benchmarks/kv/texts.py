"""Texts that tell cache policies apart: windows, keys and documents of several kinds, as prompts and what follows them.

Every prompt has :data:`PROMPT` tokens, or as many as a maker is told. What follows is fed when the prompt was
compressed, and of it the marked tokens are scored. All is drawn from a seed; prose and code are read from packages that
are on the machine, the rest is made.

======== ========================================================================================
windows  what is scored
======== ========================================================================================
prose    the text after the prompt: the Debian handbook, a dictionary of 1911
code     the same of modules of Python's standard library
table    values of rows that are asked for again, of a table of numbers with a header
copy     a passage that stands in the prompt, far back, and comes once more
======== ========================================================================================

======== ========================================================================================
keys     what is asked
======== ========================================================================================
number   a number of five digits, hidden in prose
word     two words, hidden in prose
several  four of eight numbers, hidden in prose
lines    six values of a prompt that is all lines of a name and a number
chain    four values of variables that were set to other variables, hidden in prose
======== ========================================================================================
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo import data

PROMPT = 960
FOLLOWS = 320  # a third of the prompt: tokred.benchmark takes three quarters of a text as its prompt
SCORED = 128  # of them, in windows
MODULES = ("argparse", "ast", "calendar", "configparser", "difflib", "imaplib", "inspect", "tarfile")
# Each is a single token behind a blank, so that questions are of one length.
NAMES = (
    "red", "blue", "green", "amber", "silver", "golden", "river", "mountain", "forest", "tiger", "eagle", "falcon",
    "dragon", "winter", "summer", "London", "Paris", "Berlin", "copper", "iron", "stone", "paper", "glass", "ocean",
    "desert", "island", "bridge", "castle", "garden", "piano", "violin", "orange", "lemon", "cherry", "maple",
    "cedar", "rose", "lily", "horse", "wolf", "bear", "lion", "fox", "whale", "shark", "moon", "sun", "star", "cloud",
    "storm", "rain", "snow", "fire", "ice",
)  # fmt: skip
WINDOWS = ("prose", "code", "table", "copy")
KEYS = ("number", "word", "several", "lines", "chain")
SUMMARY = "\n\nIn short, the text above says that"


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows it.

    Attributes:
        kind: of :data:`WINDOWS` or :data:`KEYS`, or ``"summary"``.
        prompt: ``(N,)`` token ids, :data:`PROMPT` if nothing else was asked for.
        follows: ``(M,)`` token ids.
        answers: the parts of ``follows`` that are scored, each from and to an index; of windows one for each stretch.
        question: tokens at the head of ``follows`` that are the first question of keys, or a summary's; else 0.
    """

    kind: str
    prompt: Tensor
    follows: Tensor
    answers: tuple[tuple[int, int], ...]
    question: int = 0

    @property
    def scored(self) -> Tensor:
        """``(M,)`` mask of the tokens of ``follows`` that are scored."""
        mask = torch.zeros(len(self.follows), dtype=torch.bool)
        for start, end in self.answers:
            mask[start:end] = True
        return mask

    def batch(self) -> dict[str, Tensor]:
        """The sample for :func:`tokred.benchmark`: ``input_ids`` ``(1, 4 * PROMPT / 3)``, and ``scored``, of the last
        quarter, ``(1, FOLLOWS)``: 0 where nothing is scored, else the number of the answer that the token belongs to.
        """
        number = torch.zeros(FOLLOWS, dtype=torch.long)
        for i, (start, end) in enumerate(self.answers):
            number[start:end] = i + 1
        # What follows the last answer is not scored, whatever it is.
        rest = torch.cat([self.follows, self.follows.new_full((FOLLOWS - len(self.follows),), int(self.follows[-1]))])
        return {"input_ids": torch.cat([self.prompt, rest])[None], "scored": number[None]}


def losses(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """A metric for :func:`tokred.benchmark`: ``(B,)`` mean negative log-likelihood of the scored tokens; lower is
    better."""
    logits = (output if isinstance(output, Tensor) else output.logits).float()
    target = batch["input_ids"][:, -logits.shape[1] :]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    scored = batch["scored"] > 0
    return (nll * scored).sum(1) / scored.sum(1)


def found(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """A metric for :func:`tokred.benchmark`: ``(B,)`` shares of answers whose every token is the likeliest."""
    logits = output if isinstance(output, Tensor) else output.logits
    target = batch["input_ids"][:, -logits.shape[1] :]
    right, number = logits.argmax(-1) == target, batch["scored"]
    shares = []
    for row, of in zip(right, number, strict=True):
        each = [bool(row[of == i].all()) for i in range(1, int(of.max()) + 1)]
        shares.append(sum(each) / len(each))
    return torch.tensor(shares)


def overlap(text: str, reference: str) -> float:
    """ROUGE-L of two texts: the harmonic mean of the shares of words in their longest common subsequence."""
    a, b = text.split(), reference.split()
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


class Maker:
    """Samples of every kind.

    Args:
        tokenizer: of the model, which adds no tokens of its own.
        prose: long texts to cut windows and haystacks from; None: the Debian handbook and the dictionary.
        code: the same of code; None: :data:`MODULES` of the running Python.
        seed: of everything that is drawn.
        prompt: tokens of every prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        prose: Sequence[str] | None = None,
        code: Sequence[str] | None = None,
        seed: int = 0,
        prompt: int = PROMPT,
    ) -> None:
        self.tokenizer, self.seed, self.prompt = tokenizer, seed, prompt
        self.prose = [data.handbook(), data.devils_dictionary()] if prose is None else list(prose)
        self.code = [standard_library(name) for name in MODULES] if code is None else list(code)

    def samples(self, kind: str, count: int) -> list[Sample]:
        """``count`` samples of a kind; fewer of them are the first of more.

        Raises:
            KeyError: there is no such kind.
        """
        make = MAKERS[kind]
        return [make(self, i, random.Random(f"{kind} {i} {self.seed}")) for i in range(count)]

    def ids(self, text: str) -> Tensor:
        """Token ids of a text."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)

    def stretch(self, texts: Sequence[str], index: int, rng: random.Random, tokens: int) -> Tensor:
        """``tokens`` ids from somewhere in text ``index``, round and round, beginning after a blank."""
        text = texts[index % len(texts)]
        room = 8 * tokens  # characters: more than any text needs for so many tokens, which are counted below
        start = rng.randrange(max(1, len(text) - room))
        start = max(0, text.find(" ", start)) if start else 0
        found = self.ids(text[start : start + room])
        if len(found) < tokens:
            raise ValueError(f"a text has {len(found)} tokens in {room} characters, and {tokens} were wanted")
        return found[:tokens]

    def window(self, texts: Sequence[str], kind: str, index: int, rng: random.Random) -> Sample:
        """A stretch of text, of which the end is scored."""
        ids = self.stretch(texts, index, rng, self.prompt + SCORED)
        return Sample(kind, ids[: self.prompt], ids[self.prompt :], ((0, SCORED),))

    def copy(self, index: int, rng: random.Random) -> Sample:
        """A passage in the first half of the prompt, which comes once more; its first words say which it is."""
        texts = (self.prose, self.code)[index % 2]
        ids = self.stretch(texts, index // 2, rng, self.prompt)
        start, mark = rng.randrange(self.prompt // 8, self.prompt // 2), 24
        passage = ids[start : start + mark + SCORED]
        return Sample("copy", ids, passage, ((mark, len(passage)),))

    def filled(self, made: Sequence[Tensor], rng: random.Random) -> Tensor:
        """A prompt of prose with pieces hidden in it, in their order, at even distances with some play."""
        straw = self.stretch(self.prose[:1], 0, rng, self.prompt - sum(map(len, made)))
        step = len(straw) / (len(made) + 1)
        cuts = [round(step * (i + 1) + rng.uniform(-0.45, 0.45) * step) for i in range(len(made))]
        parts, last = list[Tensor](), 0
        for cut, piece in zip(cuts, made, strict=True):
            parts += [straw[last:cut], piece]
            last = cut
        return torch.cat([*parts, straw[last:]])

    def asked(self, kind: str, prompt: Tensor, pairs: Sequence[tuple[str, str]], between: str = "") -> Sample:
        """A sample that asks for one thing after another, each time with the right answer before the next question."""
        parts, answers, at, first = list[Tensor](), list[tuple[int, int]](), 0, 0
        for i, (question, answer) in enumerate(pairs):
            parts += [self.ids(question), self.ids(answer)]
            start = at + len(parts[-2])
            first = first or start
            at = start + len(parts[-1])
            answers.append((start, at))
            if between and i + 1 < len(pairs):
                parts.append(self.ids(between))
                at += len(parts[-1])
        return Sample(kind, prompt, torch.cat(parts), tuple(answers), first if kind in KEYS else 0)

    def hidden(self, kind: str, index: int, rng: random.Random, count: int, asked: int, words: bool = False) -> Sample:
        """Numbers or words hidden in prose, of which some are asked for."""
        names = rng.sample(NAMES, 3 * count)
        things = {n: _number(rng) for n in names[:count]}
        if words:
            things = {n: f"{names[count + 2 * i]} {names[count + 2 * i + 1]}" for i, n in enumerate(things)}
        what = "secret words" if words else "magic number"
        verb = "are" if words else "is"
        made = [self.ids(f" The {what} of the {n} {verb} {x}. Remember: {x}.") for n, x in things.items()]
        order = rng.sample(list(things), asked)
        pairs = [(f" What {verb} the {what} of the {n}? The {what} of the {n} {verb}", f" {things[n]}") for n in order]
        return self.asked(kind, self.filled(made, rng), pairs, ".\n")

    def lines(self, index: int, rng: random.Random) -> Sample:
        """A prompt that is all lines of a name and a number."""
        every = [f"{a} {b}" for a in NAMES for b in NAMES if a != b]
        things, parts, left = dict[str, str](), list[Tensor](), self.prompt
        for name in rng.sample(every, self.prompt // 8):
            number = _number(rng)
            line = self.ids(f"The number of {name} is {number}\n")
            if len(line) > left:
                break
            parts.append(line)
            things[name] = number
            left -= len(line)
        head = self.stretch(self.prose[:1], 0, rng, left - 2) if left > 2 else torch.zeros(0, dtype=torch.long)
        prompt = torch.cat([head, self.ids("\n").expand(left - len(head)), *parts])
        return self.asked("lines", prompt, [(f"\nThe number of {n} is", f" {things[n]}") for n in
                                            rng.sample(list(things), 6)])  # fmt: skip

    def table(self, index: int, rng: random.Random) -> Sample:
        """A table with a header, and rows of it that come once more in another order; their values are scored."""
        columns = rng.sample(("price", "weight", "stock", "height", "year", "rating"), 3)
        rows = {n: [str(rng.randrange(10, 1000)) for _ in columns] for n in rng.sample(NAMES, 44)}
        parts = [self.ids(f"name,{','.join(columns)}\n")]
        kept = list[str]()
        for name, values in rows.items():
            line = self.ids(f"{name},{','.join(values)}\n")
            if sum(map(len, parts)) + len(line) > self.prompt:
                break
            parts.append(line)
            kept.append(name)
        left = self.prompt - sum(map(len, parts))
        filler = [self.stretch(self.prose[:1], 0, rng, left)] if left else []
        pairs = [(f"{n},", ",".join(rows[n])) for n in rng.sample(kept, 10)]
        return self.asked("table", torch.cat([*filler, *parts]), pairs, "\n")

    def chain(self, index: int, rng: random.Random) -> Sample:
        """Four variables that get their number by two steps, hidden in prose; the last of each is asked for."""
        names = rng.sample(NAMES, 12)
        made, pairs = list[Tensor](), list[tuple[str, str]]()
        for i in range(4):
            a, b, c = names[3 * i : 3 * i + 3]
            number = _number(rng)
            steps = (f"\nVAR {a} = {number}\n", f"\nVAR {b} = VAR {a}\n", f"\nVAR {c} = VAR {b}\n")
            made += [self.ids(step) for step in steps]
            pairs.append((f"\nThe value of VAR {c} is", f" {number}"))
        rng.shuffle(pairs)
        return self.asked("chain", self.filled(made, rng), pairs)

    def summary(self, index: int, rng: random.Random) -> Sample:
        """A document, and the beginning of its summary, which the model goes on with."""
        question = self.ids(SUMMARY)
        ids = self.stretch(self.prose, index, rng, self.prompt)
        return Sample("summary", ids, question, (), len(question))


MAKERS: dict[str, Callable[[Maker, int, random.Random], Sample]] = {
    # Three windows of the first text to one of the others.
    "prose": lambda m, i, rng: m.window(m.prose[:1] if i % 4 < 3 else m.prose[1:] or m.prose, "prose", i // 4, rng),
    "code": lambda m, i, rng: m.window(m.code, "code", i, rng),
    "table": Maker.table,
    "copy": Maker.copy,
    "number": lambda m, i, rng: m.hidden("number", i, rng, 1, 1),
    "word": lambda m, i, rng: m.hidden("word", i, rng, 1, 1, words=True),
    "several": lambda m, i, rng: m.hidden("several", i, rng, 8, 4),
    "lines": Maker.lines,
    "chain": Maker.chain,
    "summary": Maker.summary,
}


def standard_library(module: str) -> str:
    """The source of a module of the running Python."""
    return (Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text("utf8")


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))
