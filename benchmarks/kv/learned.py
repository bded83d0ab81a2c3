"""Learned caches on SmolLM2-135M beside those that need no training, at as many rows read: perplexity, keys, attention.

    python -m benchmarks.zoo.fetch smollm2 handbook devil
    python -m benchmarks kv/train_learned --folder FOLDER                               # or the weights that are here
    python -m benchmarks kv/learned --weights FOLDER --values values.jsonl --out benchmarks/results/kv.csv --overwrite

``benchmarks/kv/train_learned`` trains; without ``--weights`` those of ``benchmarks/kv/weights`` are taken, and methods
whose weights are too large to be there are left out. Nothing that is measured has been learned from: windows and keys
are of what the lessons leave of the handbook, of a dictionary, and of other modules of Python.

Prompts have 480 tokens and are read once for all arms. *Rows* are those of a layer and key/value head that a token
behind the prompt attends to of it. Caches that evict attend to what has come since besides; tokenselect, tokenbutler
and adore choose as many of all, newest ones included, so that they see as much less as has come.

======== ==============================================================================================================
metric   of
======== ==============================================================================================================
ratio    ``perplexity_ratio``: perplexity of the first 64 tokens behind the prompt over the full cache's, paired
keys     ``retrieval``: numbers that were hidden in prose, asked for after the prompt was compressed
mass     ``attention_read``: of the attention that tokens behind the prompt give it, what falls on the rows read, over
         what falls on the best rows for each head; ``rows_found`` the share of these that are among those read
time     ``policy_ms``, ``policy_share``: what is done at the end of a prompt, and that over the prompt's own time
======== ==============================================================================================================

``over_kvzip`` is the perplexity over KVzip's at the same rows, paired, and ``over_kvzip_recent`` that over KVzip's with
first and newest rows that always stay, as KVzap has them. KVzap's threshold is set for the lessons that
were held out, so that it keeps about as many rows; ``bytes`` says what it kept. Numbers of samples go into the file of
values at once, as in ``kv/tasks``; intervals are over samples.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import threads
from benchmarks.kv import feed, lessons, tasks, texts
from benchmarks.kv.learned_arms import Learned, arms
from benchmarks.kv.quality import patched
from benchmarks.kv.tasks import Value, fed, named_ends, rest_of, score_of
from benchmarks.saving import known, save, saving
from benchmarks.zoo import carriers, data, smollm2
from tokred.bench import results, timing
from tokred.bench.arms import BASE
from tokred.bench.scoring import estimate, paired

WEIGHTS = Path(__file__).parent / "weights"
COUNTS = {"prose": 20, "number": 20, "code": 10, "several": 10}
GROUP = 10  # samples at a time
SCORED = 64  # tokens of a window
RIVAL, AS_RIVAL = "kvzip", "recent"  # the latter keeps first and newest rows as kvzap does
MASS, FOUND = "attention_read", "rows_found"
TIMED = (480,)


# ---------------------------------------------------------------------------------------------- measuring


def taught(model: Any, arm: Learned) -> Any:
    """The module of an arm, with what it has learned; None where it has none."""
    modules = tokred.modules(model)
    if not modules:
        return None
    (module,) = modules.values()
    if arm.weights is not None:
        loaded = tokred.load(arm.weights).loaded  # type: ignore[attr-defined]
        module.load_state_dict(loaded.tensors)
    return module.eval()


@torch.inference_mode()
def measure(model: Any, group: Sequence[texts.Sample], first: int, every: Sequence[Learned]) -> Iterator[Value]:
    """Values of samples of one kind, of which ``first`` is the index of the first."""
    kind, n = group[0].kind, len(group[0].prompt)
    if kind in texts.WINDOWS:
        group = [texts.Sample(kind, s.prompt, s.follows[:SCORED], ((0, SCORED),)) for s in group]
    rest = rest_of(group)
    whole = torch.cat([torch.stack([s.prompt for s in group]), rest], 1)
    prompt, _ = feed.read(model, whole)
    truth = Truth(prompt, n) if kind == "prose" else None
    for arm in every:
        with patched(model, arm.method):
            module, cache = taught(model, arm), tokred.kv_cache(model)
            if arm.read:
                model.model(whole[:, : n - 1], past_key_values=cache)
            else:
                prompt.fill(cache, n - 1, module=module)
            held = round(feed.held_bytes(cache) / len(group))
            shares = () if truth is None else truth.of(arm, cache, module)
            logits = fed(model, whole[:, n - 1 : -1], cache, 1 if arm.single else rest.shape[1] + 1)
        asked = "after" if group[0].question else ""
        for i, (scores, sample) in enumerate(zip(logits, group, strict=True)):
            value, weight = score_of(kind, scores.float(), sample)
            yield Value(kind, first + i, arm.name, arm.setting, asked, value, weight, held)
        for name, found in shares:
            for i, value in enumerate(found.tolist()):
                yield Value(kind, first + i, arm.name, arm.setting, name, value, 1, held)


class Truth:
    """What the full model's tokens behind a prompt attend to of it, in some layers, and who reads that.

    Args:
        prompt: with what follows it.
        n: tokens of the prompt; its last one is fed with what follows.
    """

    QUERIES = 8
    EVERY = 3  # layers from one to the next; the first is none, since tokenbutler attends to all there

    def __init__(self, prompt: feed.Prompt, n: int) -> None:
        self.prompt, self.n = prompt, n - 1
        self.at = torch.linspace(self.n, prompt.length - 1, self.QUERIES).round().long()
        # The same for every arm: weights, and their order from the largest on.
        self.layers = {
            layer: (weights, weights.sort(-1, descending=True))
            for layer in range(1, len(prompt.layers), self.EVERY)
            for weights in [self._weights(layer)]
        }

    def _weights(self, layer: int) -> Tensor:
        """``[B, Hk, G, m, n]`` of the prompt's rows alone."""
        seen = self.prompt.layers[layer]
        heads = seen.k.shape[1]
        q = seen.q[:, :, self.at].float().unflatten(1, (heads, -1))
        keys = seen.k[:, :, None, : self.n].float()
        return (q @ keys.mT * seen.q.shape[-1] ** -0.5).softmax(-1)

    def of(self, arm: Learned, cache: Any, module: Any) -> list[tuple[str, Tensor]]:
        """``[B]`` of :data:`MASS` and of :data:`FOUND`; nothing of arms whose rows nobody can name."""
        if arm.name in (BASE, "fastcache", "shadowkv"):
            return []
        masses, founds = [], []
        chosen = Chosen(self, arm, cache, module)
        for layer, (weights, order) in self.layers.items():
            rows = chosen(layer)
            k = rows.sum(-1).clamp(min=1)  # [B, Hk, 1, m]
            # The best rows of each query head, as many as are read.
            best = torch.arange(self.n) < k[..., None]
            most = (order.values * best).sum(-1)
            read = rows.expand_as(weights)
            masses.append(((weights * read).sum(-1) / most).flatten(1).mean(1))
            founds.append(((read.gather(-1, order.indices) & best).sum(-1) / k).flatten(1).mean(1))
        return [(MASS, torch.stack(masses).mean(0)), (FOUND, torch.stack(founds).mean(0))]


class Chosen:
    """The rows of the prompt that an arm reads: ``[B, Hk, 1, m, n]`` bool of a layer, by key/value head and query."""

    def __init__(self, truth: Truth, arm: Learned, cache: Any, module: Any) -> None:
        self.truth, self.arm, self.cache = truth, arm, cache
        self.made = None
        if arm.name == "tokenbutler":
            seen = truth.prompt.layers[0]
            self.made = module.networks["0"](seen.hidden, torch.arange(truth.prompt.length)[None])

    def __call__(self, layer: int) -> Tensor:
        truth, seen = self.truth, self.truth.prompt.layers[layer]
        n, at = truth.n, truth.at
        b, heads = seen.k.shape[:2]
        if self.made is not None:
            store = self.arm.method.parts.store
            foretold = self.made.queries[:, layer - 1, :, at] @ self.made.keys[:, layer - 1].mT
            token = torch.arange(truth.prompt.length)
            rows = store.chosen(foretold * store.channels**-0.5, (token <= at[:, None])[None], token[None], heads)
            return rows[..., :n].unflatten(1, (heads, -1))
        if self.arm.name == "tokenselect":
            store, found = self.arm.method.parts.store, []
            token = torch.arange(truth.prompt.length)
            for query in at.tolist():
                among = (token >= store.sinks) & (token <= query - store.recent)
                q = seen.q[:, :, query].float().unflatten(1, (heads, -1))
                logits = (q @ seen.k.float().mT).flatten(1, 2) * q.shape[-1] ** -0.5
                votes = store.votes(logits, among.expand(b, -1))
                rows = torch.zeros(b, len(token), dtype=torch.bool).scatter(1, votes.topk(store.budget).indices, True)
                found.append(rows | (~among & (token <= query)))
            return torch.stack(found, 1)[:, None, None, :, :n].expand(-1, heads, -1, -1, -1)
        slots = self.cache.layers[layer].slots
        if slots is None:
            return torch.ones(b, heads, 1, len(at), n, dtype=torch.bool)
        held = torch.zeros(b, heads, n + 1, dtype=torch.bool)
        held = held.scatter(2, slots.long().expand(b, heads, -1).clamp(max=n), True)[..., :n]
        return held[:, :, None, None].expand(-1, -1, -1, len(at), -1)


def run(
    model: Any, maker: texts.Maker, every: Sequence[Learned], counts: dict[str, int], there: Sequence[Value]
) -> Iterator[Value]:
    """Values that are not there yet."""
    for first, group, wanted in tasks.missing(maker, every, counts, there, GROUP):
        yield from measure(model, group, first, wanted)


# ---------------------------------------------------------------------------------------------- rows


def records(values: Sequence[Value], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of all arms that have as many samples as the unpatched model."""
    table, found = tasks.tabled(values), []
    for (kind, asked), by in table.items():
        base = by.get((BASE, ""), {})
        shares = {name: by_share for name in (MASS, FOUND) if (by_share := table.get((kind, name)))}
        for (method, setting), mine in by.items():
            if asked in (MASS, FOUND) or mine.keys() != base.keys():
                continue
            row = {
                "method": method,
                "setting": setting,
                "data": kind,
                "asked": asked,
                "length": lessons.PROMPT,
                **where,
            }
            row |= tasks.numbers(kind, [mine[i] for i in base], list(base.values()))
            share = setting.partition(" ")[0]
            for metric, text in (("over_kvzip", share), ("over_kvzip_recent", f"{share} {AS_RIVAL}")):
                rival = by.get((RIVAL, text), {})
                if kind in texts.WINDOWS and method not in (BASE, RIVAL) and rival.keys() == base.keys():
                    ours, theirs = ([one[i].value for i in base] for one in (mine, rival))
                    over = paired(ours, theirs, [float(mine[i].weight) for i in base])
                    row |= named_ends(metric, [None if x is None else math.exp(x) for x in over])
                    row[f"{metric}_count"] = len(base)
            for name, of in shares.items():
                own = of.get((method, setting), {})
                if own.keys() == base.keys():
                    row |= named_ends(name, estimate([own[i].value for i in base], [1.0] * len(base)))
                    row[f"{name}_count"] = len(base)
            found.append(row)
    return found


def timed(model: Any, maker: texts.Maker, every: Sequence[Learned], rounds: int, where: dict[str, Any]) -> list[dict]:
    """Records of what is done at the end of a prompt, in seconds of this process, in turn."""
    watch, rows = timing.Watch("cpu", time.process_time), []
    for length in TIMED:
        ids = maker.stretch(maker.prose, 0, random.Random(0), length)[None]
        spent: list[list[float]] = [[] for _ in every]
        whole: list[float] = []
        with feed.watched(watch), torch.inference_mode():
            for _ in range(rounds):
                start = watch.now()
                model.model(ids, use_cache=True)
                whole.append(1000 * (watch.now() - start))
                for arm, times in zip(every, spent, strict=True):
                    with patched(model, arm.method):
                        taught(model, arm)
                        watch.clear()
                        model.model(ids, past_key_values=tokred.kv_cache(model))
                    times.append(1000 * watch.total("policy"))
        for arm, times in zip(every, spent, strict=True):
            row = {
                "method": arm.name,
                "setting": arm.setting,
                "case": "time",
                "tokens": length,
                "clock": "cpu",
                **where,
            }
            row |= {"rounds": rounds, **results.spread("prefill_ms", whole), **results.spread("policy_ms", times)}
            row |= results.spread("policy_share", [t / w for t, w in zip(times, whole, strict=True)])
            print(f"{arm.name:<20} {arm.setting:<20} {length} tokens: {statistics.median(times):.1f} ms of "
                  f"{statistics.median(whole):.0f}", flush=True)  # fmt: skip
            rows.append(row)
    return rows


def main() -> None:
    """Measure what is missing, and write rows of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=Path, required=True, help="file of the numbers of each sample")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of what was learned")
    parser.add_argument("--shares", default="0.125,0.25", help="of the prompt's rows, with commas, one after the other")
    parser.add_argument("--methods", help="names, with commas; default: all")
    parser.add_argument("--kinds", default=",".join(COUNTS), help="names, with commas")
    parser.add_argument("--samples", type=int, help="at most so many of each kind")
    parser.add_argument("--part", choices=("quality", "time"), help="default: both")
    parser.add_argument("--rounds", type=int, default=3, help="of the time")
    parser.add_argument("--rows", action="store_true", help="measure nothing: write rows of the values that are there")
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    given = parser.parse_args()
    kinds, names = given.kinds.split(","), given.methods.split(",") if given.methods else None
    shares = [float(s) for s in given.shares.split(",")]
    known(parser, "kinds", kinds, COUNTS)
    threads(given.threads)
    there, where = tasks.read(given.values)
    if given.rows:
        save(records(there, where), "learned", given)
        return
    source = results.here("cpu", "bfloat16")
    source["versions"] += f" {carriers.cited('smollm2', 'handbook', 'devil')}"
    where = {"model": "smollm2-135m", **source}
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    prose = [lessons.parted()[1], data.devils_dictionary()]
    maker, started = texts.Maker(tokenizer, prose=prose, prompt=lessons.PROMPT), time.monotonic()
    if given.part != "quality":
        some = [a for a in arms(shares[:1], given.weights, names) if a.name in (RIVAL, "kvzap", "expected_attention")]
        save(timed(model, maker, some, given.rounds, where), "learned", given)
    if given.part == "time":
        return
    tasks.write(given.values, where)
    counts = {k: min(given.samples or COUNTS[k], COUNTS[k]) for k in kinds}
    last = ""
    for value in run(model, maker, arms(shares, given.weights, names), counts, there):
        there.append(value)
        tasks.write(given.values, value)
        if f"{value.method} {value.setting}" != last:
            seconds, last = time.monotonic() - started, f"{value.method} {value.setting}"
            print(f"{seconds:6.0f} s  {value.kind} {value.index}.. {last}", file=sys.stderr, flush=True)
    save(records(there, where), "learned", given)


if __name__ == "__main__":
    main()
