"""What a cache policy costs at the end of a prompt, as a share of the prompt's own time.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/scoring --threads 1 --out benchmarks/results/kv.csv --overwrite

Some layers of SmolLM2-135M read the Debian handbook. In every round the unpatched model reads it again, and every
policy gets the tensors of its attention, as after a prompt that was read under it. Timers stand around what the policy
does: ``score_ms`` (observing and scoring), ``select_ms`` (budget and choice of rows), ``evict_ms`` (copying what
stays); ``policy_ms`` is all of them, ``policy_share`` that of the prompt in the same round, without the model's head.
Policies that read the attention of all queries (h2o, observed_attention, keyformer, zeromerge) look at every pair once
more, and cost that. Medians over rounds, policies in another order each. ``--cpu-time`` counts the time of this process
instead of the clock's, for a machine that others use: with one thread it is about the time on an idle one.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import threads
from benchmarks.kv import feed
from benchmarks.saving import known, save, saving
from benchmarks.zoo import data, smollm2
from tokred.bench import results, timing
from tokred.bench.arms import typed

POLICIES = (
    "snapkv", "snapkv window=32", "pyramidkv", "adakv", "criticalkv", "cake", "tova", "knorm", "keydiff", "lagkv",
    "expected_attention", "streaming_llm", "squeezeattention", "random_evict", "h2o", "observed_attention",
    "zeromerge", "keyformer",
)  # fmt: skip


def shorten(model: Any, layers: int) -> Any:
    """The model with some of its layers alone, evenly spread."""
    depth = model.config.num_hidden_layers
    chosen = [round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in chosen)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    model.config.layer_types = ["full_attention"] * layers
    return model


def measure(model: Any, ids: Tensor, names: list[str], budget: float, rounds: int, watch: timing.Watch) -> list[dict]:
    """Records, one a policy."""
    arms = [typed(f"{name.partition(' ')[0]} budget={budget:g} {name.partition(' ')[2]}".strip()) for name in names]
    dense: list[float] = []
    found: list[list[dict[str, float]]] = [[] for _ in arms]
    prompt, _ = feed.read(model, ids)
    with feed.watched(watch), torch.inference_mode():
        for i in range(rounds):
            start = watch.now()
            model.model(ids, use_cache=True)
            dense.append(1000 * (watch.now() - start))
            for k in random.Random(i).sample(range(len(arms)), len(arms)):
                with arms[k].applied(model):
                    cache = tokred.kv_cache(model)
                    watch.clear()
                    prompt.fill(cache)
                    prompt.forget()
                spent = {part: 1000 * watch.total(part) for part in ("policy", "select", "evict")}
                spent["score"] = spent["policy"] - spent["select"] - spent["evict"]
                found[k].append(spent)
    where = {"model": "smollm2-135m", "tokens": ids.shape[1], "depth": model.config.num_hidden_layers}
    where |= {"rounds": rounds, **results.here(watch.device, model.dtype), **results.spread("prefill_ms", dense)}
    rows = []
    for arm, seen in zip(arms, found, strict=True):
        row: dict[str, Any] = {"method": arm.name, "setting": arm.setting, **where}
        for part in ("policy", "score", "select", "evict"):
            row |= results.spread(f"{part}_ms", [one[part] for one in seen])
        row |= results.spread("policy_share", [one["policy"] / d for one, d in zip(seen, dense, strict=True)])
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where others use the machine")
    saving(parser)
    arguments = parser.parse_args()
    names = arguments.policies.split(",")
    known(parser, "policies", names, POLICIES)
    threads(arguments.threads)
    model, tokenizer = smollm2.load()
    shorten(model, arguments.layers).to(arguments.device)
    text = data.handbook()[: arguments.tokens * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens].to(arguments.device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    watch = timing.Watch(arguments.device, clock)
    rows = measure(model, ids, names, arguments.budget, arguments.rounds, watch)
    for row in rows:
        print(f"{row['method']:<20} {row['setting']:<24} {row['policy_ms']:9.2f} ms, {row['policy_share']:.2%} of the "
              f"prompt's {row['prefill_ms']:.0f} ms")  # fmt: skip
    save(rows, "scoring", arguments)


if __name__ == "__main__":
    main()
