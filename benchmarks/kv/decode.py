"""Decoding over a compressed cache against decoding over a dense one of as many rows, with random weights.

    python -m benchmarks kv/decode --threads 1 --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/decode --quick

A policy is worth its memory only if a token over ``K`` rows that are left costs no more than one over ``K`` rows that
were never more. Time does not depend on the weights, nor on which rows are left, so the caches are filled by hand:

- ``dense``: the unpatched model and transformers' own cache of ``K`` rows;
- ``even``: a patched model, half of ``2 K`` tokens evicted, the same number of rows in every head;
- ``rectangle`` and ``flat``: as many rows on average, but heads hold from a quarter of the mean to the rest of it.

All arms run in one process, in an order shuffled anew in each round; each round decodes ``--steps`` tokens from the
same state. ``ratio`` is an arm's time over that of ``dense`` in the same round: median and quartiles over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from tokred.bench import results, timing
from tokred.core.reduction import Reduction

# Shapes of the published models; the second with few of its 16 layers and a small vocabulary, which are alike anyway.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192,
    },
}  # fmt: skip
ROWS = (512, 2048, 8192)
# By the name of an option: seconds on the wall, or of this process alone.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Holding(NamedTuple):
    """One way of holding rows: ``reset`` gives the cache as it was before the first token."""

    name: str
    model: Any
    reset: Callable[[], Any]
    nbytes: int


def build(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights."""
    shape = {**GEOMETRIES[name], "max_position_embeddings": 131072}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(device, dtype).eval()


def shared(model: Any) -> Any:
    """A copy that has the same weights."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def lengths(heads: int, rows: int) -> list[int]:
    """Rows of each head, from a quarter of the mean up, ``rows`` on average."""
    if heads == 1:
        return [rows]
    slope = [0.25 + 1.5 * i / (heads - 1) for i in range(heads)]
    found = [int(rows * s) for s in slope]
    found[-1] += rows * heads - sum(found)
    return found


def random_rows(config: Any, batch: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer."""
    shape = (batch, config.num_key_value_heads, count, config.head_dim)
    return torch.randn(shape, dtype=like.dtype, device=like.device), torch.randn(
        shape, dtype=like.dtype, device=like.device
    )


def dense(model: Any, batch: int, rows: int) -> Holding:
    """The unpatched model."""
    cache = transformers.DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.update(*random_rows(model.config, batch, rows, model.lm_head.weight))
    kept = [(layer.keys, layer.values) for layer in cache.layers]

    def reset() -> Any:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return cache

    return Holding("dense", model, reset, sum(k.nbytes + v.nbytes for k, v in kept))


def compressed(model: Any, batch: int, rows: int, layout: str, counts: list[int], name: str) -> Holding:
    """A patched model whose cache has seen ``2 * rows`` tokens, or as many as its longest head holds."""
    cache = tokred.kv_cache(model, layout=layout)
    seen = max(2 * rows, *counts)
    for layer in cache.layers:
        layer.append(*random_rows(model.config, batch, seen, model.lm_head.weight))
        device = layer.newest[0].device
        shape = (batch, len(counts), max(counts))
        index = torch.arange(seen - max(counts), seen, device=device).expand(shape).contiguous()
        meant = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        mask = None if len(set(counts)) == 1 else meant.expand(shape)
        layer.apply(Reduction.keep(index, seen, mask), "max")
        layer.clock.prompt, layer.clock.lengths = seen, (seen,) * batch
    kept = cache.snapshot()

    def reset() -> Any:
        cache.restore(kept)
        return cache

    return Holding(name, model, reset, cache.nbytes)


def arms(model: Any, batch: int, rows: int) -> Iterator[Holding]:
    """All ways, ``dense`` first."""
    patched = tokred.apply(shared(model), "snapkv", budget=rows, window=32)
    heads = model.config.num_key_value_heads
    yield dense(model, batch, rows)
    yield compressed(patched, batch, rows, "rectangle", [rows] * heads, "even")
    for layout in ("rectangle", "flat"):
        yield compressed(patched, batch, rows, layout, lengths(heads, rows), layout)


def measure(name: str, rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each way."""
    dtype = getattr(torch, options.dtype)
    model = build(name, options.layers, dtype, options.device)
    with torch.inference_mode():
        found = list(arms(model, options.batch, rows))
    state: dict[str, Any] = {}

    @contextlib.contextmanager
    def enter(arm: Holding) -> Iterator[None]:
        state["model"], state["cache"] = arm.model, arm.reset()
        yield

    def run(_: int) -> None:
        token = torch.full((options.batch, 1), 3, device=options.device)
        for _ in range(options.steps):
            token = state["model"](token, past_key_values=state["cache"]).logits[:, -1:].argmax(-1)

    seconds = timing.paired(
        [lambda arm=arm: enter(arm) for arm in found], run, options.rounds, device=options.device, warmup=1
    )
    where = {"model": name, "rows": rows, "batch": options.batch, "depth": model.config.num_hidden_layers}
    where |= {"moments": options.steps, "weights": "random", "rounds": options.rounds}
    where |= results.here(options.device, options.dtype)
    table = []
    for arm, times in zip(found, seconds, strict=True):
        row: dict[str, Any] = {"method": arm.name, "setting": "", **where, "bytes": arm.nbytes}
        row |= results.spread("ms_a_token", [t / options.steps * 1e3 for t in times])
        row |= results.spread("ratio", [t / base for t, base in zip(times, seconds[0], strict=True)])
        table.append(row)
        print(
            f"{name:<14} {rows:>6} rows {arm.name:<9}{arm.nbytes / 2**20:8.1f} MiB {row['ms_a_token']:8.2f} ms a token"
            f" {row['ratio']:.3f} of dense [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
            flush=True,
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(GEOMETRIES), help="as often as needed; default: all")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of the caches, with commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, help="instead of the geometry's own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="two layers, 128 rows, two rounds of two tokens")
    saving(parser)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rows, options.rounds, options.steps = 2, "128", 2, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.model or GEOMETRIES:
        for count in options.rows.split(","):
            save(measure(name, int(count), options), "decode", options)


if __name__ == "__main__":
    main()
