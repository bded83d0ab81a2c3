"""A policy's own time: tokens over codes, over rows that change at every step, over rows that are searched, prompts.

    python -m benchmarks kv/steps --threads 1 --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/steps --part evicting --clock cpu
    python -m benchmarks kv/steps --quick

Models have random weights, on which time does not depend. Each part has a size and arms of its own:

======== ==============================================================================================================
packed   a token over rows in a format's codes, beside one over as many rows in the model's type: bfloat16, or, where it
         multiplies faster, ``--dtype float32``
evicting a token over a cache that lets a row go for each that comes, beside a dense one of as many rows; ``snapkv`` is
         idle there: it has cut its prompt, and is asked nothing more
searched a token over rows of which few are looked up, beside one over all of them
prompt   the forward of a whole prompt, and what a policy does at its end
======== ==============================================================================================================

``unpatched`` is the model with transformers' own cache, which copies all rows to add one; ``in-place`` the same model
with a cache that does not. Caches are filled by hand, and hold as many rows in every arm of a size.

All arms run in one process, in an order shuffled anew in each round; each round runs the same steps from the same
state. ``ratio`` is an arm's time over that of ``unpatched`` in the same round, ``ratio_in_place`` over that of
``in-place``: median and quartiles over rounds. ``--clock cpu`` counts the seconds of this process instead of those on
the wall, for machines that others use too, where both mean the same with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers

import tokred
from benchmarks.kv import search_speed
from benchmarks.kv.decode import CLOCKS, GEOMETRIES, random_rows, shared
from benchmarks.kv.search_speed import Arm
from benchmarks.saving import save, saving
from tokred.bench import results, timing
from tokred.bench.arms import BASE
from tokred.core.settings import parse_setting

SHAPES: dict[str, dict[str, Any]] = {
    **GEOMETRIES,
    "llama-512": {**search_speed.SHAPE, "num_hidden_layers": 8, "num_key_value_heads": 8},
}
QUICK = 96  # rows, or tokens


class Part(NamedTuple):
    """What is measured together.

    Attributes:
        models: of :data:`SHAPES`.
        dtype: of the models.
        sizes: rows of a cache, or tokens of a prompt.
        arms: policies as text, ``{rows}`` in the place of the size.
        steps: tokens of a round; 0: a round is a prompt.
        rounds: how many.
    """

    models: tuple[str, ...]
    dtype: str
    sizes: tuple[int, ...]
    arms: tuple[str, ...]
    steps: int
    rounds: int


PARTS = {
    "packed": Part(
        ("llama-3.2-1b", "smollm2-135m"), "bfloat16", (8192, 32768),
        ("kivi bits=4", "kivi bits=2", "turbo bits=4", "turbo bits=3", "turbo bits=2", "nsnquant", "mustafar", "mikv"),
        8, 15,
    ),
    "evicting": Part(
        ("llama-512", "smollm2-135m"), "float32", (256, 1024, 4096),
        ("snapkv budget={rows} window=32", "streaming_llm budget={rows}", "h2o budget={rows}"), 32, 15,
    ),
    "searched": Part(("llama-512",), "float32", (65536,), search_speed.STORES, 4, 9),
    "prompt": Part(
        ("llama-512",), "float32", (4096,),
        ("snapkv budget=0.25", "expected_attention budget=0.25", "h2o budget=0.25"), 0, 9,
    ),
}  # fmt: skip


def build(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights."""
    shape = {**SHAPES[name], "max_position_embeddings": 131072}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(device, dtype).eval()


def filled(text: str, model: Any, options: argparse.Namespace, rows: int) -> Arm:
    """A patched model whose cache has read a prompt of ``rows`` tokens.

    All rows but the last are filled in; the last comes by a forward, with which the prompt ends for the policy too.
    """
    name, given = parse_setting(text)
    patched = tokred.apply(shared(model), name, **given)
    cache = tokred.kv_cache(patched)
    for layer in cache.layers:
        layer.append(*random_rows(model.config, options.batch, rows - 1, model.lm_head.weight))
    patched(torch.full((options.batch, 1), 3, device=options.device), **tokred.cache_kwargs(cache))
    kept = cache.snapshot()

    def reset() -> Any:
        cache.restore(kept)
        return cache

    return Arm(name, text.partition(" ")[2], patched, reset, cache.nbytes)


def whole(text: str, model: Any) -> Arm:
    """A model that reads a prompt: patched, or as it is where ``text`` is empty."""
    if not text:
        return Arm(BASE, "", model, lambda: transformers.DynamicCache(config=model.config), 0)
    name, given = parse_setting(text)
    patched = tokred.apply(shared(model), name, **given)
    return Arm(name, text.partition(" ")[2], patched, lambda: tokred.kv_cache(patched), 0)


def arms(name: str, part: Part, model: Any, options: argparse.Namespace, size: int) -> list[Arm]:
    """All arms of a size, ``unpatched`` first and ``in-place`` second where tokens are decoded."""
    named = [text.format(rows=size) for text in options.arm or part.arms]
    if not part.steps:
        return [whole(text, model) for text in ("", *named)]
    make = search_speed.searched if name == "searched" else filled
    plain = [search_speed.dense(model, options, size, in_place=x) for x in (False, True)]
    return [plain[0]._replace(name=BASE), plain[1], *(make(text, model, options, size) for text in named)]


def measure(name: str, part: Part, which: str, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each arm."""
    dtype = options.dtype or part.dtype
    model = build(which, options.layers, getattr(torch, dtype), options.device)
    options.steps, rounds = part.steps, options.rounds or part.rounds
    found = arms(name, part, model, options, size)
    length = part.steps or size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPES[which]["vocab_size"], (options.batch, length), generator=generator).to(options.device)
    state: dict[str, Any] = {}

    @contextlib.contextmanager
    def enter(arm: Arm) -> Iterator[None]:
        state.update(model=arm.model, cache=arm.reset())
        yield
        state.clear()

    def run(_: int) -> None:
        taken = 1 if part.steps else length
        for i in range(0, length, taken):
            # Only the newest token's logits are wanted of a prompt, as when it is generated after.
            state["model"](ids[:, i : i + taken], **tokred.cache_kwargs(state["cache"]), logits_to_keep=1)

    entered: list[Callable[[], Any]] = [partial(enter, arm) for arm in found]
    seconds = timing.paired(entered, run, rounds, device=options.device, warmup=1, clock=CLOCKS[options.clock])
    where: dict[str, Any] = {"model": which, "case": name, "batch": options.batch, "weights": "random"}
    where |= {"rows": size, "moments": part.steps} if part.steps else {"tokens": size}
    where |= {"depth": model.config.num_hidden_layers, "clock": options.clock, "rounds": rounds}
    where |= results.here(options.device, dtype)
    table = []
    for arm, times in zip(found, seconds, strict=True):
        row: dict[str, Any] = {"method": arm.name, "setting": arm.setting, **where}
        if part.steps:
            row |= {"bytes": arm.nbytes, **results.spread("ms_a_token", [t / part.steps * 1e3 for t in times])}
            row |= results.spread("ratio_in_place", [t / base for t, base in zip(times, seconds[1], strict=True)])
        else:
            row |= results.spread("prefill_ms", [t * 1e3 for t in times])
        row |= results.spread("ratio", [t / base for t, base in zip(times, seconds[0], strict=True)])
        table.append(row)
        print(_line(row, size), flush=True)
    return table


def _line(row: dict[str, Any], size: int) -> str:
    ms = row.get("ms_a_token", row.get("prefill_ms"))
    text = f"{row['case']:<9}{row['model']:<13}{size:>6} {row['method']:<19}{row['setting']:<30}{ms:9.2f} ms"
    text += f" {row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}] of unpatched"
    return text + (f", {row['ratio_in_place']:.3f} of in-place" if "ratio_in_place" in row else "")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="as often as needed; default: all")
    parser.add_argument("--model", action="append", choices=tuple(SHAPES), help="instead of the part's")
    parser.add_argument("--arm", action="append", help='instead of the part\'s, such as "h2o budget={rows}"')
    parser.add_argument("--sizes", help="rows or tokens, with commas, instead of the part's")
    parser.add_argument("--layers", type=int, help="instead of the model's own; llama-3.2-1b has four here")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="instead of the part's")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="instead of the part's")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="one model, two layers, short, two rounds of two tokens")
    saving(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.layers, options.rounds, options.model = 2, 2, ["llama-512"]
        options.sizes = options.sizes or str(QUICK)
    with torch.inference_mode():
        for name in options.part or PARTS:
            part = PARTS[name]
            if options.quick:
                part = part._replace(steps=min(part.steps, 2))
            sizes = part.sizes if options.sizes is None else tuple(map(int, options.sizes.split(",")))
            for which in options.model or part.models:
                for size in sizes:
                    save(measure(name, part, which, size, options), "steps", options)


if __name__ == "__main__":
    main()
