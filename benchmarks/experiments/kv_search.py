"""Search for the best composition of score, budget and fate at equal bytes, on text that no benchmark uses.

    python -m benchmarks experiments/kv_search --out benchmarks/results/kv.csv

One choice at a time: every score with the plain budget, then every budget with the best scores, then fates and sinks
with the best pairs. A composition is judged by two numbers, at a quarter and at an eighth of the cache: perplexity over
that of the full cache, and keys found, the question asked after compressing. ``loss`` is the log of the first plus
the share of keys that the full cache finds and this one does not: one key of twelve at one budget is 0.04 of it.
Trials in the file are not repeated. The arm ``composed`` of ``benchmarks/kv/quality.py`` is not the best of the trials
but the plainest one within a key of it; there it is measured on other text.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch

import tokred
from benchmarks.kv import feed
from benchmarks.kv import quality as kv_quality
from benchmarks.saving import save, saving
from benchmarks.zoo import data, smollm2
from tokred import kv
from tokred.bench import results

BUDGETS = (0.25, 0.125)
PARTS = ("score", "budget", "fate", "guard")
SCORES: dict[str, Any] = {
    "window 32": kv.Window(32),
    "window 32, max": kv.Window(32, pool=7, pooling="max"),
    "window 8": kv.Window(8),
    "column sum": kv.ColumnSum(),
    "observed": kv.Observed(),
    "expected": kv.Expected(),
    "expected, epsilon": kv.Expected(epsilon=0.02),
    "critical window": kv.Critical(kv.Window(32)),
    "critical expected": kv.Critical(kv.Expected()),
    "critical observed": kv.Critical(kv.Observed()),
    "key norm": kv.KeyNorm(),
    "key difference": kv.KeyDifference(),
    "lag": kv.LagRelative(64),
    "dispersion": kv.Dispersion(32),
    "recency": kv.Recency(),
    "reconstruction": kv.Reconstruction(),
}
INSTRUCTION = "\n\nRepeat the part of the previous context exactly, starting with "
LAYERS: dict[str, Any] = {
    "uniform": kv.Uniform,
    "pyramid": lambda b: kv.Pyramid(b, window=32),
    "heads adaptive": kv.Adaptive,
    "heads adaptive, pyramid": lambda b: kv.Adaptive(b, layers=kv.Pyramid(b, window=32)),
    "all share": kv.Global,
}
FATES: dict[str, Any] = {"evict": kv.Evict(), "merge": kv.Merge()}
GUARDS: dict[str, dict[str, Any]] = {
    "": {},
    "sinks 4": {"sinks": 4},
    "sinks 4, recent 16": {"sinks": 4, "recent": 16},
    "sinks 4, recent 25 %": {"sinks": 4, "recent": 0.25},
}


class Judge:
    """Prompts that are read once, and what compositions make of them.

    Args:
        length: of the contexts.
        keys: for each depth.
    """

    def __init__(self, model: Any, tokenizer: Any, text: torch.Tensor, length: int, keys: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        with torch.inference_mode():
            self.window = text[None, :length]
            self.reading = feed.read(model, self.window)[0]
            groups = kv_quality.haystacks(tokenizer, text[length:], length, keys, seed=2)
            self.groups = [(g, feed.read(model, torch.stack([h.context for h in g]))[0]) for g in groups]
        self.full = (1.0, 1.0)
        self.full = self.measure(tokred.make("snapkv", budget=1.0))[:2]

    @torch.inference_mode()
    def measure(self, policy: Any) -> tuple[float, float, int]:
        """Perplexity, share of keys found, and bytes of the first prompt's cache."""
        n, right, count = self.window.shape[1] * 3 // 4, 0, 0
        with tokred.applied(self.model, policy):
            cache = self.reading.fill(tokred.kv_cache(self.model), n - 1)
            held = feed.held_bytes(cache)
            logits = self.model(self.window[:, n - 1 : -1], past_key_values=cache).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, self.window[0, n:]).item()
            for group, prompt in self.groups:
                cache = prompt.fill(tokred.kv_cache(self.model))
                question = group[0].question.expand(len(group), -1)
                logits = self.model(question, past_key_values=cache, logits_to_keep=1).logits
                keys = [h.key for h in group]
                right += kv_quality.greedy(self.model, self.tokenizer, logits, cache, None, keys)
                count += len(group)
        return math.exp(loss), right / count, held

    def loss(self, compose: Any) -> tuple[float, list[tuple[float, float, float, int]]]:
        """The mean over budgets, and what it is made of."""
        found, total = [], 0.0
        for budget in BUDGETS:
            perplexity, keys, held = self.measure(compose(budget))
            total += math.log(perplexity / self.full[0]) + max(0.0, self.full[1] - keys)
            found.append((budget, perplexity / self.full[0], keys, held))
        return total / len(BUDGETS), found


def composition(score: str, budget: str, fate: str = "evict", guard: str = "") -> Any:
    """A function from a share to a policy."""
    parts = {"score": SCORES[score], "fate": FATES[fate], **GUARDS[guard]}
    return lambda share: tokred.KVPolicy(budget=LAYERS[budget](share), **parts)


def main() -> None:
    """Search, and write every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--keys", type=int, default=3, help="for each of four depths")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int)
    saving(parser, required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = smollm2.load(dtype=getattr(torch, arguments.dtype))
    first, later = (tokenizer(x).input_ids for x in ("\n\nRepeat the previous context exactly.\n\n", INSTRUCTION))
    SCORES["reconstruction, asked for"] = kv.Reconstruction(instruction=first, later=later)
    # The benchmark reads the first 400,000 characters.
    text = tokenizer(data.handbook()[500_000:700_000], return_tensors="pt").input_ids[0]
    judge = Judge(model, tokenizer, text, arguments.length, arguments.keys)
    print(f"full cache: perplexity {judge.full[0]:.2f}, keys {judge.full[1]:.2f}", file=sys.stderr, flush=True)
    trials = {row["setting"]: row["loss"] for row in results.records(results.read(arguments.out), "search")}
    losses: dict[tuple[str, ...], float] = {}
    started = time.monotonic()

    def attempt(*names: str) -> None:
        names = (*names, *("evict", "")[len(names) - 2 :])
        text = results.pairs(dict(zip(PARTS, names, strict=True)))
        known = trials.get(f"{text} share={BUDGETS[0]:g}")
        if names in losses or known is not None:
            losses.setdefault(names, math.inf if known is None else known)
            return
        try:
            losses[names], found = judge.loss(composition(*names))
        except (TypeError, ValueError) as error:
            losses[names], found = math.inf, []
            print(names, error, file=sys.stderr, flush=True)
        for budget, ratio, keys, held in found:
            row: dict[str, Any] = {"model": "smollm2-135m", "method": "kv", "setting": f"{text} share={budget:g}"}
            row |= {"perplexity_ratio": ratio, "keys_found": keys, "bytes": held, "loss": losses[names]}
            save([row | results.here("cpu", arguments.dtype)], "search", arguments)
        print(f"{time.monotonic() - started:5.0f} s {losses[names]:.4f}", *names, file=sys.stderr, flush=True)

    def best(count: int) -> list[tuple[str, ...]]:
        return sorted(losses, key=lambda names: losses[names])[:count]

    for score, part in SCORES.items():
        # A score that repeats the context is made for a budget that all heads share.
        attempt(score, "uniform" if part.repeats is None else "all share")
    for score, *_ in best(4):
        for budget in LAYERS:
            attempt(score, budget)
    for score, budget, *_ in best(2):
        for fate in FATES:
            for guard in GUARDS:
                attempt(score, budget, fate, guard)
    print("best:", *best(1)[0], f"loss {losses[best(1)[0]]:.4f}")


if __name__ == "__main__":
    main()
