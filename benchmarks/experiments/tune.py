"""``tokred.tune`` against the best constant schedule at equal measured time, on samples that were held out.

    python -m benchmarks.zoo.fetch dinov2 smollm2 handbook fashion
    python -m benchmarks experiments/tune --only embedded --out benchmarks/results/tune.csv
    python -m benchmarks experiments/tune --only dinov2 smollm2 --seeds 0 1 2 --out benchmarks/results/tune.csv
    python -m benchmarks experiments/tune --plots docs/img --out benchmarks/results/tune.csv

Three models, a division of the samples and a search for each seed:

- ``embedded``: top-1 on Fashion-MNIST's test images, or the logits' cosine with the unpatched model's;
- ``dinov2``: DINOv2-S, cosine of the class token's feature with the unpatched model's, on Fashion-MNIST;
- ``smollm2``: perplexity of text behind a prompt whose cache keeps a share of its bytes: rows by layer and by head
  against the same number everywhere, score by score. Prompts are read once for all settings, since no policy changes
  what a prompt's own forward computes; what is timed is the text that is read from the cache.

With ``--clock process`` times are those of the process alone, for machines that others use meanwhile; on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.kv import feed
from benchmarks.saving import save, saving
from benchmarks.zoo import data, dinov2, smollm2
from tokred.bench import embedded, results, timing
from tokred.tuning import Tuned

MODELS = ("embedded", "dinov2", "smollm2")
NAMES = {"embedded": "embedded", "dinov2": "dinov2", "smollm2": "smollm2-135m"}


def embedded_case(args: argparse.Namespace) -> dict[str, Any]:
    """The embedded model, pictures that it has not seen, and the goal."""
    images, labels = embedded.sample(min(args.images, 2000))
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    return {"model": embedded.load(), "data": batches, "metric": args.metric, "speedup": args.speedup or 2.5}


def dinov2_case(args: argparse.Namespace) -> dict[str, Any]:
    """DINOv2-S at 112 pixels on the same garments in three channels."""
    model = dinov2.load_timm(112)
    test = data.fashion_mnist("test")
    few = data.Labelled(test.images[: args.images], test.labels[: args.images], test.classes)
    images = data.normalise(data.as_rgb(few, 112).images)
    batches = list(images.split(8))
    return {"model": model, "data": batches, "metric": "cosine", "speedup": args.speedup or 1.8}


class Reader:
    """Reads a text from a cache whose prompt was read beforehand: ``run(model, batch)`` of a search.

    Args:
        model: unpatched.
        windows: ``[B, N]`` ids of each batch; three quarters of a window are the prompt.
    """

    def __init__(self, model: Any, windows: list[Tensor]) -> None:
        self.prompt = windows[0].shape[1] * 3 // 4 - 1
        with torch.inference_mode():
            self.read = {self.key(ids): feed.read(model, ids[:, : self.prompt])[0] for ids in windows}

    @staticmethod
    def key(ids: Tensor) -> tuple[int, ...]:
        """A window's own name."""
        return tuple(ids[0, :16].tolist())

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Logits of the last quarter."""
        ids = batch["input_ids"]
        prompt = self.read[self.key(ids)]
        if tokred.patched(model):
            cache = prompt.fill(tokred.kv_cache(model))
        else:
            with tokred.applied(model, "knorm", budget=1.0):
                cache = prompt.fill(tokred.kv_cache(model))
                return self.rest(model, ids, cache)
        return self.rest(model, ids, cache)

    def rest(self, model: Any, ids: Tensor, cache: Any) -> Tensor:
        """Logits of what stands behind the prompt."""
        found: Tensor = model(ids[:, self.prompt : -1], **tokred.cache_kwargs(cache)).logits
        return found

    def probe(self, model: Any, batch: Any) -> None:
        """The prompt and one token, after which the cache holds what the policy left of it."""
        ids = batch["input_ids"]
        cache = self.read[self.key(ids)].fill(tokred.kv_cache(model))
        model(ids[:, self.prompt : self.prompt + 1], **tokred.cache_kwargs(cache))


def smollm2_case(args: argparse.Namespace) -> dict[str, Any]:
    """SmolLM2, windows of the Debian handbook, and the share of the bytes that may be held."""
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    text = tokenizer(data.handbook()[100_000:500_000], return_tensors="pt").input_ids[0]
    step = len(text) // args.windows
    windows = [text[None, i * step : i * step + args.window] for i in range(args.windows)]
    reader = Reader(model, windows)
    batches = [{"input_ids": ids} for ids in windows]
    methods = ["snapkv window=16", "expected_attention", "keydiff turns=False"]
    return {
        "model": model, "data": batches, "metric": "perplexity", "memory": args.memory, "run": reader,
        "methods": methods,
    }  # fmt: skip


CASES = {"embedded": embedded_case, "dinov2": dinov2_case, "smollm2": smollm2_case}


def records(name: str, seed: int, found: Tuned, rounds: int) -> list[dict[str, Any]]:
    """A record for each row of the held-out table."""
    rows = []
    for row in found.rows:
        record: dict[str, Any] = {"model": NAMES[name], "method": row["method"], "setting": row["setting"]}
        record |= {"case": f"{row['role']}-{seed}", "scored_by": found.metric, "rounds": rounds}
        record |= {"goal": f"{found.goal.kind}-{found.goal.value:g}"}
        if found.metric in ("top1", "cosine", "perplexity"):
            record |= {found.metric: row["quality"], f"{found.metric}_count": row["samples"]}
            record |= {f"{found.metric}_{end}": row[end] for end in ("low", "high") if row[end] is not None}
        counts = {"difference": row["samples"], "gain": row["samples"], "speedup": rounds, "beside": rounds}
        for what, count in counts.items():
            if row.get(what) is not None:
                ends = {f"{what}{end}": row[f"{what}{end}"] for end in ("", "_low", "_high")}
                record |= {k: v for k, v in ends.items() if v is not None} | {f"{what}_count": count}
        if row.get("memory") is not None:
            record["bytes_share"] = row["memory"]
        rows.append(record | results.here("cpu", torch.bfloat16 if name == "smollm2" else torch.float32))
    return rows


def main() -> None:
    """Search, and write the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--samples", type=int, default=400, help="that are searched on")
    parser.add_argument("--images", type=int, default=2400, help="that are searched on and held out")
    parser.add_argument("--speedup", type=float, help="default: 2.5 for embedded, 1.8 for dinov2")
    parser.add_argument("--metric", choices=("top1", "cosine"), default="top1", help="of embedded")
    parser.add_argument("--memory", type=float, default=0.2, help="share of smollm2's cache")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of text")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", help="default: the usual ones")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="where searches are kept, to go on from")
    parser.add_argument("--plots", type=Path, help="folder for a picture of each search")
    saving(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.clock == "process":
        timing.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    for name in args.only:
        case = CASES[name](args)
        if args.methods:
            case["methods"] = args.methods
        for seed in args.seeds:
            folder = None if args.folder is None else args.folder / name
            given: dict[str, Any] = {"trials": args.trials, "samples": args.samples, "rounds": args.rounds}
            given |= {"seed": seed, "out": folder}
            given["front"] = args.plots is not None
            started = time.monotonic()
            found = tokred.tune(**case, **given, name=NAMES[name])
            print(f"seed {seed}, {time.monotonic() - started:.0f} s\n{found}\n", flush=True)
            save(records(name, seed, found, args.rounds), "tune", args)
            if args.plots is not None:
                print(found.plot(args.plots / f"tune_{name}_{seed}.png"), file=sys.stderr)


if __name__ == "__main__":
    main()
