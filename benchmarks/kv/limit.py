"""A prompt of 64k tokens and 1,000 generated ones under a hard limit of bytes: what the cache holds on the way.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/limit --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/limit --quick                                                 # a minute, no weights

SmolLM2-135M reads the Debian handbook with one policy (some 20 minutes of one CPU core), and a random model of two
layers with its heads reads random tokens with every policy that can judge a chunk by itself (half a minute each). The
positions are the true ones and go far beyond the 8,192 that SmolLM2 was trained for, so the text that it writes means
nothing; bytes are what is measured. They are counted from the memory behind the tensors, each time after a layer has
taken the rows of a chunk in, which is when most is held.

Of each point: ``tokens`` seen, ``most_bytes`` held at any layer since the point before, and ``dense_bytes`` of a cache
that keeps everything. Policies that refuse have a row that says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import tokred
from benchmarks.saving import save, saving
from benchmarks.zoo import data, smollm2
from tokred import kv
from tokred.adapters.kv.layer import TokLayer
from tokred.bench import results
from tokred.kv.parts import parse_bytes

# Windows that leave the budget of a small cache to the score.
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 32},
    "pyramidkv": {"window": 32, "beta": 4},
    "adakv": {"score": kv.Window(32)},
    "criticalkv": {"score": kv.Window(32)},
    "kv": {"score": "dispersion", "sinks": 4},
}


class Run(NamedTuple):
    """What one policy is given.

    Attributes:
        model: its name in the table.
        limit: bytes, as a text.
        chunk: tokens of a forward.
        prompt, generated: tokens.
    """

    model: str
    limit: str
    chunk: int
    prompt: int
    generated: int


class Scale:
    """Weighs all layers of a cache whenever one has taken rows in."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.most = 0
        self._append = TokLayer.append

    def __enter__(self) -> Scale:
        append, scale = self._append, self

        def weighed(layer: Any, *args: Any) -> None:
            append(layer, *args)
            scale.weigh()

        TokLayer.append = weighed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        TokLayer.append = self._append  # type: ignore[method-assign]

    def weigh(self) -> int:
        """Bytes held now."""
        now = sum(layer.nbytes for layer in self.cache.layers)
        self.most = max(self.most, now)
        return now

    def reset(self) -> int:
        """The most since the last time."""
        most, self.most = self.most, 0
        return most


@torch.inference_mode()
def measure(model: Any, ids: torch.Tensor, policy: Any, run: Run, points: int = 10) -> Iterator[dict[str, Any]]:
    """Records of one policy, about ``points`` while it reads and as many while it generates."""
    name = policy.inner.name
    tokred.apply(model, policy)
    cache = tokred.kv_cache(model, prompt=run.prompt, steps=run.generated)
    config = model.config
    row = config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * 4

    where = {"model": run.model, "method": name, "setting": f"limit={parse_bytes(run.limit)} chunk={run.chunk}"}
    where |= results.here("cpu", model.dtype)

    def record(stage: str, scale: Scale) -> dict[str, Any]:
        scale.weigh()
        seen = cache.get_seq_length()
        return {"stage": stage, "tokens": seen, "most_bytes": scale.reset(), "dense_bytes": seen * row, **where}

    with Scale(cache) as scale:
        step, parts = ids[:, :0], ids[:, : run.prompt].split(run.chunk, 1)
        rare = max(1, len(parts) // points)
        for i, part in enumerate(parts, 1):
            step = model(part, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            if i % rare == 0 or i in (1, len(parts)):
                yield record("prompt", scale)
        rare = max(1, run.generated // points)
        for i in range(1, run.generated + 1):
            step = model(step, past_key_values=cache).logits.argmax(-1)
            if i % rare == 0 or i == run.generated:
                yield record("generated", scale)
    tokred.remove(model)


def policies(run: Run, names: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Name, policy and no reason, or the reason why it refuses."""
    for name in names:
        try:
            yield name, tokred.Limited(tokred.make(name, **SETTINGS.get(name, {})), run.limit, run.chunk), ""
        except ValueError as error:
            yield name, None, str(error).partition(". ")[0]


def small_model(layers: int) -> Any:
    """Random weights, with the heads of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=288,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=1 << 17,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # attention of the usual small weights is nearly even
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
    return model


def main() -> None:
    """Measure the policies that are asked for, and write the rows of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, and the small model alone")
    parser.add_argument("--models", default="small,smollm2", help="which, with a comma")
    parser.add_argument("--policies", help="names, with commas, for the small model; default: all")
    parser.add_argument("--policy", default="snapkv", help="for SmolLM2")
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--generated", type=int, default=1000)
    parser.add_argument("--limit", default="64 MiB", help="for SmolLM2, of 3 GiB; the small model gets 1/64 a layer")
    parser.add_argument("--layers", type=int, default=2, help="of the small model")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokens, generated = (2048, 40) if arguments.quick else (arguments.tokens, arguments.generated)
    known = [n for n in tokred.list_methods() if tokred.make(n).stage == "cache" and n != "limited"]
    jobs: list[tuple[Any, torch.Tensor, Run, list[str]]] = []
    wanted = ["small"] if arguments.quick else arguments.models.split(",")
    if "small" in wanted:
        limit = f"{parse_bytes(arguments.limit) * arguments.layers // 64} B"
        ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
        run = Run(f"random-{arguments.layers}-layers", limit, arguments.chunk, tokens, generated)
        names = arguments.policies.split(",") if arguments.policies else known
        jobs.append((small_model(arguments.layers), ids, run, names))
    if "smollm2" in wanted:
        model, tokenizer = smollm2.load()
        ids = tokenizer(data.handbook()[: tokens * 8], return_tensors="pt").input_ids[:, :tokens]
        run = Run("smollm2-135m", arguments.limit, arguments.chunk, ids.shape[1], generated)
        jobs.append((model, ids, run, [arguments.policy]))
    for model, ids, run, names in jobs:
        limit = parse_bytes(run.limit)
        for name, policy, why in policies(run, names):
            if policy is None:
                row = {"model": run.model, "method": name, "setting": f"chunk={run.chunk}", "refused": 1}
                save([row | results.here("cpu", model.dtype)], "limit", arguments)
                print(f"{run.model}, {why}", flush=True)
                continue
            began = time.monotonic()
            rows = list(measure(model, ids, policy, run))
            save(rows, "limit", arguments)
            most = max(row["most_bytes"] for row in rows)
            print(
                f"{run.model}, {name}: {rows[-1]['tokens']} tokens, at most {most} of {limit} bytes, "
                f"dense {rows[-1]['dense_bytes']} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            assert most <= limit, f"{name} went over the limit"


if __name__ == "__main__":
    main()
