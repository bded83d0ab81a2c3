"""Times of what ``encoder/train_learned`` has trained: models beside the dense one, and what deciding takes of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

import tokred
from tokred.adapters.encoder import block as adapter_block
from tokred.bench import timing

Spreads = dict[str, list[float]]


def times(
    models: Mapping[str, nn.Module], plain: nn.Module, images: Tensor, rounds: int, at: int
) -> dict[str, Spreads]:
    """How many times as fast as the dense model each one is in the same round, and what share of it deciding takes.

    Seconds are those that the processor spends on this process, since trainings may run beside it.

    Args:
        models: patched or smaller ones, by name.
        plain: the dense model.
        images: ``(N, 3, H, W)``, of which each round takes the next ``at``.
        rounds: how often each runs.
        at: pictures of a batch; models whose samples keep different numbers of tokens get one picture at a time, and so
            does the dense model beside them.
    """
    found: dict[str, Spreads] = {}
    one_by_one = {name for name, model in models.items() if any(m.uneven for m in tokred.patched(model))}
    for size, names in ((at, [n for n in models if n not in one_by_one]), (1, [n for n in models if n in one_by_one])):
        if names:
            found |= _rounds({name: models[name] for name in names}, plain, images, rounds * (at // size), size)
    return found


def _rounds(
    models: Mapping[str, nn.Module], plain: nn.Module, images: Tensor, rounds: int, size: int
) -> dict[str, Spreads]:
    arms = {"": plain, **models}
    watch = timing.Watch(clock=time.process_time)
    deciding = [[0.0] * rounds for _ in arms]

    def run(model: nn.Module, i: int) -> None:
        start = i * size % (len(images) - size + 1)
        watch.clear()
        model(images[start : start + size])

    def collect(arm: int, i: int, _: object) -> None:
        deciding[arm][i] = watch.total()

    with watch.around(adapter_block, "decide", "deciding"):
        seconds = timing.compared(
            [partial(run, model) for model in arms.values()], rounds, collect=collect, clock=time.process_time
        )
    faster = timing.ratios(seconds)
    return {
        name: {"speedup": faster[i], "decision_share": [a / b for a, b in zip(deciding[i], seconds[i], strict=True)]}
        for i, name in enumerate(arms)
        if name
    }
