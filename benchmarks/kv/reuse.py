"""Time to the first token over texts that were computed before, and whether what stands in them is still found.

    python -m benchmarks.zoo.fetch smollm2 handbook devil
    python -m benchmarks kv/reuse --threads 1 --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/reuse --quick

A context is eight chunks of prose, each with a number hidden in it, and a question. ``dense`` computes all of it. The
others join chunks that were computed apart (``tokred.blend``), compute a share of them again, and then the question;
``recompute=0`` computes nothing again. Computing the chunks for the first time is not counted: that they have been is
the point.

All arms run in one process, in an order shuffled anew for every context. ``ratio`` is an arm's time over that of
``dense`` on the same context: median and quartiles over contexts. ``keys`` is the share of numbers whose every token is
the likeliest when all eight are asked for, one after another, each with the right answer before the next.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.kv.texts import NAMES, Maker, Sample
from benchmarks.saving import save, saving
from tokred.bench import results, timing

CHUNKS = 8
SHARES = (0.0, 0.05, 0.15, 0.3, 1.0)


class Context(NamedTuple):
    """Chunks ``(n,)`` of token ids, and eight questions with their answers behind them."""

    chunks: list[Tensor]
    asked: Sample

    @property
    def ids(self) -> Tensor:
        """``(1, N)`` of all chunks."""
        return torch.cat(self.chunks)[None]

    @property
    def question(self) -> Tensor:
        """``(1, M)`` of the first question."""
        return self.asked.follows[None, : self.asked.question]


def contexts(maker: Maker, count: int, length: int) -> list[Context]:
    """``count`` contexts of chunks of ``length`` tokens."""
    found = []
    for index in range(count):
        rng = random.Random(f"reuse {index} {length}")
        names = rng.sample(NAMES, CHUNKS)
        things = {name: str(rng.randrange(10000, 100000)) for name in names}
        chunks = []
        for name, number in things.items():
            key = maker.ids(f" The magic number of the {name} is {number}. Remember: {number}.")
            straw = maker.stretch(maker.prose[:1], 0, rng, length - len(key))
            cut = rng.randrange(len(straw) // 8, len(straw))
            chunks.append(torch.cat([straw[:cut], key, straw[cut:]]))
        order = rng.sample(names, CHUNKS)
        pairs = [
            (f" What is the magic number of the {n}? The magic number of the {n} is", f" {things[n]}") for n in order
        ]
        found.append(Context(chunks, maker.asked("several", chunks[0], pairs, ".\n")))
    return found


class Run:
    """One context after another, by any arm.

    Args:
        model: without a patch.
        given: contexts.
    """

    def __init__(self, model: Any, given: list[Context]) -> None:
        self.model, self.given = model, given
        store = tokred.ChunkStore(model)
        self.chunks = [[store.add(chunk) for chunk in context.chunks] for context in given]
        self.nbytes = sum(chunk.nbytes for chunk in self.chunks[0])
        self.share: float | None = None

    @contextlib.contextmanager
    def arm(self, share: float | None) -> Iterator[None]:
        """The state that is timed: a share that is computed again, or None, which computes all at once."""
        self.share = share
        yield

    def filled(self, index: int) -> Any:
        """A cache of a context's chunks, or None."""
        if self.share is None:
            return None
        return tokred.blend(self.model, self.chunks[index], recompute=self.share).cache

    def first(self, index: int) -> Any:
        """Up to the first token of the answer."""
        context, cache = self.given[index], self.filled(index)
        ids = context.question if cache is not None else torch.cat([context.ids, context.question], 1)
        given = {} if cache is None else tokred.cache_kwargs(cache)
        return self.model(ids.to(self.model.device), use_cache=True, logits_to_keep=1, **given).logits.argmax(-1)

    def keys(self, index: int) -> int:
        """Numbers that are found."""
        context, cache = self.given[index], self.filled(index)
        asked = context.asked.follows[None]
        ids = asked if cache is not None else torch.cat([context.ids, asked], 1)
        given = {} if cache is None else tokred.cache_kwargs(cache)
        keep = asked.shape[1] + 1
        logits = self.model(ids.to(self.model.device), use_cache=True, logits_to_keep=keep, **given).logits[0].cpu()
        right = logits[-asked.shape[1] : -1].argmax(-1) == asked[0, 1:]
        return sum(bool(right[start - 1 : end - 1].all()) for start, end in context.asked.answers)


def measure(model: Any, maker: Maker, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each arm."""
    given = contexts(maker, options.contexts, length)
    run = Run(model, given)
    arms: list[float | None] = [None, *options.shares]
    seconds = timing.paired(
        [lambda share=share: run.arm(share) for share in arms], run.first, len(given), device=options.device, warmup=1
    )
    tokens = given[0].ids.shape[1]
    where = {"model": options.name, "tokens": tokens, "chunks": CHUNKS, "rounds": len(given)}
    where |= results.here(options.device, options.dtype)
    table = []
    for share, times in zip(arms, seconds, strict=True):
        with torch.inference_mode(), run.arm(share):
            right = sum(run.keys(i) for i in range(len(given)))
        name, setting = ("dense", "") if share is None else ("blend", f"recompute={share:g}")
        row: dict[str, Any] = {"method": name, "setting": setting, **where}
        row |= results.spread("ms_to_first_token", [1e3 * t for t in times])
        row |= results.spread("ratio", [t / base for t, base in zip(times, seconds[0], strict=True)])
        row |= results.share("keys", right, CHUNKS * len(given))
        table.append(row)
        print(
            f"{tokens:>6} tokens {name:<6}{setting:<16}{row['ms_to_first_token']:9.1f} ms to the first token "
            f"{row['ratio']:.3f} of dense [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}] keys {row['keys']:.2f}",
            flush=True,
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", default="128,448", help="tokens of a chunk, with commas")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="that are computed again, with commas")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="two contexts of short chunks")
    saving(parser)
    options = parser.parse_args()
    if options.quick:
        options.length, options.contexts = "64", 2
    if options.threads:
        torch.set_num_threads(options.threads)
    from benchmarks.zoo import smollm2

    options.name = "smollm2-135m"
    options.shares = [float(share) for share in options.shares.split(",")]
    model, tokenizer = smollm2.load(getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    maker = Maker(tokenizer)
    for length in options.length.split(","):
        save(measure(model, maker, int(length), options), "reuse", options)


if __name__ == "__main__":
    main()
