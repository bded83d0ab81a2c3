"""Cache policies on windows, keys and summaries of several kinds, with intervals, and which tasks tell them apart.

    python -m benchmarks.zoo.fetch smollm2 handbook devil
    python -m benchmarks kv/tasks --values kv_tasks.jsonl --out benchmarks/results/kv.csv --overwrite

``benchmarks/kv/texts.py`` describes the texts. Each prompt is read once for all policies. What was measured of a sample
goes into the file of values at once, and is not measured again; rows are made of all values that are there, so that a
run can be broken off and gone on with. Intervals are over samples (windows, contexts, documents), not over tokens.

``apart`` of a row is how many standard errors a policy is better than random eviction at the same budget, paired over
samples, to which one without a difference is added: so that a few samples that all agree are no certainty. A task is
kept where some policy is at least :data:`KEPT` of them better at some budget.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from benchmarks.engine import threads
from benchmarks.kv import feed, texts
from benchmarks.kv.quality import POLICIES, arms, patched, stepwise
from benchmarks.kv.texts import KEYS, PROMPT, WINDOWS, Sample
from benchmarks.saving import known, save, saving
from benchmarks.zoo import carriers, smollm2
from tokred.bench import results
from tokred.bench.arms import BASE, Arm
from tokred.bench.scoring import estimate, paired

Named = TypeVar("Named", bound=Arm)
COUNTS = {
    **dict.fromkeys(WINDOWS, 10),
    "several": 10,
    "lines": 10,
    "number": 20,
    "chain": 10,
    "word": 20,
    "summary": 10,
}
ROUND = 5  # samples of every kind before the next ones: a run that is broken off has measured all kinds
RANDOM = "random_evict"
KEPT = 4.0
CHUNK = 8  # tokens that are fed at once to policies that evict at every step
WORDS = 40  # tokens of a summary
LOWER = WINDOWS  # kinds of which less is better


class Value(NamedTuple):
    """One number of one sample: mean log-likelihood, negative; share of answers; or overlap with the full cache's text.

    Attributes:
        weight: scored tokens, or answers.
        held: bytes of the cache after the prompt.
    """

    kind: str
    index: int
    method: str
    setting: str
    asked: str
    value: float
    weight: int
    held: int


# ---------------------------------------------------------------------------------------------- measuring


def rest_of(group: Sequence[Sample]) -> Tensor:
    """``(B, M)`` what follows the prompts, as long as the longest of it."""
    longest = max(len(s.follows) for s in group)
    # What follows the last answer is not scored, whatever it is.
    return torch.stack([torch.cat([s.follows, s.follows[-1:].expand(longest - len(s.follows))]) for s in group])


def fed(model: Any, ids: Tensor, cache: Any, step: int) -> Tensor:
    """Logits ``(B, M, V)`` of ids that are fed in parts."""
    parts = [model(part, past_key_values=cache).logits for part in ids.split(step, 1)]
    return torch.cat(parts, 1)


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, group: Sequence[Sample], first: int, every: Sequence[Arm]) -> Iterator[Value]:
    """Values of samples of one kind, of which ``first`` is the index of the first."""
    kind, n, ask = group[0].kind, PROMPT, group[0].question
    rest = rest_of(group)
    whole = torch.cat([torch.stack([s.prompt for s in group]), rest], 1)
    prompt, last = feed.read(model, whole[:, : n + ask])
    reference = list[str]()
    for arm in every:
        step = CHUNK if stepwise(arm) else rest.shape[1] + 1
        with patched(model, arm.method):
            cache = prompt.fill(tokred.kv_cache(model), n - 1)
            held = round(feed.held_bytes(cache) / len(group))
            if kind == "summary":
                said = _continued(model, tokenizer, whole[:, n - 1 :], cache, step)
                reference = reference or said
                values = [(texts.overlap(a, b), 1) for a, b in zip(said, reference, strict=True)]
            else:
                logits = fed(model, whole[:, n - 1 : -1], cache, step)
                values = [score_of(kind, x, s) for x, s in zip(logits, group, strict=True)]
        for i, (value, weight) in enumerate(values):
            yield Value(kind, first + i, arm.name, arm.setting, "after" if ask else "", value, weight, held)
        if kind not in KEYS:
            continue
        with patched(model, arm.method):
            cache = prompt.fill(tokred.kv_cache(model), n - 1, rest=ask + 1)
            held = round(feed.held_bytes(cache) / len(group))
            for i, right in enumerate(_first(model, whole, group, last, cache)):
                yield Value(kind, first + i, arm.name, arm.setting, "before", float(right), 1, held)


def score_of(kind: str, logits: Tensor, sample: Sample) -> tuple[float, int]:
    """The value of a sample and its weight, by the logits of all that follows the prompt."""
    logits = logits[: len(sample.follows)]
    if kind in WINDOWS:
        scored = sample.scored
        return float(F.cross_entropy(logits[scored].float(), sample.follows[scored])), int(scored.sum())
    right = logits.argmax(-1) == sample.follows
    return sum(bool(right[a:b].all()) for a, b in sample.answers) / len(sample.answers), len(sample.answers)


def _first(model: Any, whole: Tensor, group: Sequence[Sample], last: Tensor, cache: Any) -> list[bool]:
    """Whether the first answer is right, its question having been the end of the prompt."""
    start, end = group[0].answers[0]
    goal = whole[:, PROMPT + start : PROMPT + end]
    likeliest = last[:, -1:].argmax(-1)
    if end - start > 1:
        likeliest = torch.cat([likeliest, model(goal[:, :-1], past_key_values=cache).logits.argmax(-1)], 1)
    return [bool(row) for row in (likeliest == goal).all(1)]


def _continued(model: Any, tokenizer: Any, ids: Tensor, cache: Any, step: int) -> list[str]:
    """Greedy texts."""
    token = fed(model, ids, cache, step)[:, -1:].argmax(-1)
    said = [token]
    for _ in range(WORDS - 1):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        said.append(token)
    return [tokenizer.decode(row) for row in torch.cat(said, 1)]


def run(
    model: Any,
    tokenizer: Any,
    maker: texts.Maker,
    every: Sequence[Arm],
    counts: dict[str, int],
    there: Iterable[Value] = (),
) -> Iterator[Value]:
    """Values that are not there yet, :data:`ROUND` samples of each kind at a time."""
    for first, group, wanted in missing(maker, every, counts, there, ROUND):
        if group[0].kind == "summary" and wanted[0].method is not None:
            wanted.insert(0, Arm(BASE, ""))  # the reference is not kept
        yield from measure(model, tokenizer, group, first, wanted)


def missing(
    maker: texts.Maker, every: Sequence[Named], counts: dict[str, int], there: Iterable[Value], size: int
) -> Iterator[tuple[int, list[Sample], list[Named]]]:
    """Of every kind ``size`` samples at a time: the first one's index, the samples, and arms that lack values of them.

    Groups that no arm lacks are left out.
    """
    known = {v[:4] for v in there}
    for first in range(0, max(counts.values()), size):
        for kind, count in counts.items():
            group = maker.samples(kind, min(first + size, count))[first:]
            of = range(first, first + len(group))
            wanted = [a for a in every if any((kind, i, a.name, a.setting) not in known for i in of)]
            if wanted:
                yield first, group, wanted


# ---------------------------------------------------------------------------------------------- rows


def records(values: Iterable[Value], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of all arms that have as many samples as the unpatched model, with intervals over samples."""
    found = []
    for (kind, asked), arms_of in tabled(values).items():
        base = arms_of.get((BASE, ""), {})
        for (method, setting), mine in arms_of.items():
            if mine.keys() != base.keys():
                continue
            row = {"method": method, "setting": setting, "data": kind, "asked": asked, "length": PROMPT, **where}
            row |= numbers(kind, [mine[i] for i in base], list(base.values()))
            rival = arms_of.get((RANDOM, setting), {})
            if method not in (BASE, RANDOM) and rival.keys() == base.keys():
                row["apart"] = apart([mine[i] for i in base], [rival[i] for i in base], kind in LOWER)
                row["apart_count"] = len(base)
            found.append(row)
    return found


def tabled(values: Iterable[Value]) -> dict[tuple[str, str], dict[tuple[str, str], dict[int, Value]]]:
    """Values by kind and ``asked``, by method and setting, and by sample."""
    table: dict[tuple[str, str], dict[tuple[str, str], dict[int, Value]]] = {}
    for v in values:
        table.setdefault((v.kind, v.asked), {}).setdefault((v.method, v.setting), {})[v.index] = v
    return table


def numbers(kind: str, mine: Sequence[Value], base: Sequence[Value]) -> dict[str, Any]:
    """The quality of an arm, its interval, and bytes."""
    values, weights = [v.value for v in mine], [float(v.weight) for v in mine]
    name = "perplexity" if kind in WINDOWS else "overlap" if kind == "summary" else "retrieval"
    quality = estimate(values, weights)
    row: dict[str, Any] = {"bytes": round(sum(v.held for v in mine) / len(mine)), "bytes_count": len(mine)}
    if kind not in WINDOWS:
        ends = [None if x is None else min(1.0, max(0.0, x)) for x in quality]
        if name == "retrieval":
            # Contexts that all agree are no certainty: no narrower than if all answers were independent.
            low, high = results.wilson(quality.value, round(sum(weights)))
            ends[1:] = [low if ends[1] is None else min(low, ends[1]), high if ends[2] is None else max(high, ends[2])]
        return row | {**named_ends(name, ends), f"{name}_count": round(sum(weights))}
    row |= {**named_ends(name, [None if x is None else math.exp(x) for x in quality]), "perplexity_count": len(mine)}
    if mine != base:
        over = paired(values, [v.value for v in base], weights)
        row |= named_ends("perplexity_ratio", [None if x is None else math.exp(x) for x in over])
        row["perplexity_ratio_count"] = len(mine)
    return row


def named_ends(name: str, found: Sequence[float | None]) -> dict[str, float]:
    return {n: x for n, x in zip((name, f"{name}_low", f"{name}_high"), found, strict=True) if x is not None}


def apart(mine: Sequence[Value], rival: Sequence[Value], lower: bool) -> float:
    """Standard errors that an arm is better than another, one sample without a difference added."""
    weights = [v.weight for v in mine]
    gains = [(b.value - a.value) * (1 if lower else -1) for a, b in zip(mine, rival, strict=True)] + [0.0]
    weights.append(round(sum(weights) / len(weights)))
    total, n = sum(weights), len(gains)
    mean = sum(w * g for w, g in zip(weights, gains, strict=True)) / total
    squares = sum((w * (g - mean)) ** 2 for w, g in zip(weights, gains, strict=True))
    return mean / (math.sqrt(squares * n / (n - 1)) / total) if squares else 0.0


def read(path: Path) -> tuple[list[Value], dict[str, Any]]:
    """Values of a file, and where the last of them were measured; nothing where there is no file."""
    found, where = lines(path)
    return [Value(*one) for one in found], where


def lines(path: Path) -> tuple[list[list[Any]], dict[str, Any]]:
    """Fields of the values of a file, and the last of the records that say where they were measured.

    A last line that was broken off is left out.
    """
    text = path.read_text("utf8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in text if line.endswith("\n")]
    where = [one for one in found if isinstance(one, dict)]
    return [one for one in found if isinstance(one, list)], where[-1] if where else {}


def write(path: Path, line: Any) -> None:
    """Add a line to the file of values."""
    with path.open("a", encoding="utf8") as f:
        f.write(json.dumps(line) + "\n")


def main() -> None:
    """Measure what is missing, and write rows of all that is there after each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=Path, required=True, help="file of the numbers of each sample")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--budgets", default="0.25,0.5,0.125", help="shares, with commas, one after the other")
    parser.add_argument("--kinds", default=",".join(COUNTS), help="names, with commas")
    parser.add_argument("--samples", type=int, help="at most so many of each kind")
    parser.add_argument("--quick", action="store_true", help="two samples of each kind")
    parser.add_argument("--rows", action="store_true", help="measure nothing: write rows of the values that are there")
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    given = parser.parse_args()
    names, kinds = given.policies.split(","), given.kinds.split(",")
    known(parser, "policies", names, POLICIES)
    known(parser, "kinds", kinds, COUNTS)
    threads(given.threads)
    counts = {k: min(2 if given.quick else given.samples or COUNTS[k], COUNTS[k]) for k in kinds}
    there, where = read(given.values)
    if given.rows:
        save(records(there, where), "tasks", given)
        return
    source = results.here("cpu", "float32")
    source["versions"] += f" {carriers.cited('smollm2', 'handbook', 'devil')}"
    where = {"model": "smollm2-135m", **source}
    model, tokenizer = smollm2.load()
    maker, started = texts.Maker(tokenizer), time.monotonic()
    write(given.values, where)
    for budget in given.budgets.split(","):
        every = arms(names, [float(budget)])
        last = ""
        for value in run(model, tokenizer, maker, every, counts, there):
            there.append(value)
            write(given.values, value)
            if value.method != last:
                seconds, last = time.monotonic() - started, value.method
                print(f"{seconds:6.0f} s  {value.kind} {value.index}.. {last} at {budget}", file=sys.stderr, flush=True)
        save(records(there, where), "tasks", given)


if __name__ == "__main__":
    main()
