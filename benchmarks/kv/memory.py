"""Memory that scoring and compressing one layer's cache takes, for every cache policy, by the length of the prompt.

    python -m benchmarks kv/memory --out benchmarks/results/kv_memory.csv --plot docs/img/kv_memory.png
    python -m benchmarks kv/memory --plot docs/img/kv_memory.png --from benchmarks/results/kv_memory.csv

A score that held the attention of every query to every key would need N x N numbers a head. Here a model of one layer
with random weights reads a prompt, and torch's profiler writes down every allocation, those inside operators among
them. ``extra_bytes`` is how far the memory in use rises above where it stood when the policy began, until it is done:
scores, choices, and the rows that are kept beside those that are not gone yet. The model's own work is left out, but
for KVzip, whose scores need more of it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import tokred
from tokred.adapters.kv import hooks
from tokred.bench import results as outputs
from tokred.core import environment
from tokred.kv.engine import Engine

LENGTHS = (4096, 8192, 16384)
HEADS, KEY_HEADS, CHANNELS = 4, 2, 32
SPAN = "tokred: policy"
LAYERS = {"fastkv": 2}  # of the model; others take one
# Where the defaults would keep everything, or do not fit every length.
SETTINGS: dict[str, dict[str, Any]] = {
    "duoattention": {"gates": ((0.9, 0.1),)},
    "limited": {"policy": "keydiff", "limit": "1 MiB", "chunk": 512},
}


def policies() -> list[str]:
    """Names of all policies that are registered."""
    return [name for name in tokred.list_methods() if tokred.make(name).stage == "cache"]


@functools.cache
def build(layers: int) -> Any:
    """A model of one layer, or a few."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=HEADS * CHANNELS, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Write down when the policy is at work."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(SPAN):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for owner, name in ((Engine, "observe"), (Engine, "finish"), (hooks, "repeat")):
            stack.enter_context(mock.patch.object(owner, name, mark(getattr(owner, name))))
        yield


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


def feed(model: Any, name: str, ids: Tensor) -> Any:
    """Read the prompt as the policy wants it; returns the cache."""
    cache = tokred.kv_cache(model)
    parts = [ids]
    if name == "rpc":
        parts = [ids[:, :1], ids[:, 1:]]  # it judges generated rows: all but the first
    elif name == "limited":
        parts = list(ids.split(SETTINGS["limited"]["chunk"], 1))
    for part in parts:
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def measure(name: str, n: int, **settings: Any) -> dict[str, Any]:
    """One row of the CSV; ``settings`` of the policy, on top of those that all lengths have."""
    model, settings = build(LAYERS.get(name, 1)), {**SETTINGS.get(name, {}), **settings}
    ids = torch.randint(0, 64, (1, n), generator=torch.Generator().manual_seed(n))
    # The profiler loses events now and then, which makes a peak too small, never too large: the largest, seen twice.
    seen: list[int] = []
    while seen.count(max(seen, default=0)) < 2 or not max(seen):
        if len(seen) == 8:
            raise RuntimeError(f"the profiler saw {seen} bytes of {name} at {n} tokens, no peak twice")
        with tokred.applied(model, name, **settings), torch.inference_mode(), marked():
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                cache = feed(model, name, ids)
            layer = cache.layer_rows()[0]
        assert profile.kineto_results is not None  # it has just run
        seen.append(peak(profile.kineto_results.events()))
    extra = max(seen)
    row = {"policy": name, "tokens": n, "extra_bytes": extra, "bytes_a_token": round(extra / n, 1), "rows": layer.rows}
    row |= {"held_bytes": layer.bytes, "dense_bytes": layer.dense_bytes, "matrix_bytes": HEADS * n * n * 4}
    return row | {"heads": HEADS, "key_heads": KEY_HEADS, "channels": CHANNELS, "dtype": "float32"}


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Extra memory over the length, a line a policy, beside the matrix that nobody makes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5))
    names = sorted({r["policy"] for r in rows}, key=lambda p: -max(_points(rows, p, "extra_bytes"))[1])
    colours = plt.get_cmap("tab20")
    for i, name in enumerate(names):
        style = "-" if i < 20 else "--"
        axes.plot(
            *zip(*_points(rows, name, "extra_bytes"), strict=True),
            marker="o", markersize=3, linewidth=1, linestyle=style, color=colours(i % 20), label=name,
        )  # fmt: skip
    for key, label, style in (
        ("matrix_bytes", f"N x N numbers, {HEADS} heads", ":"),
        ("dense_bytes", "keys and values of the prompt", "-."),
    ):
        axes.plot(
            *zip(*_points(rows, names[0], key), strict=True), color="black", linestyle=style, linewidth=1, label=label
        )
    lengths = sorted({int(r["tokens"]) for r in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="MiB above the memory in use before")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_title("Scoring and compressing the cache of one layer")
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _points(rows: list[dict[str, Any]], name: str, key: str) -> list[tuple[int, float]]:
    return sorted((int(r["tokens"]), float(r[key]) / 2**20) for r in rows if r["policy"] == name)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", help="names, with commas; default: all")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, with commas")
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--plot", type=Path, help="a picture")
    parser.add_argument("--from", dest="source", type=Path, help="draw the picture from this CSV file; measure nothing")
    options = parser.parse_args()
    if options.source is not None:
        with options.source.open(newline="", encoding="utf8") as f:
            print(plot(list(csv.DictReader(f)), options.plot))
        return
    torch.set_num_threads(1)
    where = environment.describe("cpu")
    rows: list[dict[str, Any]] = []
    for n in sorted(int(part) for part in options.lengths.split(",")):
        for name in options.policies.split(",") if options.policies else policies():
            row = measure(name, n)
            rows.append(row | where)
            print(
                f"{name:<20} {n:>6} tokens {row['extra_bytes'] / 2**20:8.2f} MiB extra, {row['bytes_a_token']:8.1f} "
                f"bytes a token, {row['rows']} rows left",
                flush=True,
            )
        if options.out is not None:
            outputs.write_rows(options.out, rows)
    if options.plot is not None:
        print(plot(rows, options.plot))


if __name__ == "__main__":
    main()
