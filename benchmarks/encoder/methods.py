"""Every vision method beside every other: at equal multiply-adds, at equal measured time, and what choosing costs.

Three scenarios:

- ``methods``, on the embedded model and on DINOv2 (``--probe 150 --rounds 7`` in the committed table): quality, speed
  and memory by ``tokred.benchmark``, every method at a few shares of the model's multiply-adds. Where the number of
  tokens depends on the image, the multiply-adds are those of the images that were tried, not an estimate. DINOv2 is
  judged by a linear probe on Fashion-MNIST, and on photos by its features and by the map that a saliency decoder, which
  was trained on it, draws from its tokens at full length.
- ``bench``: a few settings of DINOv2 at 224 pixels, by the same map.
- ``overhead``: ViT-S/16 at 224, batch 8, random weights, near 60 % of the multiply-adds: the share of the forward that
  each method's own work takes, deciding and merging, timed inside the forward.

``python -m benchmarks pages`` makes ``docs/methods/comparison.md`` and its plots from them.

    python -m benchmarks.zoo.fetch dinov2 skimage fashion
    python -m benchmarks encoder/methods --threads 2 --out benchmarks/results/encoder.csv --overwrite    # everything
    python -m benchmarks encoder/methods --only embedded --methods tome,saint --count 400
    python -m benchmarks encoder/methods --only maps
    python -m benchmarks encoder/methods --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred
from benchmarks.engine import Record, measured, threads
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, data, dinov2
from benchmarks.zoo.evaluate import map_error
from tokred.bench import arms as arms_of
from tokred.bench import embedded, probe, results, timing
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
    "random_prune": [f"random_prune r={r}" for r in range(2, 34)],
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


SETTINGS = ("tome r=8", "tome r=12", "tome r=20", "random r=12", "random_prune r=12")  # of the scenario "bench"


@torch.inference_mode()
def tried(model: nn.Module, text: str, images: Tensor) -> Arm | None:
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


def near_shares(model: nn.Module, names: Sequence[str], images: Tensor, shares: Sequence[float]) -> list[Arm]:
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


# ------------------------------------------------------------------------------------------ what is judged


def classified(model: Any, batch: Any) -> dict[str, Tensor]:
    """Features ``(B, F)`` in front of the head, and the logits of them."""
    features = model.forward_head(model.forward_features(batch[0]), pre_logits=True)
    return {"features": features, "logits": model.head(features)}


def encoded(model: Any, batch: Any) -> Tensor:
    """Tokens ``(B, N, C)``; of full length where the setting says ``expose=last``."""
    found: Tensor = model.forward_features(batch[0])
    return found


def described(tokens: Tensor) -> Tensor:
    """DINOv2's features ``(B, 2 C)``: the class token, and the mean of the patches."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def cosine(output: Mapping[str, Tensor], batch: Any, dense: Mapping[str, Tensor]) -> Tensor:
    """``(B,)`` of features."""
    return F.cosine_similarity(output["features"], dense["features"], dim=1)


def map_measure(name: str) -> Callable[..., Tensor]:
    """A measure of a map beside the unpatched model's, picture by picture."""

    def measure(output: Mapping[str, Tensor], batch: Any, dense: Mapping[str, Tensor]) -> Tensor:
        pairs = zip(dense["map"].split(1), output["map"].split(1), strict=True)
        return torch.tensor([getattr(map_error(a, b), name) for a, b in pairs])

    measure.__name__ = f"saliency_{name}"
    return measure


MAPS = {f"saliency_{name}": map_measure(name) for name in ("mae", "correlation", "iou")}


def on_photos(model: nn.Module, chosen: Mapping[str, str], size: int, **options: Any) -> list[Record]:
    """Features and maps of DINOv2 on photos, beside the unpatched model's."""
    found = data.normalise(data.photos(size, ("sklearn", "skimage", "imagenet")).images)
    head = dinov2.load_saliency_head()

    def read(tokens: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"features": described(tokens), "map": head(tokens[:, 1:], size)}

    batches = [(part,) for part in found.split(9)]
    more = {"input": f"{size}x{size}", "weights": "trained", "photos": f"{len(found)} photos"}
    metrics = {"cosine": cosine, **MAPS}
    source = {"name": "dinov2", "data_from": carriers.cited("dinov2", "skimage"), "more": more}
    return measured(model, chosen, batches, metrics, run=encoded, read=read, **source, **options)


def probed(model: nn.Module, chosen: Mapping[str, str], args: argparse.Namespace) -> list[Record]:
    """Top-1 of a linear probe on DINOv2's features, fitted to the unpatched model's of other pictures."""
    train, test = (
        data.as_rgb(data.split(data.fashion_mnist(part), args.probe, 0)[0], args.size) for part in ("train", "test")
    )
    with torch.inference_mode():
        seen = [described(encoded(model, (data.normalise(part),))) for part in train.images.split(args.batch)]
    fitted = probe.fit(torch.cat(seen), train.labels)

    def top1(tokens: Tensor, batch: Any) -> Tensor:
        return (fitted.logits(described(tokens)).argmax(1) == batch[1]).double()

    parts = zip(data.normalise(test.images).split(args.batch), test.labels.split(args.batch), strict=True)
    more = {"answered_by": "linear probe", "data": "Fashion-MNIST", "batch": args.batch, "chance": chance(test.labels)}
    source = {"name": "dinov2", "data_from": carriers.cited("dinov2", "skimage", "fashion"), "more": more}
    return measured(model, chosen, [*parts], {"top1": top1}, run=encoded, rounds=args.rounds, **source)


def chance(labels: Tensor) -> float:
    """Share of the largest class."""
    return labels.bincount().max().item() / len(labels)


# ---------------------------------------------------------------------------------------------- scenarios


def run_embedded(names: Sequence[str], args: argparse.Namespace) -> None:
    """Quality, speed and memory of the embedded model."""
    model, sample = embedded.load(), embedded.sample(args.count)
    arms = near_shares(model, runs_on(model, names), sample.images[:8], SHARES["embedded"])
    batches = [*zip(sample.images.split(args.batch), sample.labels.split(args.batch), strict=True)]
    more = {"input": "x".join(map(str, embedded.SHAPE[2:])), "weights": "trained", "answered_by": "head"}
    more |= {"data": embedded.NAME, "photos": embedded.NAME, "batch": args.batch, "chance": chance(sample.labels)}
    metrics = {"top1": "top1", "cosine": cosine}
    rows = measured(
        model, {arm.label: arm.label for arm in arms[1:]}, batches, metrics, name="embedded", more=more,
        run=classified, rounds=args.rounds,
    )  # fmt: skip
    save(finished(rows, arms, args), "methods", args)


def run_dinov2(names: Sequence[str], args: argparse.Namespace) -> None:
    """The same of DINOv2: a probe, by which speed is measured too, and photos."""
    model = dinov2.load_timm(args.size)
    sample = data.normalise(data.as_rgb(data.split(data.fashion_mnist("test"), 8, 0)[0], args.size).images)
    arms = near_shares(model, runs_on(model, names), sample, SHARES["dinov2"])
    chosen = {arm.label: f"{arm.label} expose=last" for arm in arms[1:]}
    seen = {key(row): row for row in on_photos(model, chosen, args.size, rounds=1)}
    rows = [{**seen.get(key(row), {}), **row} for row in probed(model, chosen, args)]
    save(finished(rows, arms, args), "methods", args)


def run_maps(args: argparse.Namespace) -> None:
    """The maps of a few settings at 224 pixels."""
    model = dinov2.load_timm(224)
    chosen = {text: f"{text} expose=last" for text in SETTINGS}
    arms = [arms_of.unpatched(model, (1, 3, 224, 224))]
    arms += [arms_of.arm(model, (1, 3, 224, 224), name, **given) for name, given in map(parse_setting, SETTINGS)]
    rows = on_photos(model, chosen, 224, rounds=args.rounds)
    save(finished(rows, arms, argparse.Namespace(batch=9)), "bench", args)


def runs_on(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Methods that run on the model; of the others it is told why not."""
    rows = {row.method: row for row in tokred.supports(model)}
    for name in names:
        if not rows[name].works:
            print(f"left out: {name}: {rows[name].reason}", file=sys.stderr)
    return [name for name in names if rows[name].works]


def key(row: Mapping[str, Any]) -> str:
    """Method and setting."""
    return f"{row['method']} {row['setting']}".strip()


def finished(rows: Sequence[Record], arms: Sequence[Arm], args: argparse.Namespace) -> list[Record]:
    """Rows with the work that their settings took on the images that were tried, and their rate."""
    of = {arm.label: arm for arm in arms}
    for row in rows:
        arm = of[key(row)]
        row |= {"tokens_in": arm.tokens_in, "tokens_out": arm.tokens_out, "gmacs": arm.macs / 1e9}
        row |= {"gmacs_share": arm.macs / arms[0].macs, "images_per_second": args.batch / row.pop("seconds")}
        if "chance" in row:
            row["top1_images"] = row["top1_count"]
    return [*rows]


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


PARTS: dict[str, Callable[[Sequence[str], argparse.Namespace], None]] = {
    "overhead": run_overhead,
    "embedded": run_embedded,
    "dinov2": run_dinov2,
    "maps": lambda names, args: run_maps(args),
}


def main() -> int:
    """Run what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS], help="default: all")
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
    threads(args.threads)
    names = args.methods.split(",") if args.methods else every_method()
    unknown = [n for n in names if n not in every_method()]
    if unknown:
        parser.error(f"--methods names {', '.join(unknown)}; known are {', '.join(every_method())}")
    for part in args.only or PARTS:
        PARTS[part](names, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
