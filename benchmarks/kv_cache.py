"""KV-cache policies on SmolLM2-135M: perplexity, pass-key retrieval, bytes really held, prefill and decoding speed.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python benchmarks/kv_cache.py --out benchmarks/results/kv_cache.csv          # hours on a CPU
    python benchmarks/kv_cache.py --quick --out /tmp/kv.csv --plot /tmp/kv       # minutes

What is measured, for every policy and budget:

- ``perplexity`` of the last quarter of windows of the Debian handbook, the first three quarters being the prompt;
- ``retrieval`` of a five-digit key hidden in the handbook, the question asked *after* the context was compressed (the
  fair order) or *before*, as part of the prompt, which flatters scores that look at the last queries;
- ``bytes`` that the cache holds for a sample after the prompt, keys, values, positions and state, measured;
- ``prefill_s`` and ``decode_tokens_per_s``, batch 1 and a left-padded batch of 4.

One row of the CSV is one number. Budgets are shares of the prompt; the unpatched model is the policy ``none``.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from checkout import use_checkout

use_checkout()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import tokred  # noqa: E402
from benchmarks.zoo import data, smollm2  # noqa: E402
from tokred import environment, kv  # noqa: E402

BUDGETS = (0.5, 0.25, 0.125, 0.05)
DEPTHS = (0.1, 0.35, 0.6, 0.85)
COLUMNS = ("policy", "budget", "measure", "asked", "batch", "length", "value", "count", "seconds")
QUESTION = " What is the pass key? The pass key is"

# Settings of small windows: a twentieth of a prompt of 1,024 tokens has to hold them.
POLICIES: dict[str, Callable[[float], Any]] = {
    "streaming_llm": lambda b: tokred.make("streaming_llm", budget=b),
    "h2o": lambda b: tokred.make("h2o", budget=b),
    "tova": lambda b: tokred.make("tova", budget=b),
    "keyformer": lambda b: tokred.make("keyformer", budget=b),
    "zeromerge": lambda b: tokred.make("zeromerge", budget=b),
    "snapkv": lambda b: tokred.make("snapkv", budget=b, window=32),
    "pyramidkv": lambda b: tokred.make("pyramidkv", budget=b, window=32),
    "adakv": lambda b: tokred.make("adakv", budget=b, score=kv.Window(32)),
    "criticalkv": lambda b: tokred.make("criticalkv", budget=b, score=kv.Window(32)),
    "cake": lambda b: tokred.make("cake", budget=b),
    "squeezeattention": lambda b: tokred.make("squeezeattention", budget=b),
    "observed_attention": lambda b: tokred.make("observed_attention", budget=b),
    "expected_attention": lambda b: tokred.make("expected_attention", budget=b),
    "knorm": lambda b: tokred.make("knorm", budget=b),
    "keydiff": lambda b: tokred.make("keydiff", budget=b, turns=False),
    "lagkv": lambda b: tokred.make("lagkv", budget=b, lag=64),
    "random_evict": lambda b: tokred.make("random_evict", budget=b, sinks=4, recent=32),
}


class Arm(NamedTuple):
    """A policy at a budget; the unpatched model where there is none."""

    name: str
    budget: float
    policy: Any


class Setting(NamedTuple):
    """How much is measured.

    Attributes:
        window: tokens of a perplexity window.
        windows: how many of them.
        lengths: contexts that a key is hidden in.
        keys: keys for each length and depth.
        timed: tokens decoded for a speed.
        chunk: tokens that are fed at once to policies that evict at every step; 1 is exact.
    """

    window: int = 4096
    windows: int = 4
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    keys: int = 5
    timed: int = 64
    chunk: int = 1


QUICK = Setting(window=512, windows=1, lengths=(512,), keys=1, timed=16, chunk=32)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, arm: Arm, setting: Setting) -> float:
    """Of the last quarter of every window, given the compressed rest."""
    total, count = 0.0, 0
    for window in ids.split(setting.window)[: setting.windows]:
        cut = len(window) * 3 // 4
        cache = _cache(model, arm)
        logits = [model(window[None, :cut], past_key_values=cache, logits_to_keep=1).logits[0]]
        stepwise = arm.policy is not None and arm.policy.parts.when.every
        for part in window[cut:-1].split(setting.chunk if stepwise else setting.window):
            logits.append(model(part[None], past_key_values=cache).logits[0])
        total += F.cross_entropy(torch.cat(logits).float(), window[cut:], reduction="sum").item()
        count += len(window) - cut
    return float(torch.tensor(total / count).exp())


class Haystack(NamedTuple):
    """A context with a key in it."""

    context: Tensor
    question: Tensor
    key: str


def haystacks(tokenizer: Any, text: Tensor, length: int, setting: Setting) -> Iterator[Haystack]:
    """Contexts of ``length`` tokens, question included, with a key at each depth."""
    rng = random.Random(length)
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False).input_ids[0]
    for depth in DEPTHS:
        for _ in range(setting.keys):
            key = str(rng.randrange(10000, 100000))
            needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
            hidden = tokenizer(needle, return_tensors="pt", add_special_tokens=False).input_ids[0]
            room = length - len(hidden) - len(question)
            start = rng.randrange(0, len(text) - room)
            straw, cut = text[start : start + room], int(room * depth)
            yield Haystack(torch.cat([straw[:cut], hidden, straw[cut:]])[None], question[None], key)


@torch.inference_mode()
def retrieval(model: Any, tokenizer: Any, found: list[Haystack], arm: Arm, asked: str) -> float:
    """Share of the keys that greedy decoding says within eight tokens."""
    right = 0
    for hay in found:
        cache = _cache(model, arm)
        whole = torch.cat([hay.context, hay.question], 1)
        if asked == "after":
            model(hay.context, past_key_values=cache, logits_to_keep=1)
        out = model.generate(
            whole, attention_mask=torch.ones_like(whole), past_key_values=cache, max_new_tokens=8, do_sample=False
        )
        right += hay.key in tokenizer.decode(out[0, whole.shape[1] :])
    return right / len(found)


@torch.inference_mode()
def speed(model: Any, ids: Tensor, arm: Arm, batch: int, setting: Setting) -> tuple[float, float, float]:
    """Seconds of the prompt, tokens a second after it, and bytes of a sample after the prompt."""
    n = setting.window
    rows = ids[: n * batch].view(batch, n)
    mask = torch.ones_like(rows)
    for i in range(1, batch):
        mask[i, : i * n // (2 * batch)] = 0  # padded on the left, each sample more than the one before
    cache = _cache(model, arm)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    start = time.perf_counter()
    given = {"attention_mask": mask} if batch > 1 else {}
    step = model(rows, position_ids=positions, past_key_values=cache, logits_to_keep=1, **given).logits.argmax(-1)
    prefill = time.perf_counter() - start
    held = held_bytes(cache) / batch
    times, position = [], positions[:, -1:]
    for _ in range(setting.timed):
        position, mask = position + 1, torch.cat([mask, torch.ones_like(step)], 1)
        start = time.perf_counter()
        given = {"attention_mask": mask} if batch > 1 else {}
        step = model(step, position_ids=position, past_key_values=cache, **given).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    return prefill, batch / statistics.median(times), held


def held_bytes(cache: Any) -> int:
    """What a cache holds, ours or transformers' own."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _cache(model: Any, arm: Arm) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config) if arm.policy is None else tokred.kv_cache(model)


def measure(model: Any, tokenizer: Any, text: Tensor, arm: Arm, setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of the CSV for one arm."""

    def row(name: str, value: float, count: int, began: float, **more: Any) -> dict[str, Any]:
        base = {"policy": arm.name, "budget": arm.budget, "measure": name, "asked": "", "batch": 1}
        seconds = round(time.perf_counter() - began, 2)
        return {**base, "length": setting.window, **more, "value": f"{value:.6g}", "count": count, "seconds": seconds}

    if arm.policy is not None:
        tokred.apply(model, arm.policy)
    try:
        began = time.perf_counter()
        yield row("perplexity", perplexity(model, text, arm, setting), setting.windows, began)
        for length in setting.lengths:
            found = list(haystacks(tokenizer, text, length, setting))
            for asked in ("after", "before"):
                began = time.perf_counter()
                share = retrieval(model, tokenizer, found, arm, asked)
                yield row("retrieval", share, len(found), began, asked=asked, length=length)
        for batch in (1, 4):
            began = time.perf_counter()
            prefill, decode, held = speed(model, text, arm, batch, setting)
            yield row("prefill_s", prefill, 1, began, batch=batch)
            yield row("decode_tokens_per_s", decode, setting.timed, began, batch=batch)
            yield row("bytes", held, 1, began, batch=batch)
    finally:
        tokred.remove(model)


def plot(rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """One picture a measure: its value over the budget, a line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    kinds = sorted({(r["measure"], r["asked"], r["batch"], r["length"]) for r in rows})
    for kind in kinds:
        measure_, asked, _, length = kind
        mine = [r for r in rows if (r["measure"], r["asked"], r["batch"], r["length"]) == kind]
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for name in sorted({r["policy"] for r in mine}):
            points = sorted((float(r["budget"]), float(r["value"])) for r in mine if r["policy"] == name)
            if name == "none":
                axes.axhline(points[0][1], color="black", linewidth=1, label="unpatched")
            else:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
        axes.set(
            xlabel="share of the cache kept", ylabel=measure_, xscale="log", title=f"{length} tokens {asked}".strip()
        )
        axes.legend(fontsize=6, ncols=2)
        figure.tight_layout()
        name = "_".join(str(part) for part in kind if part)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made


def main() -> None:
    """Measure every arm and append its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows are appended")
    parser.add_argument("--plot", type=Path, help="folder for pictures of all rows of the file")
    parser.add_argument("--quick", action="store_true", help="short windows, one key a depth")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="shares, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    names = [n for n in arguments.policies.split(",") if n]
    unknown = [n for n in names if n not in POLICIES]
    if unknown:
        parser.error(f"unknown policies: {', '.join(unknown)}; known are {', '.join(POLICIES)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setting = QUICK if arguments.quick else Setting()
    model, tokenizer = smollm2.load()
    model.to(arguments.device)
    text = tokenizer(data.handbook()[:400_000], return_tensors="pt").input_ids[0].to(arguments.device)
    budgets = [float(b) for b in arguments.budgets.split(",")]
    arms = [Arm("none", 1.0, None), *(Arm(n, b, POLICIES[n](b)) for n in names for b in budgets)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not arguments.out.exists()
    with arguments.out.open("a", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if fresh:
            writer.writeheader()
        for arm in arms:
            for row in measure(model, tokenizer, text, arm, setting):
                writer.writerow(row)
                f.flush()
                print(*row.values(), flush=True)
    print(f"torch {torch.__version__}, transformers {environment.version('transformers')}, {arguments.device}")
    if arguments.plot:
        with arguments.out.open(newline="", encoding="utf8") as f:
            print(*plot(list(csv.DictReader(f)), arguments.plot), sep="\n")


if __name__ == "__main__":
    main()
