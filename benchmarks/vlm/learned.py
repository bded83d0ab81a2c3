"""Learned reduction inside the tower of the small VLM: right answers and time, beside methods without weights.

    python -m benchmarks.zoo.fetch dinov2 smollm2 fashion
    python -m benchmarks vlm/learned --threads 1 --out benchmarks/results/vlm.csv
    python -m benchmarks vlm/learned --methods tome,random_prune --held 20 --rounds 1

The model is ``benchmarks/zoo/vlm.py`` with the weights for questions: DINOv2, a projector, SmolLM2-135M; it names the
piece of clothing in a scene. The tower's blocks run on fewer tokens, and behind them every row is there again, so that
the language model reads 256 of them whatever the method. Only what a method owns is trained, on training scenes: by the
method's own losses (labels of classes for ``cropr``, of patches for ``bavit``) and by the features of the tower with
all tokens; the model's weights stay as they are. What is trained once, at a third of the work, is measured at every
share. ``cropr_early`` is ``cropr`` whose tokens leave behind the first two blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred
from benchmarks.encoder.learned_arms import ALIASES, AMOUNTS
from benchmarks.engine import Record, threads
from benchmarks.saving import known, save, saving
from benchmarks.vlm.clip_answers import rights
from benchmarks.zoo import carriers, data, vlm
from tokred import adapters
from tokred.bench import results, timing
from tokred.bench.arms import BASE
from tokred.bench.intervals import student

BATCH = 8  # pictures of a step
HELD = 10  # of a batch that is asked about
EARLY = "cropr_early"
# What a method's amount does not say; of those with weights also the rate of learning.
LEARNED: dict[str, tuple[dict[str, Any], float]] = {
    "cropr": ({"classes": len(vlm.CLASSES)}, 1e-2),
    EARLY: ({"classes": len(vlm.CLASSES)}, 1e-2),
    "bavit": ({"mode": "ratio", "dim": 36, "balance": True}, 1e-3),
    "vtm": ({"variant": "learned", "gamma": 3, "blocks": [1, 3]}, 1e-2),
}
BESIDE = ("tome", "pitome", "evit", "class_attention", "random_prune", "downsample")
CALLED = {EARLY: "cropr", **{name: method for name, (method, _) in ALIASES.items()}}


class Arm(NamedTuple):
    """A method, and its module with weights where it has one."""

    method: tokred.Method
    module: nn.Module | None


def early(count: int, depth: int) -> list[int]:
    """Tokens that leave behind each block where ``count`` leave behind the first two, a third of them at the first."""
    return [count // 3, count - count // 3, *[0] * (depth - 2)]


def at_share(name: str, share: float, tower: nn.Module) -> tokred.Method:
    """The method of a name whose blocks do the most work that is at most a share, or a hundredth more.

    Args:
        name: of :data:`LEARNED` or :data:`BESIDE`.
        share: of the dense blocks' multiply-adds.
        tower: without a patch.

    Raises:
        ValueError: even the least work is more.
    """
    host, one = adapters.find(tower), (1, 3, vlm.SIZE, vlm.SIZE)

    def work(method: tokred.Method | None) -> int:
        return sum(macs for _, _, macs in host.plan(method, one))

    fixed = LEARNED[name][0] if name in LEARNED else ALIASES.get(name, (name, {}))[1]
    parameter, values = AMOUNTS[CALLED.get(name, name)]
    if name == EARLY:
        values = [early(n, host.depth) for n in range(2, vlm.GRID**2, 2)]
    for value in values:
        method = tokred.make(CALLED.get(name, name), **{**fixed, parameter: value})
        if work(method) / work(None) <= share + 0.01:
            return method
    raise ValueError(f"{name} has no setting for {share:.0%} of the work")


def learn(
    model: Any, name: str, method: tokred.Method, scenes: vlm.Scenes, goals: Tensor, steps: int, seed: int
) -> nn.Module:
    """The method's module after training, beside a model that stays as it is.

    Args:
        model: without a patch, which it has none of afterwards either.
        name: of :data:`LEARNED`.
        method: at a share of the work.
        scenes: to train on.
        goals: ``(N, 257, 384)`` the tower's features of the scenes with all tokens.
        steps: of :data:`BATCH` pictures.
        seed: of the weights and of the order.
    """
    tower, rate = model.model.vision_tower, LEARNED[name][1]
    torch.manual_seed(seed)
    tokred.apply(model, method)
    optimiser = torch.optim.AdamW([*tokred.parameters(model)], lr=rate, weight_decay=0.0)
    tower.train()
    try:
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
            index = torch.randint(len(scenes.images), (BATCH,))
            found = tower(data.normalise(scenes.images[index])).last_hidden_state
            loss = sum(tokred.losses(model, targets=_targets(method, scenes, index)).values(), found.new_zeros(()))
            if name == "vtm":  # has no loss of its own: it learns from what its choice does to the features
                loss = loss + F.mse_loss(found, goals[index]) / goals[index].square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % 20 == 0 or step == steps - 1:
                print(f"  {name} seed {seed} step {step}: loss {loss.item():.4f}", flush=True)
        return tokred.modules(model)[method.name].eval()
    finally:
        tower.eval()
        tokred.remove(model)


def _targets(method: tokred.Method, scenes: vlm.Scenes, index: Tensor) -> Tensor:
    """Labels of patches ``(B, 16, 16)`` for a method that learns by them, else of classes ``(B,)``."""
    return (scenes.covered[index] >= 0.5).long() if method.name == "bavit" else scenes.labels[index]


@torch.inference_mode()
def judged(model: Any, tokenizer: Any, held: vlm.Scenes) -> tuple[list[float], float, float]:
    """Right answers, the share of the object's patches that is left, and the share of the blocks' multiply-adds.

    Args:
        model: patched inside its tower, or not.
        held: scenes to ask about.
    """
    host, one = adapters.find(model.model.vision_tower), (1, 3, vlm.SIZE, vlm.SIZE)
    dense = sum(macs for _, _, macs in host.plan(None, one))
    hits: list[float] = []
    left, done, shown = 0, 0.0, held.covered.flatten(1) >= 0.5
    for part in torch.arange(len(held.images)).split(HELD):
        given = vlm.inputs(tokenizer, held.images[part], dtype=model.dtype) | vlm.ends(tokenizer)
        hits += rights(model, tokenizer, [{**given, "answers": [vlm.CLASSES[y] for y in held.labels[part]]}], tokens=6)
        if not tokred.patched(model):
            left, done = left + int(shown[part].sum()), done + dense * len(part)
            continue
        left += int(((tokred.trace(model).index[:, host.prefix :] >= 0) & shown[part]).sum())
        done += tokred.report(model).macs * len(part)
    return hits, left / int(shown.sum()), done / dense / len(hits)


@torch.inference_mode()
def faster(model: Any, arms: dict[str, Arm], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """How many times as fast the tower is with each method as without, in every round, by thread time.

    Args:
        model: without a patch.
        arms: what is timed, by name.
        images: ``(N, 3, 224, 224)`` uint8, a batch.
        rounds: how often each runs.
    """
    tower, pixels = model.model.vision_tower, data.normalise(images).to(model.dtype)
    enters = [
        contextlib.nullcontext,
        *(partial(tokred.applied, model, one.method, module=one.module) for one in arms.values()),
    ]
    seconds = timing.paired(enters, lambda _: tower(pixels), rounds, clock=time.thread_time)
    return dict(zip(arms, timing.ratios(seconds)[1:], strict=True))


def records(rows: Sequence[dict[str, Any]], head: Record) -> Iterator[Record]:
    """A record a name and share: the mean of its seeds with its 95 % interval, or the share of right answers of one."""
    for name, share in dict.fromkeys((row["name"], row["share"]) for row in rows):
        some = [row for row in rows if (row["name"], row["share"]) == (name, share)]
        right, count = [sum(row["hits"]) / len(row["hits"]) for row in some], len(some[0]["hits"])
        one = {**head, "method": CALLED.get(name, name), "case": name, "setting": some[0]["setting"], "goal": share}
        if len(right) > 1:
            half = student(len(right) - 1) * statistics.stdev(right) / len(right) ** 0.5
            mean = statistics.mean(right)
            one |= results.between("exact", mean, max(0.0, mean - half), min(1.0, mean + half))
        else:
            one |= results.share("exact", round(sum(some[0]["hits"])), count)
        one |= {"exact_count": count * len(some), "recall": statistics.mean(row["left"] for row in some)}
        one["gmacs_share"] = statistics.mean(row["work"] for row in some)
        yield one | (results.spread("speedup", some[0]["faster"]) if "faster" in some[0] else {})


def main() -> None:
    """Train, ask, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*LEARNED, *BESIDE)
    parser.add_argument("--methods", default=",".join(every), help="names, with commas")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33], help="of the tower's multiply-adds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} pictures")
    parser.add_argument("--scenes", type=int, default=400, help="to train on")
    parser.add_argument("--held", type=int, default=100, help="scenes that are asked about")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--weights", type=Path, default=vlm.QUESTIONS, help="what was trained: a safetensors file")
    parser.add_argument("--threads", type=int)
    saving(parser)
    given = parser.parse_args()
    names = given.methods.split(",")
    known(parser, "methods", names, every)
    threads(given.threads)
    model, tokenizer = vlm.build(given.weights)
    model.requires_grad_(False)
    tower = model.model.vision_tower
    arms = {}
    for name, share in itertools.product(names, given.shares):
        try:
            arms[name, share] = at_share(name, share, tower)
        except ValueError as error:  # a method that cannot do with so little is no reason to stop
            print(f"left out: {error}", flush=True)
    shares = {name: [share for one, share in arms if one == name] for name, _ in arms}
    held, source = vlm.scenes("test", given.held, seed=1), results.here("cpu", torch.float32)
    source["versions"] = f"{source['versions']} {carriers.cited('dinov2', 'smollm2', 'fashion')}".strip()
    head: Record = {"model": f"dinov2-smollm2-135m-{given.weights.stem.removeprefix('vlm_')}", **source}
    hits, left, done = judged(model, tokenizer, held)
    rows = [{"name": BASE, "share": 1.0, "setting": "", "hits": hits, "left": left, "work": done}]
    print(f"all tokens: {sum(hits):.0f} of {len(hits)} right", flush=True)
    scenes = goals = None
    if set(names) & {*LEARNED}:
        scenes = vlm.scenes("train", given.scenes)
        with torch.inference_mode():
            parts = [tower(data.normalise(part)).last_hidden_state for part in scenes.images.split(20)]
        goals = torch.cat(parts).clone()
    timed: dict[str, Arm] = {}
    for name, mine in shares.items():
        for seed in given.seeds if name in LEARNED else (0,):
            module = None
            if scenes is not None and goals is not None and name in LEARNED:
                last = arms[name, min(mine)]
                module = learn(model, name, last, scenes, goals, given.steps, seed)
            for share in mine:
                one = Arm(arms[name, share], module)
                with tokred.applied(model, one.method, module=module):
                    hits, left, done = judged(model, tokenizer, held)
                rows.append({"name": name, "share": share, "setting": str(one.method)})
                rows[-1] |= {"hits": hits, "left": left, "work": done}
                timed.setdefault(f"{name} {share:g}", one)
                print(f"{name} at {done:.0%}: {sum(hits):.0f} right, {left:.0%} of the objects left", flush=True)
    if given.rounds:
        speed = faster(model, timed, held.images[:HELD], given.rounds)
        for row in rows[1:]:
            row["faster"] = speed[f"{row['name']} {row['share']:g}"]
    save([*records(rows, head)], "learned", given)


if __name__ == "__main__":
    main()
