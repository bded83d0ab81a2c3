"""Every method on a real VLM with 64, 32 and 16 of 256 visual tokens: exact answers, time of the prompt, memory.

    python -m benchmarks.zoo.fetch dinov2 smollm2
    python -m benchmarks vlm/answers --out benchmarks/results/vlm.csv --plot docs/img/vlm.png  # an hour on two cores
    python -m benchmarks vlm/answers --quick --out /tmp/vlm.csv --plot /tmp/vlm.png

The model is ``benchmarks/zoo/vlm.py``: DINOv2, a projector, SmolLM2-135M; it names the piece of clothing in a scene. It
was trained with all tokens, none dropped. An answer is right if it is the class's name, word for word.

``left`` is the mean number of visual tokens at the input of the last layer, ``mean_tokens`` the mean over the inputs of
all layers, text included. Times are those of a whole forward, tower and prompt, interleaved with the unpatched model's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.zoo import vlm
from tokred.bench import plots, timing
from tokred.bench import results as outputs
from tokred.core import environment

BUDGETS = (64, 32, 16)
FULL = vlm.GRID**2


class Arm(NamedTuple):
    """A method that leaves about ``budget`` visual tokens; None is the unpatched model."""

    name: str
    budget: int
    method: tokred.Method | None = None

    def enter(self, model: Any) -> Callable[[], AbstractContextManager[object]]:
        """What ``timing.paired`` enters."""
        if self.method is None:
            return contextlib.nullcontext
        return lambda: tokred.applied(model, self.method)


def _stages(n: int, steps: int = 3) -> tuple[float, ...]:
    """Shares that fall evenly, in the logarithm, to ``n`` tokens."""
    return tuple((n / FULL) ** ((i + 1) / steps) for i in range(steps))


# What leaves ``n`` tokens, by name; methods without such a number are left out.
METHODS: dict[str, Callable[[int], dict[str, Any] | None]] = {
    "random_visual": lambda n: {"budget": n},
    "uniform_visual": lambda n: {"budget": n},
    "downsample_visual": lambda n: {"budget": n},
    "hired": lambda n: {"budget": n},
    "visionzip": lambda n: {"budget": n},
    "prumerge": lambda n: {"budget": n},
    "prumerge_plus": lambda n: {"budget": n},
    "fastervlm": lambda n: {"budget": n},
    "vispruner": lambda n: {"budget": n},
    "vscan": lambda n: {"budget": n},
    "divprune": lambda n: {"budget": n},
    "cdpruner": lambda n: {"budget": n},
    "saint_visual": lambda n: {"budget": n, "q": 4, "layer": 8},
    "flash_vl": lambda n: {"s": {64: 2, 16: 4}[n]} if n in (64, 16) else None,
    "nemotron": lambda n: {"s": {64: 2, 16: 4}[n]} if n in (64, 16) else None,
    "cat": lambda n: {"n_min": n // 2, "n_max": n + n // 2},  # and a calibration
    "fastv": lambda n: {"layer": 2, "ratio": 1 - n / FULL},
    "topv": lambda n: {"layer": 2, "budget": n},
    "pyramiddrop": lambda n: {"ratios": _stages(n)},
    "sparsevlm": lambda n: {"budget": _stages(n), "recycle": 0.0},
}


@torch.inference_mode()
def calibration(model: Any, tokenizer: Any, count: int = 40) -> tuple[float, ...]:
    """CAT's scores of training scenes, in order."""
    found: list[float] = []

    def note(site: Any) -> Tensor:
        scores = tokred.CAT().scores(site)
        found.extend(scores.tolist())
        return scores

    with tokred.applied(model, "cat", score=note):
        for part in vlm.scenes("train", count).images.split(10):
            model(**vlm.inputs(tokenizer, part, dtype=model.dtype), logits_to_keep=1)
    return tuple(sorted(found))


def arms(model: Any, tokenizer: Any, names: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """The unpatched model first."""
    found = [Arm("unpatched", FULL)]
    for name in names:
        more = {"calibration": calibration(model, tokenizer)} if name == "cat" else {}
        for n in budgets:
            parameters = METHODS[name](n)
            if parameters is not None:
                parameters |= more
                found.append(Arm(name, n, tokred.make(name, **parameters)))
    return found


class Answers(NamedTuple):
    """Of one arm: answers, mean visual tokens left, mean tokens at the layers' inputs."""

    said: list[str]
    left: float
    mean: float


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, images: Tensor, arm: Arm, batch: int) -> Answers:
    """Greedy answers, and what the prompt's layers worked on."""
    said: list[str] = []
    prompts: list[tuple[float, float]] = []

    def note(_: Any, __: Any, given: dict[str, Any], ___: Any) -> None:
        # The first forward of each answer is the prompt's.
        if given["input_ids"].shape[1] == 1:
            return
        rows = len(given["input_ids"])
        if arm.method is None:
            prompts.append((rows * FULL, rows * given["input_ids"].shape[1]))
        else:
            layers = tokred.report(model).layers
            prompts.append((sum(layers[-1].visual), sum(sum(row.tokens) for row in layers) / len(layers)))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        with arm.enter(model)():
            for part in images.split(batch):
                said += vlm.answers(model, tokenizer, part)
    finally:
        hook.remove()
    left, mean = (sum(column) for column in zip(*prompts, strict=True))
    return Answers(said, left / len(images), mean / len(images))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Exact answers over the time of the prompt, and over the tokens left."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    names = [n for n in dict.fromkeys(row["method"] for row in rows) if n != "unpatched"]
    for axis, (column, label) in zip(
        axes, (("speedup", "times as fast, whole forward"), ("left", "visual tokens left of 256")), strict=True
    ):
        base = rows[0]
        axis.axhline(100 * base["exact"], color="black", lw=0.8, label="unpatched")
        for i, name in enumerate(names):
            mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["left"])
            axis.plot([r[column] for r in mine], [100 * r["exact"] for r in mine], label=name, **plots.thin(i))
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(BUDGETS, [str(n) for n in BUDGETS])
    axes[0].set_ylabel("exact answers (%)")
    axes[1].legend(fontsize=7, frameon=False, ncols=2)
    return plots.save(figure, path)


def judge(model: Any, tokenizer: Any, every: Sequence[Arm], held: vlm.Scenes, batch: int) -> Iterator[dict[str, Any]]:
    """For each arm its row of the table, without speeds."""
    count, base = len(held.labels), list[str]()
    for arm in every:
        found = answer(model, tokenizer, held.images, arm, batch)
        base = base or found.said
        right = sum(a == vlm.CLASSES[y] for a, y in zip(found.said, held.labels, strict=True))
        same = sum(a == b for a, b in zip(found.said, base, strict=True))
        say(f"{arm.name:18} {arm.budget:4} {found.left:6.1f} left {100 * right / count:5.1f} %")
        row = {"method": arm.name, "budget": arm.budget, "images": count, "dtype": str(model.dtype)[6:]}
        row |= {"left": found.left, "mean_tokens": found.mean}
        yield row | {"exact": right / count, "same_as_unpatched": same / count}


def clock(model: Any, tokenizer: Any, every: Sequence[Arm], held: vlm.Scenes, rounds: int) -> Iterator[dict[str, Any]]:
    """For each arm what its row lacks: speeds of a forward of 4 pictures, and memory."""
    given = vlm.inputs(tokenizer, held.images[:4], dtype=model.dtype)

    def forward(_: int) -> Tensor:
        return model(**given, logits_to_keep=1).logits

    seconds = timing.paired([arm.enter(model) for arm in every], forward, rounds)
    speeds = timing.summarise(seconds, [len(given["input_ids"])] * rounds)
    for arm, speed in zip(every, speeds, strict=True):
        row: dict[str, Any] = {"images_per_second": speed.images_per_second.median}
        row["speedup"], row["speedup_q25"], row["speedup_q75"] = speed.speedup
        with arm.enter(model)():
            row["peak_mib"], row["forward_mib"], row["memory"] = timing.peak_memory(lambda: forward(0))
        say(f"{arm.name:18} {arm.budget:4} {row['speedup']:.2f} times as fast")
        yield row | environment.describe(torch.device("cpu"))


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows in it are kept and filled up")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=("answers", "speed", "plot"), help="a part of the work")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--quick", action="store_true", help="8 images, one budget")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    budgets = (64,) if arguments.quick else tuple(map(int, arguments.budgets.split(",")))
    count, rounds = (8, 2) if arguments.quick else (arguments.images, arguments.rounds)
    table = {(row["method"], row["budget"]): row for row in outputs.read_rows(arguments.out)}
    if arguments.only != "plot":
        model, tokenizer = vlm.build()
        model.to(getattr(torch, arguments.dtype))
        held = vlm.scenes("test", count, seed=1)
        every = arms(model, tokenizer, arguments.methods.split(","), budgets)
        for work, measure in (("answers", judge), ("speed", clock)):
            if arguments.only in (None, work):
                how = arguments.batch if work == "answers" else rounds
                for arm, row in zip(every, measure(model, tokenizer, every, held, how), strict=True):
                    old = table.get((arm.name, arm.budget), {"method": arm.name, "budget": arm.budget})
                    table[arm.name, arm.budget] = old | row
                    outputs.write_rows(arguments.out, list(table.values()))
    if arguments.plot:
        print(plot(list(table.values()), arguments.plot))


if __name__ == "__main__":
    main()
