"""KV-cache policies on SmolLM2-135M: perplexity, pass-key retrieval, bytes really held, prefill and decoding speed.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/cache --out benchmarks/results/kv_cache.csv --plot docs/img     # hours on a CPU
    python -m benchmarks kv/cache --quick --out /tmp/kv.csv --plot /tmp/kv                  # minutes

What is measured, for every policy and budget:

- ``perplexity`` of the last quarter of windows of the Debian handbook, the first three quarters being the prompt;
- ``retrieval`` of a five-digit key hidden in the handbook, the question asked *after* the context was compressed (the
  fair order) or *before*, as part of the prompt, which flatters scores that look at the last queries;
- ``bytes`` that the cache holds for a sample after the prompt, keys, values, positions and state, measured; those of
  the perplexity's prompts are ``bytes_window``, since these are three quarters as long as the window;
- ``prefill_s`` and ``decode_tokens_per_s``, batch 1 and a left-padded batch of 4 (``--only speed``; an idle machine).

One row of the CSV is one number. Budgets are shares of the prompt; the unpatched model is the policy ``none``. Batch 4
is padded on the left, each row more than the one before; its quality is measured at a quarter of the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.kv import quality as kv_quality
from benchmarks.kv.arms import BUDGETS, POLICIES, Arm, arms, held_bytes
from benchmarks.zoo import data, smollm2
from tokred.bench import plots
from tokred.core import environment

COLUMNS = ("policy", "budget", "measure", "asked", "batch", "length", "dtype", "value", "count")


class Setting(NamedTuple):
    """How much is measured.

    Attributes:
        window: tokens of a perplexity window.
        windows: how many of them, a batch.
        lengths: contexts that a key is hidden in.
        keys: keys for each length and depth.
        timed: tokens decoded for a speed.
        timed_window: tokens of the prompt before them.
        chunk: tokens that are fed at once to policies that evict at every step; 1 is exact.
    """

    window: int = 4096
    windows: int = 3
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    keys: int = 5
    timed: int = 32
    timed_window: int = 2048
    chunk: int = 8


QUICK = Setting(window=512, windows=2, lengths=(512,), keys=2, timed=8, timed_window=256, chunk=32)


def quality(found: list[kv_quality.Found], dtype: str) -> list[dict[str, Any]]:
    """Sums over prompts as rows of the CSV."""
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for f in found:
        total = sums[(f.arm.name, f.arm.budget, f.measure, f.asked, f.batch, f.length)]
        total[0] += f.value
        total[1] += f.count
    rows = []
    for (name, budget, measure, asked, batch, length), (value, count) in sums.items():
        mean = math.exp(value / count) if measure == "nll" else value / count
        called = "perplexity" if measure == "nll" else measure
        shown = f"{mean:.0f}" if called.startswith("bytes") else f"{mean:.6g}"
        kind = dict(zip(COLUMNS, (name, budget, called, asked, batch, length, dtype, shown, int(count)), strict=True))
        rows.append(kind)
    return rows


def timings(model: Any, text: Tensor, every: list[Arm], setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of the CSV with seconds in them."""
    for arm in every:
        for batch in (1, 4):
            with tokred.applied(model, arm.policy) if arm.policy is not None else contextlib.nullcontext():
                prefill, decode, held = speed(model, text, arm, batch, setting)
            values = {"prefill_s": prefill, "decode_tokens_per_s": decode, "bytes_timed": held}
            for measure, value in values.items():
                dtype, n = str(model.dtype).removeprefix("torch."), setting.timed_window
                row = (arm.name, arm.budget, measure, "", batch, n, dtype, f"{value:.5g}", setting.timed)
                yield dict(zip(COLUMNS, row, strict=True))


@torch.inference_mode()
def speed(model: Any, ids: Tensor, arm: Arm, batch: int, setting: Setting) -> tuple[float, float, float]:
    """Seconds of the prompt, tokens a second after it, and bytes of a sample after the prompt."""
    from transformers import DynamicCache

    n = setting.timed_window
    rows = ids[: n * batch].view(batch, n)
    mask = torch.ones_like(rows)
    for i in range(1, batch):
        mask[i, : i * n // (2 * batch)] = 0  # padded on the left, each sample more than the one before
    cache = DynamicCache(config=model.config) if arm.policy is None else tokred.kv_cache(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    start = time.perf_counter()
    given = {"attention_mask": mask} if batch > 1 else {}
    step = model(rows, position_ids=positions, past_key_values=cache, logits_to_keep=1, **given).logits.argmax(-1)
    prefill = time.perf_counter() - start
    held = held_bytes(cache) / batch
    times, position = [], positions[:, -1:]
    for _ in range(setting.timed):
        position, mask = position + 1, torch.cat([mask, torch.ones_like(step)], 1)
        start = time.perf_counter()
        given = {"attention_mask": mask} if batch > 1 else {}
        step = model(step, position_ids=position, past_key_values=cache, **given).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    return prefill, batch / statistics.median(times), held


def plot(rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """One picture a measure: lines of policies over the budget, or bars where there is one budget."""
    plt = plots.pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    names = list(dict.fromkeys(r["policy"] for r in rows if r["policy"] != "none"))
    for kind in sorted({(r["measure"], r["asked"], r["batch"], r["length"]) for r in rows}):
        measure_, asked, batch, length = kind
        mine = [r for r in rows if (r["measure"], r["asked"], r["batch"], r["length"]) == kind]
        full = [float(r["value"]) for r in mine if r["policy"] == "none"]
        points = {n: sorted((float(r["budget"]), float(r["value"])) for r in mine if r["policy"] == n) for n in names}
        points = {n: p for n, p in points.items() if p}
        budgets = sorted({b for p in points.values() for b, _ in p})
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        title = f"{length} tokens" + (f", asked {asked}" if asked else "") + (f", batch {batch}" * (batch != "1"))
        if len(budgets) == 1:
            order = sorted(points, key=lambda n: points[n][0][1])
            axes.barh(order, [points[n][0][1] for n in order], color=plots.COLOURS[0])
            axes.set(xlabel=measure_, title=f"{title}, {100 * budgets[0]:g} % of the cache")
            for value in full:
                axes.axvline(value, color="black", linewidth=1, label="unpatched")
        else:
            for name, p in points.items():
                axes.plot(*zip(*p, strict=True), label=name, **plots.thin(names.index(name)))
            for value in full:
                axes.axhline(value, color="black", linewidth=1, label="unpatched")
            axes.set(xlabel="share of the cache kept", ylabel=measure_, xscale="log", title=title)
            axes.set_xticks(budgets, [f"{100 * b:g} %" for b in budgets])
            axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(fontsize=7, frameon=False, loc="outside right center")
        made.append(plots.save(figure, folder / ("_".join(part for part in kind if part) + ".png")))
    return made


def main() -> None:
    """Measure, and write the CSV anew after each prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows of other measures in it are kept")
    parser.add_argument("--plot", type=Path, help="folder for pictures of all rows of the file")
    parser.add_argument("--quick", action="store_true", help="short windows, few keys")
    parser.add_argument("--only", choices=(*kv_quality.PARTS, "speed", "plot"), help="a part of the work")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="shares, with commas")
    parser.add_argument("--lengths", help="contexts of the keys, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    names = [n for n in arguments.policies.split(",") if n]
    unknown = [n for n in names if n not in POLICIES]
    if unknown:
        parser.error(f"unknown policies: {', '.join(unknown)}; known are {', '.join(POLICIES)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setting = QUICK if arguments.quick else Setting()
    if arguments.lengths:
        setting = setting._replace(lengths=tuple(map(int, arguments.lengths.split(","))))
    if arguments.only != "plot":
        model, tokenizer = smollm2.load(dtype=getattr(torch, arguments.dtype))
        model.to(arguments.device)  # type: ignore[arg-type]
        text = tokenizer(data.handbook()[:400_000], return_tensors="pt").input_ids[0].to(arguments.device)
        every = arms(names, [float(b) for b in arguments.budgets.split(",")])
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        if arguments.only != "speed":
            found: list[kv_quality.Found] = []
            parts = (arguments.only,) if arguments.only else kv_quality.PARTS
            for numbers in kv_quality.run(model, tokenizer, text, every, setting, say, parts):
                found += numbers
                write(arguments.out, quality(found, arguments.dtype))
        if arguments.only in (None, "speed"):
            rows = []
            for row in timings(model, text, every, setting):
                rows.append(row)
                say(" ".join(map(str, row.values())))
                write(arguments.out, rows)
        print(f"torch {torch.__version__}, transformers {environment.version('transformers')}, {arguments.device}")
    if arguments.plot:
        print(*plot(read(arguments.out), arguments.plot), sep="\n")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf8") as f:
        return list(csv.DictReader(f))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the CSV, in place of older ones of the same kind."""
    key = COLUMNS[:7]
    merged = {tuple(str(row[c]) for c in key): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


if __name__ == "__main__":
    main()
