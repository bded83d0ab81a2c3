"""Every method on a real VLM with 64, 32 and 16 of 256 visual tokens: exact answers, time, memory.

    python -m benchmarks.zoo.fetch dinov2 smollm2 fashion
    python -m benchmarks vlm/answers --images 100 --rounds 5 --dtype bfloat16 --threads 2 --out vlm.csv    # an hour
    python -m benchmarks vlm/answers --quick --out /tmp/vlm.csv

The model is ``benchmarks/zoo/vlm.py``: DINOv2, a projector, SmolLM2-135M; it names the piece of clothing in a scene. It
was trained with all tokens, none dropped. An answer is right if it is the class's name, word for word.

``tokens_left`` is the mean number of visual tokens at the input of the last layer, ``tokens_mean`` the mean over the
inputs of all layers, text included. Times are those of a whole forward, tower and prompt, interleaved with the
unpatched model's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from benchmarks.zoo import vlm
from tokred.bench import results, timing
from tokred.bench.arms import BASE, Arm

BUDGETS = (64, 32, 16)
FULL = vlm.GRID**2


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
    found = [Arm(BASE, "")]
    for name in names:
        more = {"calibration": calibration(model, tokenizer)} if name == "cat" else {}
        for n in budgets:
            parameters = METHODS[name](n)
            if parameters is not None:
                parameters |= more
                found.append(Arm(name, f"budget={n}", tokred.make(name, **parameters)))
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
        with arm.applied(model):
            for part in images.split(batch):
                said += vlm.answers(model, tokenizer, part)
    finally:
        hook.remove()
    left, mean = (sum(column) for column in zip(*prompts, strict=True))
    return Answers(said, left / len(images), mean / len(images))


def judge(model: Any, tokenizer: Any, every: Sequence[Arm], held: vlm.Scenes, batch: int) -> Iterator[dict[str, Any]]:
    """For each arm its answers."""
    count, base = len(held.labels), list[str]()
    for arm in every:
        found = answer(model, tokenizer, held.images, arm, batch)
        base = base or found.said
        right = sum(a == vlm.CLASSES[y] for a, y in zip(found.said, held.labels, strict=True))
        same = sum(a == b for a, b in zip(found.said, base, strict=True))
        say(f"{arm.name:18} {arm.setting:10} {found.left:6.1f} left {100 * right / count:5.1f} %")
        row: dict[str, Any] = {"images": count, "tokens_left": found.left, "tokens_mean": found.mean}
        yield row | results.share("exact", right, count) | results.share("agreement", same, count)


def clock(model: Any, tokenizer: Any, every: Sequence[Arm], held: vlm.Scenes, rounds: int) -> Iterator[dict[str, Any]]:
    """For each arm the speeds of a forward of 4 pictures, and memory."""
    given = vlm.inputs(tokenizer, held.images[:4], dtype=model.dtype)

    def forward(_: int) -> Tensor:
        return model(**given, logits_to_keep=1).logits

    seconds = timing.paired([lambda arm=arm: arm.applied(model) for arm in every], forward, rounds)
    speeds = timing.summarise(seconds, [len(given["input_ids"])] * rounds)
    for arm, speed in zip(every, speeds, strict=True):
        row: dict[str, Any] = {"rounds": rounds, **results.between("speedup", *speed.speedup)}
        row |= results.between("images_per_second", *speed.images_per_second)
        with arm.applied(model):
            row |= timing.peak_memory(lambda: forward(0)).record()
        say(f"{arm.name:18} {arm.setting:10} {row['speedup']:.2f} times as fast")
        yield row


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("answers", "speed"), help="a part of the work")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--quick", action="store_true", help="8 images, one budget")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    saving(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    budgets = (64,) if arguments.quick else tuple(map(int, arguments.budgets.split(",")))
    count, rounds = (8, 2) if arguments.quick else (arguments.images, arguments.rounds)
    model, tokenizer = vlm.build()
    model.to(getattr(torch, arguments.dtype))
    held = vlm.scenes("test", count, seed=1)
    every = arms(model, tokenizer, arguments.methods.split(","), budgets)
    where = {"model": "dinov2-smollm2-135m", **results.here("cpu", model.dtype)}
    for work, measure in (("answers", judge), ("speed", clock)):
        if arguments.only in (None, work):
            how = arguments.batch if work == "answers" else rounds
            for arm, row in zip(every, measure(model, tokenizer, every, held, how), strict=True):
                save([{"method": arm.name, "setting": arm.setting, **row, **where}], "answers", arguments)


if __name__ == "__main__":
    main()
