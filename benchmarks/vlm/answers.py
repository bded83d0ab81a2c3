"""Every method on a real VLM with 64, 32 and 16 of 256 visual tokens: exact answers, time, memory.

    python -m benchmarks.zoo.fetch dinov2 smollm2 fashion
    python -m benchmarks vlm/answers --images 100 --dtype bfloat16 --threads 1 --out vlm.csv    # an hour
    python -m benchmarks vlm/answers --quick --out /tmp/vlm.csv

The model is ``benchmarks/zoo/vlm.py``: DINOv2, a projector, SmolLM2-135M; it names the piece of clothing in a scene. It
was trained with all tokens, none dropped. An answer is right if it is the class's name, word for word.

``tokens_left`` is the number of visual tokens at the input of the last layer, for the first batch. Times are those of
whole answers, paired with the unpatched model's on ``--pairs`` of the batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import measured, threads
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, vlm

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


def methods(model: Any, tokenizer: Any, names: Sequence[str], budgets: Sequence[int]) -> dict[str, Any]:
    """Method objects by their names and budgets."""
    found = {}
    for name in names:
        more = {"calibration": calibration(model, tokenizer)} if name == "cat" else {}
        for n in budgets:
            parameters = METHODS[name](n)
            if parameters is not None:
                found[f"{name} budget={n}"] = tokred.make(name, **{**parameters, **more})
    return found


def batches(model: Any, tokenizer: Any, held: vlm.Scenes, size: int) -> list[dict[str, Any]]:
    """Arguments of ``generate``, and the right answers."""
    found = []
    for images, labels in zip(held.images.split(size), held.labels.split(size), strict=True):
        more = {"answers": [vlm.CLASSES[y] for y in labels], **vlm.ends(tokenizer)}
        found.append(vlm.inputs(tokenizer, images, dtype=model.dtype) | more)
    return found


def exact(output: Any, batch: dict[str, Any]) -> Tensor:
    """``(B,)`` 1.0 where the answer up to its full stop is the right one, word for word."""
    return torch.tensor([float(vlm.said(a) == b) for a, b in zip(output.texts, batch["answers"], strict=True)])


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5, help="batches timed beside the unpatched model")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--quick", action="store_true", help="8 images, one budget")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    saving(parser)
    given = parser.parse_args()
    threads(given.threads)
    budgets = (64,) if given.quick else tuple(map(int, given.budgets.split(",")))
    count, pairs = (8, 1) if given.quick else (given.images, given.pairs)
    model, tokenizer = vlm.build()
    model.to(getattr(torch, given.dtype))
    chosen = methods(model, tokenizer, given.methods.split(","), budgets)
    data = batches(model, tokenizer, vlm.scenes("test", count, seed=1), given.batch)
    source = {"name": "dinov2-smollm2-135m", "data_from": carriers.cited("dinov2", "smollm2", "fashion")}
    options = {"run": "generate", "tokenizer": tokenizer, "max_new_tokens": 6, "values": given.values}
    rows = measured(model, chosen, data, {"exact": exact}, rounds=pairs, pairs=pairs, **source, **options)
    text = data[0]["input_ids"].shape[1] - FULL
    for row in rows:
        row["tokens_left"] = row["tokens_out"] - text
    save(rows, "answers", given)


if __name__ == "__main__":
    main()
