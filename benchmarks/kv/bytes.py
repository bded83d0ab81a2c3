"""Quality of caches over the bytes that they really hold: formats, policies, and policies whose rows are in a format.

    python -m benchmarks.zoo.fetch smollm2 handbook devil
    python -m benchmarks kv/bytes --values kv_bytes.jsonl --out benchmarks/results/kv.csv --overwrite --minutes 40
    python -m benchmarks kv/bytes --values kv_bytes.jsonl --out benchmarks/results/kv.csv --overwrite --short
    python -m benchmarks kv/bytes --values again.jsonl --out benchmarks/results/kv.csv --again
    python -m benchmarks kv/bytes --values /tmp/quick.jsonl --quick

``--short`` is a selection of arms and samples for more than an hour of one core; a longer run goes on from its values.
``--again`` asks whether the product that was named finds more keys at 8:1 than what it is made of, on samples that no
other run has: two arms alone, whose rows are of the scenario ``bytes_again``.
SmolLM2-135M runs in bfloat16, which is what users hold, and a full cache of that type is 1:1. Of every arm
(``benchmarks/kv/holding.py``) the open setting is solved from measured bytes, so that 1/2 to 1/32 of the full cache's
are held after a prompt of 2,048 tokens: all memory behind rows, codes, scales, positions and the policy's state. Some
ratios are out of reach of some formats, and have no row.

======= ============================================================================================
prose   perplexity of the 128 tokens after the prompt
table   perplexity of the values of a table in the prompt, whose rows come once more in another order
several four of eight hidden numbers, each asked for with the right answers to those before it
answer  the first of them, asked for in a chat after the same prompt: whether the answer has it, and its length
======= ============================================================================================

Texts are those of ``benchmarks/kv/texts.py``. What follows a prompt is fed 32 tokens at a time to caches that change
while they are generated, so that later tokens read codes of earlier ones. Samples go in rounds through all arms, the
most telling arms first, and are kept in the file of values; rows are made of the samples that nearly all arms have.
Intervals are over samples, paired with the unpatched model's. A product is also paired with every policy and every
format at the same ratio: ``over_single`` is its perplexity over that of the one it beats least surely.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.kv import feed, tasks, texts
from benchmarks.kv.holding import (
    AGAIN,
    CLAIMED,
    QUICK,
    ROUNDS,
    SHORT,
    WHOLE,
    Family,
    Held,
    Round,
    again,
    arms,
    families,
    is_product,
    short,
)  # fmt: skip
from benchmarks.kv.quality import patched, stepwise
from benchmarks.kv.texts import Sample
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, smollm2
from tokred.bench import results
from tokred.bench.arms import BASE
from tokred.bench.scoring import estimate, paired
from tokred.errors import TokredError

KINDS = ("prose", "table", "several")
FAILURES = (TokredError, ValueError, TypeError, NotImplementedError, RuntimeError)
HEAD = "<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
CHUNK = 32  # tokens that are fed at once to caches that change while tokens come
LONGEST = 20  # tokens of an answer
MOST = 0.9  # share of the arms that have to have a sample


class Value(NamedTuple):
    """One number of one sample.

    Attributes:
        goal: ratio of bytes that was asked for.
        value: mean log-likelihood, negative; or share of right answers.
        weight: scored tokens, or answers.
        held: bytes after the prompt.
        length: tokens generated; 0 where none were.
        solved: what the open setting was; None: nothing was open.
    """

    kind: str
    index: int
    method: str
    setting: str
    goal: int
    value: float
    weight: int
    held: int
    length: int
    solved: float | None

    @property
    def arm(self) -> tuple[str, str, int]:
        """Of whom the number is."""
        return self.method, self.setting, self.goal


# ---------------------------------------------------------------------------------------------- measuring


def _step(arm: Held) -> int:
    """Tokens that are fed at once."""
    method = arm.method
    changes = method is not None and (stepwise(arm) or method.parts.store.name != "flat")  # type: ignore[arg-type]
    return CHUNK if changes else WHOLE


def read_prompts(model: Any, group: Sequence[Sample]) -> feed.Prompt:
    """The prompts of a group, read densely."""
    return feed.read(model, torch.stack([s.prompt for s in group]))[0]


@torch.inference_mode()
def measure(
    model: Any, tokenizer: Any, group: Sequence[Sample], first: int, every: Sequence[Held],
    prompt: feed.Prompt | None = None, answers: bool = False,
) -> Iterator[Value]:  # fmt: skip
    """Values of samples of one kind, of which ``first`` is the index of the first; of arms that fail none.

    ``prompt``: what the group reads, if it was read before. ``answers``: see :class:`Round`.
    """
    prompt, kind = prompt or read_prompts(model, group), group[0].kind
    n, rest = prompt.length, tasks.rest_of(group)
    last = torch.stack([s.prompt[-1:] for s in group])
    question = torch.cat([last, _asked(tokenizer, group)], 1) if answers else last
    for arm in every:
        found = list[tuple[str, float, int, int]]()
        try:
            with patched(model, arm.method):
                cache = prompt.fill(tokred.kv_cache(model), n - 1)
                held, before = round(feed.held_bytes(cache) / len(group)), cache.snapshot()
                logits = tasks.fed(model, torch.cat([last, rest[:, :-1]], 1), cache, _step(arm))
                found += [(kind, *tasks.score_of(kind, x, s), 0) for x, s in zip(logits, group, strict=True)]
                if answers and (arm.method is None or arm.goal in CLAIMED):
                    cache.restore(before)
                    said = _answers(model, tokenizer, tasks.fed(model, question, cache, _step(arm)), cache)
                    keys = [tokenizer.decode(s.follows[slice(*s.answers[0])]).strip() for s in group]
                    found += [("answer", float(k in x), 1, m) for k, (x, m) in zip(keys, said, strict=True)]
        except FAILURES as error:
            # One arm of a hundred must not cost the run; what it lacks is said, and it gets no row.
            print(f"{arm.label} failed at {kind}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        for i, (of, value, weight, length) in enumerate(found):
            index = first + i % len(group)
            yield Value(of, index, arm.name, arm.setting, arm.goal, value, weight, held, length, arm.value)


def _asked(tokenizer: Any, group: Sequence[Sample]) -> Tensor:
    """The first question of each sample, as a user ends with it; ``[B, M]``."""
    texts_of = [tokenizer.decode(s.follows[: s.question]).partition("?")[0].strip() for s in group]
    ids = [tokenizer(f"\n\n{text}?{TAIL}", add_special_tokens=False).input_ids for text in texts_of]
    return torch.tensor(ids)  # questions differ in one token: the name


def samples(maker: texts.Maker, kind: str, start: int, end: int) -> list[Sample]:
    """Samples from and to; hidden numbers in what a user begins a chat with."""
    found = maker.samples(kind, end)[start:]
    if kind != "several":
        return found
    head = maker.ids(HEAD)  # in the place of as much of the prose before the first number
    return [dataclasses.replace(s, prompt=torch.cat([head, s.prompt[len(head) :]])) for s in found]


def _answers(model: Any, tokenizer: Any, logits: Tensor, cache: Any) -> list[tuple[str, int]]:
    """Greedy texts that end by themselves or at :data:`LONGEST` tokens, each with its length, the end counted."""
    end = getattr(tokenizer, "eos_token_id", None)
    said = [logits[:, -1:].argmax(-1)]
    while len(said) < LONGEST and not (end is not None and bool((torch.cat(said, 1) == end).any(1).all())):
        said.append(model(said[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    rows = [row.tolist() for row in torch.cat(said, 1)]
    lengths = [row.index(end) + 1 if end in row else len(row) for row in rows]
    return [(tokenizer.decode(torch.tensor(row[:n])), n) for row, n in zip(rows, lengths, strict=True)]


@torch.inference_mode()
def solve(
    model: Any, prompt: feed.Prompt, names: Sequence[str], goals: Sequence[int], there: Iterable[Value] = (),
    of: Sequence[Family] = (),
) -> list[Held]:  # fmt: skip
    """All arms, the unpatched model first: open settings solved on some prompts, or as they were for values there.

    ``of``: families; default: all.
    """
    known = {v.arm: v.solved for v in there}
    samples = prompt.layers[0].k.shape[0]

    def held(method: Any) -> int:
        with patched(model, method):
            return round(feed.held_bytes(prompt.fill(tokred.kv_cache(model), prompt.length - 1)) / samples)

    def told(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    dense, found = held(None), [Held(BASE, "", 0, None)]
    for family in of or families():
        if names and family.name not in names:
            continue
        try:
            found += arms(
                family._replace(ratios=tuple(r for r in family.ratios if r in goals)), dense, held, told, known
            )
        except FAILURES as error:
            told(f"{family.name} {family.setting} takes no part: {type(error).__name__}: {error}")
    return ranked(found)


def ranked(every: Sequence[Held]) -> list[Held]:
    """Arms in the order of :data:`benchmarks.kv.holding.RATIOS`, 8:1 and 16:1 of all families first, then the rest."""
    turn = {0: 2, 8: 0, 16: 0, 4: 1, 32: 1, 2: 2}
    return sorted(every, key=lambda a: -1 if a.name == BASE else turn[a.goal])


# ---------------------------------------------------------------------------------------------- rows


def records(values: Iterable[Value], where: dict[str, Any], length: int = WHOLE) -> list[dict[str, Any]]:
    """Records of all arms, over the samples of each kind that nearly all arms have."""
    table: dict[tuple[str, int], dict[tuple[str, str, int], dict[int, Value]]] = {}
    full: dict[str, dict[int, Value]] = {}
    for v in values:
        if v.method == BASE:
            full.setdefault(v.kind, {})[v.index] = v
        else:
            table.setdefault((v.kind, v.goal), {}).setdefault(v.arm, {})[v.index] = v
    found = []
    for kind, base in full.items():
        mine = [base[i] for i in sorted(base)]
        row = {"method": BASE, "setting": "", "data": kind, "length": length, **where}
        found.append(row | _numbers(kind, mine, mine))
    for (kind, goal), by in table.items():
        base = full.get(kind, {})
        # Samples are counted from the first that there is: those of a run of its own begin behind all others.
        some = sorted(base)[: common([len(mine) for mine in by.values()])]
        every = {arm: [mine[i] for i in some] for arm, mine in by.items() if {*some} <= mine.keys()}
        if not some:
            continue
        for (method, setting, _), mine in every.items():
            row = {"method": method, "setting": setting, "data": kind, "length": length, **where}
            row |= {"goal": goal} if goal else {}
            row |= _numbers(kind, mine, [base[i] for i in some])
            singles = [x for a, x in every.items() if not is_product(a[1])]
            if goal and is_product(setting) and singles:
                row |= beside(kind, mine, singles)
            found.append(row)
    return found


def common(counts: Sequence[int]) -> int:
    """The most samples that a share :data:`MOST` of the arms have."""
    return max((n for n in {*counts} if sum(c >= n for c in counts) >= MOST * len(counts)), default=0)


def _numbers(kind: str, mine: Sequence[Value], base: Sequence[Value]) -> dict[str, Any]:
    """Quality with its interval, bytes, what the open setting was, and the length of answers."""
    held, full = (sum(v.held for v in some) / len(some) for some in (mine, base))
    row: dict[str, Any] = {"bytes": round(held), "prompts": len(mine), "bytes_share": held / full}
    if mine[0].solved is not None:
        row |= {"solved": sum(v.solved or 0.0 for v in mine) / len(mine)}
    if kind == "answer":
        right = round(sum(v.value for v in mine))
        row |= {**results.share("contains", right, len(mine)), "contains_count": len(mine)}
        lengths = estimate([float(v.length) for v in mine], [1.0] * len(mine))
        return row | tasks.named_ends("generated", lengths) | {"generated_count": len(mine)}
    return row | tasks.numbers(kind, mine, base)  # type: ignore[arg-type]


def beside(kind: str, mine: Sequence[Value], singles: Sequence[Sequence[Value]]) -> dict[str, Any]:
    """How a product does against each single method, paired: the one that it beats least surely."""
    weights = [float(v.weight) for v in mine]
    values = [v.value for v in mine]
    every = [paired(values, [v.value for v in single], weights) for single in singles]
    if any(x is None for found in every for x in found):
        return {}
    if kind in texts.WINDOWS:
        hardest = max(every, key=lambda found: found[2] or 0.0)
        name, ends = "over_single", [math.exp(x) for x in hardest if x is not None]
    else:
        hardest = min(every, key=lambda found: found[1] or 0.0)
        name, ends = "keys_over_single", [x for x in hardest if x is not None]
    return {**tasks.named_ends(name, ends), f"{name}_count": len(mine)}


# ---------------------------------------------------------------------------------------------- running


def read(path: Path) -> tuple[list[Value], dict[str, Any]]:
    """Values of a file, and where the last of them were measured; nothing where there is no file."""
    found, where = tasks.lines(path)
    return [Value(*one) for one in found], where


def run(
    model: Any, tokenizer: Any, maker: texts.Maker, every: Sequence[Held], rounds: Sequence[Round],
    there: Iterable[Value], minutes: float, prompt: feed.Prompt | None = None,
) -> Iterator[list[Value]]:  # fmt: skip
    """Values that are not there yet, and nothing after each round; a round that would not end in time is not begun.

    An arm that failed once is left out of all that follows. ``prompt``: what the first round reads, if it was read.
    """
    known, began = {v[:5] for v in there}, time.monotonic()
    alive, last = list(every), 0.0
    for turn in rounds:
        kind, start, end, goals, answers = turn
        wanted = [a for a in alive if a.name == BASE or a.goal in goals]
        wanted = [a for a in wanted if any((kind, i, *a[:3]) not in known for i in range(start, end))]
        if not wanted:
            continue
        spent = time.monotonic() - began
        if spent + last > 60 * minutes:
            print(f"{spent:.0f} s: {kind} {start} to {end} would not end in time", file=sys.stderr, flush=True)
            return
        group, found = samples(maker, kind, start, end), []
        read = prompt if turn == rounds[0] else None
        for value in measure(model, tokenizer, group, start, wanted, read, answers):
            found.append(value)
            known.add(value[:5])
            yield [value]
        failed = {a.label for a in wanted} - {Held(*v.arm, None).label for v in found}
        alive = [a for a in alive if a.label not in failed]
        last = time.monotonic() - began - spent
        print(f"{time.monotonic() - began:6.0f} s  {kind} {start} to {end}: {last:.0f} s", file=sys.stderr, flush=True)
        prompt = read = None  # of hundreds of megabytes
        yield []


def main() -> None:
    """Measure what is missing, and write rows of all that is there after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=Path, required=True, help="file of the numbers of each sample")
    parser.add_argument("--only", choices=KINDS, help="samples of this kind")
    parser.add_argument("--methods", help="names, with commas; default: all")
    parser.add_argument("--ratios", default="8,16,4,32,2,0", help="with commas; 0: what holds what it holds")
    parser.add_argument("--minutes", type=float, default=40, help="no round is begun that would not end in time")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--quick", action="store_true", help="one short sample of two kinds, at 8:1")
    parser.add_argument("--short", action="store_true", help="a selection of arms and samples")
    parser.add_argument("--again", action="store_true", help="the named product beside its policy, on new samples")
    parser.add_argument("--rows", action="store_true", help="measure nothing: write rows of the values that are there")
    parser.add_argument("--list", action="store_true", help="solve the settings, print the arms, and measure nothing")
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    there, where = read(given.values)
    length = 512 if given.quick else WHOLE
    scenario = "bytes_again" if given.again else "bytes"
    if given.rows:
        save(records(there, where, length), scenario, given)
        return
    source = results.here("cpu", "bfloat16")
    source["versions"] += f" {carriers.cited('smollm2', 'handbook', 'devil')}"
    where = {"model": "smollm2-135m", **source}
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    maker, began = texts.Maker(tokenizer, seed=given.seed, prompt=length), time.monotonic()
    names = given.methods.split(",") if given.methods else []
    goals = [8] if given.quick else [int(r) for r in given.ratios.split(",")]
    whole = AGAIN if given.again else SHORT if given.short else ROUNDS
    rounds = [r for r in (QUICK if given.quick else whole) if given.only in (None, r.kind)]
    first = rounds[0]
    prompt = read_prompts(model, samples(maker, *first[:3]))
    of = again() if given.again else short() if given.short else ()
    every = solve(model, prompt, names, goals, there, of)
    took = time.monotonic() - began
    print(f"{took:6.0f} s  {len(every)} arms", file=sys.stderr, flush=True)
    if given.list:
        print(*(f"{a.label} {'' if a.value is None else f'{a.value:.4g}'}" for a in every), sep="\n")
        return
    tasks.write(given.values, where)
    for values in run(model, tokenizer, maker, every, rounds, there, given.minutes - took / 60, prompt):
        for value in values:
            there.append(value)
            tasks.write(given.values, value)
        if not values:
            save(records(there, where, length), scenario, given)
            given.overwrite = True  # rows of this run, which more samples make better


if __name__ == "__main__":
    main()
