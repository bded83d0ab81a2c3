"""Every vision method beside every other: at equal multiply-adds, at equal measured time, and what choosing costs.

Two scenarios:

- ``methods``, on the embedded model and on DINOv2 (``--probe 150 --rounds 7`` in the committed table): quality, speed
  and memory, every method at a few shares of the model's multiply-adds. Where the number of tokens depends on the
  image, the multiply-adds are those of the images that were tried, not an estimate.
- ``overhead``: ViT-S/16 at 224, batch 8, random weights, near 60 % of the multiply-adds: the share of the forward that
  each method's own work takes, deciding and merging, timed inside the forward.

``python -m benchmarks pages`` makes ``docs/methods/comparison.md`` and its plots from them.

    python -m benchmarks.zoo.fetch dinov2 skimage fashion
    python -m benchmarks encoder/methods --threads 2 --out benchmarks/results/encoder.csv --overwrite    # everything
    python -m benchmarks encoder/methods --only embedded --methods tome,saint --count 400
    python -m benchmarks encoder/methods --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

import tokred
from benchmarks.saving import save, saving
from tokred.bench import arms as arms_of
from tokred.bench import images as photos
from tokred.bench import models as subjects
from tokred.bench import results, tasks, timing
from tokred.bench import run as bench
from tokred.bench.arms import Arm
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting

SHARES = {"embedded": (0.6, 0.45, 0.3), "dinov2": (0.75, 0.6, 0.45)}
NEAR = 0.06  # a setting counts for a share if its multiply-adds lie this near, as a share of the model's

# What is tried for each method to come near the shares: settings from mild to strong.
CANDIDATES: dict[str, list[str]] = {
    "tome": [f"tome r={r}" for r in (*range(2, 34), 36, 40, 48)],
    "pitome": [f"pitome ratio={s / 200}" for s in range(120, 200, 2)],
    "random": [f"random r={r}" for r in (*range(2, 34), 36, 40, 48)],
    "random_prune": [f"random_prune r={r}" for r in range(2, 17)],
    "evit": [f"evit kappa={s / 100}" for s in range(10, 96, 3)],
    "downsample": [f"downsample keep={s / 100}" for s in range(15, 96, 3)],
    "ppt": [f"ppt r={r}" for r in range(8, 98, 4)],
    "ats": [f"ats n={s / 100}" for s in range(20, 100, 4)],
    "tofu": [f"tofu r={r}" for r in (*range(2, 34), 36, 40, 48)],
    "zero_tprune": [
        f"zero_tprune r_s={r_s} rho=[{', '.join(str(v) for v in rho)}]"
        for r_s in (4, 10, 16, 24, 32)
        for rho in ([1, 0.9, 0.8, 0.7, 1], [1, 0.8, 0.6, 0.5, 1], [0.8, 0.6, 0.5, 0.4, 1])
    ],
    "vomix": [f"vomix r={s / 100}" for s in (2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 25, 30)],
    "tokentm": [f"tokentm keep={s / 100}" for s in range(10, 96, 3)],
    "saint": [f"saint tau={t / 100} K={k}" for t in (30, 40, 50, 60, 65, 70, 75, 80, 85, 90) for k in (1, 3, 5)],
    "vtm": [f"vtm gamma={g} R={r}" for g in (2, 3, 4, 6) for r in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)],
    "tinychart": [f"tinychart r={r}" for r in (*range(2, 34), 36, 40, 48)],
    "algm": [f"algm T={t / 100}" for t in (-100, 10, 30, 40, 50, 60, 70, 75, 80, 85, 88, 90, 92, 94, 96)],
}


def candidates(name: str) -> list[str]:
    """What is tried for a method: as listed, or else its own parameter (of how much it removes) in even steps."""
    if name in CANDIDATES:
        return CANDIDATES[name]
    parameter, share = arms_of.knob(name)
    return [f"{name} {parameter}={v}" for v in ([s / 100 for s in range(5, 100, 5)] if share else range(1, 49))]


def every_method() -> list[str]:
    """Those that are listed, and every other one of the encoders that has a parameter to vary."""
    found = list(CANDIDATES)
    for name in registered.of("block"):
        if name not in found:
            with suppress(ValueError):
                arms_of.knob(name)
                found.append(name)
    return found


# Near 60 % of ViT-S/16's multiply-adds.
OVERHEAD = {
    "tome": "tome r=13", "pitome": "pitome ratio=0.91", "random": "random r=13", "random_prune": "random_prune r=13",
    "evit": "evit kappa=0.64", "downsample": "downsample keep=0.57", "ppt": "ppt r=60", "ats": "ats n=0.84",
    "tofu": "tofu r=13", "zero_tprune": "zero_tprune r_s=4 rho=[1, 0.8, 0.6, 0.5, 1]", "vomix": "vomix r=0.08",
    "tokentm": "tokentm keep=0.64", "saint": "saint tau=0.3 K=3", "vtm": "vtm gamma=4 R=0.5",
    "tinychart": "tinychart r=13", "algm": "algm T=-1 theta=0.2",
}  # fmt: skip


@torch.inference_mode()
def tried(model: nn.Module, text: str, images: torch.Tensor) -> Arm | None:
    """An arm with the multiply-adds and tokens that it really took on some images; None where it does not fit."""
    name, parameters = parse_setting(text)
    try:
        method = tokred.make(name, **parameters)
        cost = tokred.flops(model, None, images.shape)
        with tokred.applied(model, method):
            model(images)
            report = tokred.report(model)
    except (ValueError, TypeError, tokred.TokredError) as error:
        print(f"left out: {text}: {error}", file=sys.stderr)
        return None
    setting = text.partition(" ")[2]
    macs = report.macs + cost.outside
    return Arm(name, setting, method, report.layers[0].tokens_in, report.layers[-1].tokens_out, macs)


def near_shares(model: nn.Module, names: Sequence[str], images: torch.Tensor, shares: Sequence[float]) -> list[Arm]:
    """The unpatched model, and for each method the settings nearest to the shares of its multiply-adds."""
    base = arms_of.unpatched(model, images.shape)
    chosen = [base]
    for name in names:
        found = [arm for text in candidates(name) if (arm := tried(model, text, images)) is not None]
        for share in shares:
            best = min(found, key=lambda a: abs(a.macs / base.macs - share), default=None)
            if best is not None and abs(best.macs / base.macs - share) <= NEAR and best not in chosen:
                chosen.append(best)
    return chosen


def run_bench(model: str, names: Sequence[str], args: argparse.Namespace) -> None:
    """Quality, speed and memory of one model."""
    size = None if model == "embedded" else args.size
    subject = subjects.load(model, size=size)
    runs, left = bench.supported(subject, names)
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    task = tasks.choose(subject, None, count=args.count if model == "embedded" else args.probe)
    seen = task.test if task.test is not None else task.photos
    sample = photos.normalise(seen.images[:8], subject.mean, subject.std, torch.float32)
    arms = near_shares(subject.model, runs, sample, SHARES[model])
    options = bench.Options(batch=args.batch, rounds=args.rounds)
    total, done = bench.ticks(task, arms, options), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 50 == 0 or done == total:
            print(f"{model}: {done} of {total}", file=sys.stderr)

    save((row | {"scenario": "methods"} for row in bench.run(subject, task, arms, options, tick)), "", args)


@torch.inference_mode()
def run_overhead(names: Sequence[str], args: argparse.Namespace) -> None:
    """What each method's own work (deciding and merging) takes of a forward of ViT-S/16, timed inside the forward."""
    import timm

    from tokred.adapters.encoder import block as adapter_block

    torch.manual_seed(0)
    model: Any = timm.create_model("vit_small_patch16_224").eval()
    x = torch.randn(8, 3, 224, 224)
    full = arms_of.unpatched(model, x.shape)
    found = {name: arm for name in names if name in OVERHEAD and (arm := tried(model, OVERHEAD[name], x)) is not None}
    entered = [full, *found.values()]
    watch = timing.Watch()
    own = [[0.0] * args.rounds for _ in entered]

    def run(_: int) -> None:
        watch.clear()
        model(x)

    def collect(arm: int, i: int, _: None) -> None:
        own[arm][i] = watch.total()

    with ExitStack() as stack:
        for name in ("decide", "follow"):
            stack.enter_context(watch.around(adapter_block, name, "own"))
        enters = [lambda arm=arm: arm.applied(model) for arm in entered]
        seconds = timing.paired(enters, run, args.rounds, collect=collect)
    where = {"batch": len(x), "weights": "random", "rounds": args.rounds, **results.here("cpu", torch.float32)}
    rows = []
    for arm, mine, spent, faster in zip(entered, own, seconds, timing.ratios(seconds), strict=True):
        row: dict[str, Any] = {"model": "vit_small_patch16_224", "method": arm.name, "setting": arm.setting, **where}
        row |= {"tokens_out": arm.tokens_out, "gmacs_share": arm.macs / full.macs}
        row |= results.spread("own_work", [a / b for a, b in zip(mine, spent, strict=True)])
        row |= results.spread("ms", [1e3 * s for s in spent]) | results.spread("speedup", faster)
        rows.append(row)
    save(rows[1:], "overhead", args)


def main() -> int:
    """Run what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["embedded", "dinov2", "overhead"], help="default: all three")
    parser.add_argument("--methods", help="with commas; default: all")
    parser.add_argument("--count", type=int, default=1000, help="images of the embedded sample")
    parser.add_argument("--probe", type=int, default=200, help="labelled images to test DINOv2's probe on")
    parser.add_argument("--size", type=int, default=168, help="height and width of DINOv2's images")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="the embedded model, two methods, 20 images, one round")
    saving(parser)
    args = parser.parse_args()
    if args.quick:
        args.only, args.methods, args.count, args.rounds = ["embedded"], "downsample,evit", 20, 1
        for name in ("downsample", "evit"):
            CANDIDATES[name] = candidates(name)[::9]
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.methods.split(",") if args.methods else every_method()
    unknown = [n for n in names if n not in every_method()]
    if unknown:
        parser.error(f"--methods names {', '.join(unknown)}; known are {', '.join(every_method())}")
    for part in args.only or ["overhead", "embedded", "dinov2"]:
        if part == "overhead":
            run_overhead(names, args)
        else:
            run_bench(part, names, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
