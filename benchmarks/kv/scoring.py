"""What a cache policy costs at the end of a prompt, as a share of the prompt's own time.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/scoring --threads 1 --out benchmarks/results/kv_scoring.csv

Some layers of SmolLM2-135M read the Debian handbook. In every round the unpatched model reads it again, and every
policy gets the tensors of its attention, as after a prompt that was read under it. Timers stand around what the policy
does: ``score`` (observing and scoring), ``select`` (budget and choice of rows), ``evict`` (copying what stays);
``policy_ms`` is all of them, ``share`` that of the prompt in the same round, without the model's head. Policies that
read the attention of all queries (h2o, observed_attention, keyformer, zeromerge) look at every pair once more, and cost
that. Medians over rounds, policies in another order each. ``--cpu-time`` counts the time of this process instead of the
clock's, for a machine that others use: with one thread it is about the time on an idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tokred
from benchmarks.kv import prompt as kv_prompt
from benchmarks.zoo import data, smollm2
from tokred.adapters.kv.layer import TokLayer
from tokred.bench import results as outputs
from tokred.core import environment
from tokred.kv.engine import Engine
from tokred.kv.policy import CachePolicy

COLUMNS = (
    "policy", "tokens", "layers", "budget", "prefill_ms", "policy_ms", "score_ms", "select_ms", "evict_ms", "share",
    "rounds", "threads", "device",
)  # fmt: skip
POLICIES = (
    "snapkv", "snapkv window=32", "pyramidkv", "adakv", "criticalkv", "cake", "tova", "knorm", "keydiff", "lagkv",
    "expected_attention", "streaming_llm", "squeezeattention", "random_evict", "h2o", "observed_attention",
    "zeromerge", "keyformer",
)  # fmt: skip


class Watch:
    """Adds up the time inside some functions, what they call among it."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.spent: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.clock()

    @contextlib.contextmanager
    def around(self, cls: type, name: str, label: str) -> Iterator[None]:
        """Time every call of a method while the context lasts."""
        original: Callable[..., Any] = getattr(cls, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            found = original(*args, **kwargs)
            self.spent[label] = self.spent.get(label, 0.0) + self.now() - start
            return found

        setattr(cls, name, timed)
        try:
            yield
        finally:
            setattr(cls, name, original)


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


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, watch: Watch) -> float:
    """Milliseconds of a prompt, without the model's head."""
    start = watch.now()
    model.model(ids, use_cache=True)
    return (watch.now() - start) * 1000


def made(name: str, budget: float) -> Any:
    """A policy by its name, and an option of it after a space."""
    name, _, option = name.partition(" ")
    key, _, value = option.partition("=")
    return tokred.make(name, budget=budget, **({key: int(value)} if option else {}))


def measure(model: Any, ids: torch.Tensor, names: list[str], budget: float, rounds: int, watch: Watch) -> list[dict]:
    """Rows of the CSV."""
    dense: list[float] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    prompt, _ = kv_prompt.read(model, ids)
    with contextlib.ExitStack() as timers:
        timers.enter_context(watch.around(Engine, "observe", "all"))
        timers.enter_context(watch.around(Engine, "finish", "all"))
        timers.enter_context(watch.around(CachePolicy, "shrink", "select"))
        timers.enter_context(watch.around(TokLayer, "apply", "evict"))
        for i in range(rounds):
            dense.append(prefill(model, ids, watch))
            order = random.Random(i).sample(names, len(names))
            for name in order:
                with tokred.applied(model, made(name, budget)), torch.inference_mode():
                    cache = tokred.kv_cache(model)
                    watch.spent = {}
                    prompt.fill(cache)
                    prompt.forget()
                spent = {k: 1000 * v for k, v in watch.spent.items()}
                spent["score"] = spent["all"] - spent.get("select", 0.0) - spent.get("evict", 0.0)
                spent["share"] = spent["all"] / dense[-1]
                found[name].append(spent)
    rows = []
    for name in names:
        middle = {k: statistics.median(r.get(k, 0.0) for r in found[name]) for k in
                  ("all", "score", "select", "evict", "share")}  # fmt: skip
        rows.append({
            "policy": name, "tokens": ids.shape[1], "layers": model.config.num_hidden_layers, "budget": budget,
            "prefill_ms": f"{statistics.median(dense):.1f}", "policy_ms": f"{middle['all']:.2f}",
            "score_ms": f"{middle['score']:.2f}", "select_ms": f"{middle['select']:.2f}",
            "evict_ms": f"{middle['evict']:.2f}", "share": f"{middle['share']:.5f}", "rounds": rounds,
            "threads": torch.get_num_threads(), "device": watch.device,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file, written anew")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where others use the machine")
    arguments = parser.parse_args()
    names = arguments.policies.split(",")
    unknown = [n for n in names if n not in POLICIES]
    if unknown:
        parser.error(f"unknown policies: {', '.join(unknown)}; known are {', '.join(POLICIES)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = smollm2.load()
    shorten(model, arguments.layers).to(arguments.device)
    text = data.handbook()[: arguments.tokens * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens].to(arguments.device)
    watch = Watch(arguments.device, time.process_time if arguments.cpu_time else time.perf_counter)
    rows = measure(model, ids, names, arguments.budget, arguments.rounds, watch)
    for row in rows:
        print(*(f"{k}={v}" for k, v in row.items()))
    print(f"torch {torch.__version__}, transformers {environment.version('transformers')}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        outputs.write_rows(arguments.out, [{c: row.get(c) for c in COLUMNS} for row in rows])


if __name__ == "__main__":
    main()
