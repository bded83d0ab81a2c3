"""Perplexity along a text that is longer than the model was made for: dense, and in windows of two kinds of positions.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/long --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/long --quick                                             # 512 tokens of a random model

SmolLM2-135M, made for 8,192 positions, reads the Debian handbook, 32 tokens at a time, and says each token from those
before it. ``unpatched`` keeps all of them; ``streaming_llm`` holds the first four tokens and the newest, with the
positions of the text (``positions=text``) or those inside the cache (``positions=cache``). Of each stretch there is a
row: ``perplexity`` of its tokens, and ``tokens`` read at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from benchmarks.kv.tasks import named_ends
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, data, smollm2
from tokred.bench import results
from tokred.bench.arms import BASE
from tokred.bench.intervals import estimate


def settings(budget: int) -> list[str]:
    """Methods that take part, the last one none."""
    return [f"streaming_llm budget={budget} positions={one}" for one in ("cache", "text")] + [""]


@torch.inference_mode()
def losses(model: Any, ids: Tensor, method: str, chunk: int) -> Iterator[Tensor]:
    """Losses of the tokens behind the first of ``(1, N)``, a chunk at a time."""
    from transformers import DynamicCache

    with tokred.applied(model, method) if method else contextlib.nullcontext():
        cache = tokred.kv_cache(model) if method else DynamicCache()
        for start in range(0, ids.shape[1] - 1, chunk):
            logits = model(ids[:, start : start + chunk], **tokred.cache_kwargs(cache)).logits[0].float()
            goal = ids[0, start + 1 : start + 1 + len(logits)]
            yield F.cross_entropy(logits[: len(goal)], goal, reduction="none")


def measure(model: Any, name: str, ids: Tensor, method: str, stretch: int, chunk: int) -> Iterator[dict[str, Any]]:
    """Records of one setting, one for each stretch of so many tokens."""
    found, read = list[Tensor](), 0
    for loss in losses(model, ids, method, chunk):
        found.append(loss)
        read += len(loss)
        if read % stretch < len(loss) or read + 1 == ids.shape[1]:
            every = torch.cat(found)
            around = estimate(every.tolist(), [1.0] * len(every)).map(math.exp)
            row: dict[str, Any] = {"model": name, "method": method.split()[0] if method else BASE}
            row |= {"setting": method.partition(" ")[2], "tokens": read + 1}
            row |= named_ends("perplexity", around)
            yield row | {"tokens_scored": len(every), **results.here("cpu", model.dtype)}
            found = []


def main() -> None:
    """All settings, one after the other; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 14)
    parser.add_argument("--budget", type=int, default=512, help="rows that the window and the first four have")
    parser.add_argument("--stretch", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--chunk", type=int, default=32, help="tokens of a forward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="512 tokens of a random model")
    saving(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        from tokred.adapters.tiny import kv as tiny

        given.tokens, given.budget, given.stretch = 512, 64, 128
        model, name, ids = tiny.build("llama"), "tiny-llama", tiny.prompt(given.tokens)
        cited = ""
    else:
        model, tokenizer = smollm2.load()
        ids = tokenizer(data.handbook()[: given.tokens * 8], return_tensors="pt").input_ids[:, : given.tokens]
        name, cited = "smollm2-135m", f" {carriers.cited('smollm2', 'handbook')}"
    for method in settings(given.budget):
        began = time.perf_counter()
        for row in measure(model, name, ids, method, given.stretch, given.chunk if method else 16 * given.chunk):
            row["versions"] += cited
            save([row], "long", given)
            spent = time.perf_counter() - began
            print(f"{method or BASE:44} {row['tokens']:6} tokens  {row['perplexity']:8.2f}  {spent:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
