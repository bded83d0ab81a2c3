"""Decoding over a cache that is searched against decoding over a dense one of as many rows, with random weights.

    python -m benchmarks kv/search_speed --rows 65536 --threads 1 --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/search_speed --quick

The model is a small Llama. Its caches are filled by hand, since a prompt of that length would take most of the time;
random rows choose other chunks at every token, so less is left from the token before than in a text. Arms are

- ``dense``: the unpatched model and transformers' own cache, which copies all rows to add one;
- ``in-place``: the same, but a row is added without a copy;
- each ``--store``, which searches the rows and attends to those that it finds.

All arms run in one process, in an order shuffled anew in each round; each round decodes ``--steps`` tokens from the
same state. ``ratio`` is an arm's time over that of ``dense`` in the same round, ``ratio_in_place`` over that of
``in-place``: median and quartiles over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import tokred
from benchmarks.kv.decode import random_rows, shared
from benchmarks.saving import save, saving
from tokred.adapters.kv.rope import LayerRope
from tokred.bench import results, timing
from tokred.core.settings import parse_setting
from tokred.kv import CacheSite

STORES = ("shadowkv", "shadowkv offload=False")
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 8192}


class Arm(NamedTuple):
    """One way of holding rows: ``reset`` gives the cache as it was before the first token."""

    name: str
    setting: str
    model: Any
    reset: Callable[[], Any]
    nbytes: int


class InPlace(transformers.cache_utils.DynamicLayer):  # type: ignore[misc]
    """A layer that adds rows without a copy."""

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Rows to begin with, and room for more."""
        self.lazy_initialization(keys, values)
        self._rows = [torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, values)]
        self.first(keys.shape[2])

    def first(self, count: int) -> None:
        """Show the first ``count`` rows."""
        self.keys, self.values = (x[:, :, :count] for x in self._rows)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add rows."""
        begin = self.keys.shape[2]
        for held, new in zip(self._rows, (keys, values), strict=True):
            held[:, :, begin : begin + new.shape[2]] = new
        self.first(begin + keys.shape[2])
        return self.keys, self.values


def dense(model: Any, options: argparse.Namespace, rows: int, *, in_place: bool) -> Arm:
    """The unpatched model."""
    cache = transformers.DynamicCache(config=model.config)
    made = [random_rows(model.config, options.batch, rows, model.lm_head.weight) for _ in cache.layers]
    if in_place:
        cache.layers = [InPlace() for _ in cache.layers]
        for layer, pair in zip(cache.layers, made, strict=True):
            layer.hold(*pair, options.steps)
    else:
        for layer, pair in zip(cache.layers, made, strict=True):
            layer.update(*pair)
    kept = [(layer.keys, layer.values) for layer in cache.layers]

    def reset() -> Any:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return cache

    return Arm("in-place" if in_place else "dense", "", model, reset, sum(k.nbytes + v.nbytes for k, v in kept))


def searched(text: str, model: Any, options: argparse.Namespace, rows: int) -> Arm:
    """A patched model whose cache has read a prompt of ``rows`` tokens."""
    name, given = parse_setting(text)
    patched = tokred.apply(shared(model), name, **given)
    cache = tokred.kv_cache(patched)
    like = model.lm_head.weight
    rope = LayerRope(patched.model.rotary_emb, None, (like.new_zeros(1, 1, 1), like.new_zeros(1, 1, 1)))
    for layer in cache.layers:
        k, v = random_rows(model.config, options.batch, rows, like)
        layer.append(k, v)
        layer.settle(CacheSite(k=k, v=v, rope=rope))
    kept = cache.snapshot()

    def reset() -> Any:
        cache.restore(kept)
        return cache

    return Arm(name, text.partition(" ")[2], patched, reset, cache.nbytes)


def measure(rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each arm."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": options.layers, "num_key_value_heads": options.key_heads}
    config = transformers.LlamaConfig(**shape, max_position_embeddings=2 * rows)
    model = transformers.LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()
    arms = [dense(model, options, rows, in_place=x) for x in (False, True)]
    arms += [searched(text, model, options, rows) for text in options.store or STORES]
    tokens = torch.randint(0, SHAPE["vocab_size"], (options.batch, options.steps), device=options.device)
    state: dict[str, Any] = {}

    @contextlib.contextmanager
    def enter(arm: Arm) -> Iterator[None]:
        state["model"], state["cache"] = arm.model, arm.reset()
        yield

    def run(_: int) -> None:
        for i in range(options.steps):
            state["model"](tokens[:, i : i + 1], past_key_values=state["cache"])

    seconds = timing.paired(
        [lambda arm=arm: enter(arm) for arm in arms], run, options.rounds, device=options.device, warmup=1
    )
    where = {"model": "llama-512", "rows": rows, "batch": options.batch, "depth": options.layers}
    where |= {"moments": options.steps, "weights": "random", "rounds": options.rounds}
    where |= results.here(options.device, options.dtype)
    table = []
    for arm, times in zip(arms, seconds, strict=True):
        row: dict[str, Any] = {"method": arm.name, "setting": arm.setting, **where, "bytes": arm.nbytes}
        row |= results.spread("ms_a_token", [t / options.steps * 1e3 for t in times])
        row |= results.spread("ratio", [t / base for t, base in zip(times, seconds[0], strict=True)])
        row |= results.spread("ratio_in_place", [t / base for t, base in zip(times, seconds[1], strict=True)])
        table.append(row)
        print(
            f"{rows:>6} rows {arm.name:<12}{arm.setting:<20}{arm.nbytes / 2**20:8.1f} MiB {row['ms_a_token']:9.2f} ms"
            f" {row['ratio']:.3f} of dense [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            f" {row['ratio_in_place']:.3f} of in-place",
            flush=True,
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", help='such as "shadowkv budget=1024"; as often as needed')
    parser.add_argument("--rows", default="65536", help="rows of a head, with commas")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8, help="key/value heads, of 8 query heads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="two layers, 4,096 rows, two rounds of two tokens")
    saving(parser)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.layers, options.rounds, options.steps = "4096", 2, 2, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        for count in options.rows.split(","):
            save(measure(int(count), options), "search_speed", options)


if __name__ == "__main__":
    main()
