"""Memory that scoring and compressing one layer's cache takes, for every cache policy, by the length of the prompt.

    python -m benchmarks kv/memory --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/memory --quick

A score that held the attention of every query to every key would need N x N numbers a head. Here a model of one layer
with random weights reads a prompt, and torch's profiler writes down every allocation, those inside operators among
them. ``extra_bytes`` is how far the memory in use rises above where it stood when the policy began, until it is done:
scores, choices, and the rows that are kept beside those that are not gone yet. The model's own work is left out, but
for KVzip, whose scores need more of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers

import tokred
from benchmarks.kv import feed
from benchmarks.saving import save, saving
from tokred.bench import results
from tokred.kv.keeping import Keeping

LENGTHS = (4096, 8192, 16384)
HEADS, KEY_HEADS, CHANNELS = 4, 2, 32
MODEL = f"random-h{HEADS}k{KEY_HEADS}c{CHANNELS}"
SPAN = "tokred: policy"
LAYERS = {"fastkv": 2}  # of the model; others take one
# Where the defaults would keep everything, or do not fit every length.
SETTINGS: dict[str, dict[str, Any]] = {
    "duoattention": {"gates": ((0.9, 0.1),)},
    "limited": {"policy": "keydiff", "limit": "1 MiB", "chunk": 512},
}


# Policies that score nothing, those that need a file of the model first, and one that rounds rows as well.
APART = ("kivi", "mikv", "mustafar", "nsnquant", "oscar", "turbo", "lukv", "triattention", "rdkv")


def policies() -> list[str]:
    """Names of all policies that are registered and judge rows by themselves."""
    made = {name: tokred.make(name) for name in tokred.list_methods() if name not in APART}
    return [name for name, one in made.items() if one.stage == "cache" and not isinstance(one, Keeping)]


@functools.cache
def build(layers: int) -> Any:
    """A model of one layer, or a few."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=HEADS * CHANNELS, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def marked() -> AbstractContextManager[None]:
    """Write down when the policy is at work."""

    def mark(part: str) -> AbstractContextManager[object]:
        return torch.profiler.record_function(SPAN) if part == "policy" else contextlib.nullcontext()

    return feed.watched(mark)


def peak(events: list[Any]) -> int:
    """Most bytes that any marked span adds to what was in use when it began; 0 where nothing was written down."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = 0
    for span in (e for e in events if e.name() == SPAN):
        begin, level = span.start_ns(), 0
        for time, change in changes:
            if begin <= time <= begin + span.duration_ns():
                level += change
                most = max(most, level)
    return most


def measure(name: str, n: int, **settings: Any) -> dict[str, Any]:
    """A record; ``settings`` of the policy are on top of those that all lengths have."""
    model, settings = build(LAYERS.get(name, 1)), {**SETTINGS.get(name, {}), **settings}
    ids = torch.randint(0, 64, (1, n), generator=torch.Generator().manual_seed(n))
    # The profiler loses events now and then, which makes a peak too small, never too large: the largest, seen twice.
    seen: list[int] = []
    while seen.count(max(seen, default=0)) < 2 or not max(seen):
        if len(seen) == 8:
            raise RuntimeError(f"the profiler saw {seen} bytes of {name} at {n} tokens, no peak twice")
        with tokred.applied(model, name, **settings), torch.inference_mode(), marked():
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                # RPC judges generated rows, all but the first; a hard limit wants chunks.
                parts = {"rpc": {"first": 1}, "limited": {"chunk": SETTINGS["limited"]["chunk"]}}.get(name, {})
                cache = feed.read_in_parts(model, ids, **parts)
            layer = cache.layer_rows()[0]
        assert profile.kineto_results is not None  # it has just run
        seen.append(peak(profile.kineto_results.events()))
    extra = max(seen)
    row = {"model": MODEL, "method": name, "setting": "", "tokens": n, "extra_bytes": extra, "rows_left": layer.rows}
    return row | {"bytes": layer.bytes, "dense_bytes": layer.dense_bytes, "matrix_bytes": HEADS * n * n * 4}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", help="names, with commas; default: all")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, with commas")
    parser.add_argument("--quick", action="store_true", help="two policies at 1,024 tokens: does it run?")
    saving(parser)
    options = parser.parse_args()
    if options.quick:
        options.policies, options.lengths = "snapkv,knorm", "1024"
    torch.set_num_threads(1)
    for n in sorted(int(part) for part in options.lengths.split(",")):
        for name in options.policies.split(",") if options.policies else policies():
            row = measure(name, n)
            print(
                f"{name:<20} {n:>6} tokens {row['extra_bytes'] / 2**20:8.2f} MiB extra, {row['extra_bytes'] / n:8.1f} "
                f"bytes a token, {row['rows_left']} rows left",
                flush=True,
            )
            save([row | results.here("cpu", torch.float32)], "memory", options)


if __name__ == "__main__":
    main()
