"""Train methods with weights on the embedded default or on DINOv2-S, and measure them beside others at equal work.

    python -m benchmarks encoder/train_learned cropr dynamicvit --photos FOLDER --out trained
    python -m benchmarks encoder/train_learned cropr tome evit class_attention random_prune downsample dense smaller ...
    python -m benchmarks encoder/train_learned dense tome evit pitome --model dinov2 --steps 60 --batch 16 --lr 2e-5 ...

Every name is a recipe of tokred (or the path of a TOML file), or one that is trained by the first recipe's numbers, but
for what only its method has: a method without weights, ``class_attention`` (EViT without the fused token), ``dense``
(the model as it is, trained as long) or ``smaller`` (fewer blocks and neurons, no token removed, at ten times the
rate). Without a recipe, ``--steps``, ``--batch`` and ``--lr`` say it all, and the labels alone teach. Each is trained
at every share of ``--shares`` and with every seed of ``--seeds``, one seed of everything before the next. The same
command goes on where it was stopped: within a training from its last checkpoint, and rows that are there are not made
again.

``--model dinov2`` is ViT-S/14 of the zoo on scenes of 56 pixels that are shown as 112: 64 tokens, of which a garment
covers about 16. It has no classifier: a linear one of the class token is fitted first, on ``--fitted`` scenes, while
the model stays as it is; that is the dense model without training.

It prints a table: top-1 on the first ``--test`` pictures of the sample that travels with tokred (for ``dinov2``, as
many garments of the same test set on the same photographs), the mean of the seeds with its standard error; how much of
the garments' patches is left behind the last block (merged tokens are), the tokens and the work, the multiply-adds of
all blocks of an image as a share of the dense model's. Below stand the methods without weights at the same shares
without any training. The rows of every seed are in ``rows.jsonl``; ``--table`` adds their means to a table of results,
and ``--rounds`` times the first seed's models: how many times as fast as the dense one they are, paired, and what share
of that deciding takes. The training pictures are drawn as for the embedded model itself; see ``encoder/train_embedded``
for the two folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from benchmarks.encoder import clutter
from benchmarks.encoder.learned_arms import DENSE, LABELLED, Arm, at_share, before_blocks, recipes, setting, work
from benchmarks.encoder.learned_models import LOOKS, Look, subject
from benchmarks.encoder.learned_times import Spreads, times
from benchmarks.encoder.train_embedded import Data
from tokred import adapters, learn
from tokred.bench import results
from tokred.bench.intervals import student
from tokred.learn.training import Samples, train
from tokred.learn.training.checkpoint import NAME as CHECKPOINT

AT = 25  # pictures of a batch that is timed
BESIDE = ("tome", "evit", "pitome", "class_attention", "random_prune", "downsample")
EMBEDDED = "embedded"  # the model of rows that name none
ROWS, TIMES = "rows.jsonl", "times.json"
UNTRAINED = ", untrained"


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, labels: Tensor, garments: Tensor, full: int) -> dict[str, Any]:
    """Top-1, the share of the garments' patches that is left, tokens after the last block, and the work.

    Args:
        model: patched or not.
        images: ``(N, 3, H, W)``.
        labels: ``(N,)``.
        garments: ``(N, P)`` bool, patches that count.
        full: multiply-adds of the dense model's blocks for one image.
    """
    hits, left, tokens, done = 0, 0, 0.0, 0.0
    host, patched = adapters.find(model), bool(tokred.patched(model))
    dense = host.plan(None, (1, *images.shape[1:]))
    own = before_blocks(next(iter(tokred.modules(model).values()), None), garments.shape[1]) if patched else 0
    size = 1 if any(method.uneven for method in tokred.patched(model)) else 100  # padding of a batch is no token
    for x, y, shown in zip(images.split(size), labels.split(size), garments.split(size), strict=True):
        hits += int((model(x).argmax(1) == y).sum())
        found = tokred.report(model) if patched else None
        if found is not None and found.layers[-1].tokens_out < host.tokens(tuple(x.shape)):
            stays = tokred.trace(model).index[:, host.prefix :] >= 0
            left += int((stays & shown).sum())
        else:
            left += int(shown.sum())
        tokens += len(x) * (dense[-1][1] if found is None else found.layers[-1].tokens_out)
        done += len(x) * (sum(macs for _, _, macs in dense) if found is None else own + found.macs)
    n = len(labels)
    return {"top1": hits / n, "recall": left / int(garments.sum()), "tokens": tokens / n, "work": done / n / full,
            "at": size}  # fmt: skip


class Pictures:
    """Numbers of garments: their pictures are drawn for a whole batch at once.

    Args:
        data: of ``encoder/train_embedded``.
        look: how the model sees them.
        of_patches: labels are those of the patches, 1 where a garment covers at least a half, and not the classes.
    """

    def __init__(self, data: Data, look: Look, of_patches: bool = False) -> None:
        self.data, self.look, self.of_patches = data, look, of_patches

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures ``(B, 3, H, W)`` and labels ``(B,)``, of patches ``(B, G, G)``, by draws of torch's generator."""
        data, look = self.data, self.look
        scenes = clutter.draw(torch.tensor(rows), data.photos, look.size)
        pictures = look.pictures(scenes, data.garments, data.photos)
        if not self.of_patches:
            return pictures, data.labels[scenes.garment]
        return pictures, look.shown(scenes, data.garments).long()


def runs(args: argparse.Namespace, plain: nn.Module, images: Tensor) -> Iterator[tuple[dict[str, Any], Arm]]:
    """Every training: what it is called, and its model and recipe; one seed of all before the next."""
    found: list[Arm] = []
    for name, recipe in recipes(args.names, args.steps, args.batch, args.lr, labels=args.labels).items():
        for share in args.shares:
            try:
                arm = at_share(name, recipe, share, plain, images[:20])
            except ValueError as error:  # a method that cannot do with so little is no reason to stop
                print(f"left out: {error}")
                continue
            # One whose amount is learned, or that removes nothing, may be the same at every share.
            if not any(a.name == name and (a.share, a.recipe) == (arm.share, arm.recipe) for a in found):
                found.append(arm)
    for seed in args.seeds:
        for arm in found:
            recipe = dataclasses.replace(arm.recipe, seed=seed)
            called = {"model": args.model, "name": arm.name, "share": arm.share, "seed": seed}
            yield called, dataclasses.replace(arm, recipe=recipe)


def trained(arm: Arm, samples: Samples, folder: Path, every: int, plain: nn.Module) -> tuple[nn.Module, float]:
    """The model of an arm, trained by its recipe, from the folder's checkpoint on; and seconds of the processor."""
    start = time.process_time()

    def each(i: int, step: learn.Step) -> None:
        if i % 50 == 0 or i == arm.recipe.steps - 1:
            terms = ", ".join(f"{k} {v:.4f}" for k, v in step.terms.items())
            print(f"  {time.process_time() - start:5.0f} s step {i}: loss {step.loss:.4f} ({terms})", flush=True)

    made = train(arm.build(), samples, arm.recipe, folder, every=every, each=each, teacher=plain).model
    return made, time.process_time() - start


def untrained(arm: Arm) -> nn.Module:
    """The model of an arm before its training: as fast as after it, where nothing of the method has weights."""
    return tokred.apply(arm.build(), arm.recipe.method, **arm.recipe.parameters)


def folder_of(row: Mapping[str, Any]) -> str:
    """The name of the folder of a training."""
    model = "" if row["model"] == EMBEDDED else row["model"] + "-"
    return f"{model}{row['name']}-{row['share']}-{row['seed']}"


def called(name: str, share: float) -> str:
    """What the times of a setting stand under."""
    return f"{name} {share:g}"


def seeds_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """The rows of each model, name and share, one a seed."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row.get("model", EMBEDDED), row["name"], row["share"]), []).append(row)
    return found


def error_of(values: Sequence[float]) -> float:
    """The standard error of the mean of two values or more."""
    return statistics.stdev(values) / len(values) ** 0.5


def records(rows: Sequence[dict[str, Any]], timed: Mapping[str, Spreads] | None = None) -> list[dict[str, Any]]:
    """Records of the results: each setting once, the mean of its seeds with its 95 % interval.

    Args:
        rows: one a seed.
        timed: rounds by :func:`called`; without weights a setting is as fast as with them.
    """
    made = []
    for (model, name, share), some in seeds_of(rows).items():
        one = {
            "model": model,
            "method": "unpatched" if name == DENSE else some[0]["method"],
            "setting": some[0]["setting"],
            "case": name.replace(", ", "-"),
            "weights": "trained" if some[0]["steps"] else "default",
            "goal": share,
            "length": some[0]["steps"] * some[0]["batch"],
            "batch": some[0]["at"],
        }
        images = sum(row["test"] for row in some)
        for key, metric in (("top1", "top1"), ("recall", "recall")):
            values = [row[key] for row in some]
            if len(values) > 1:
                # A standard error of few seeds is uncertain itself.
                mean, half = statistics.mean(values), student(len(values) - 1) * error_of(values)
                one |= results.between(metric, mean, max(0.0, mean - half), min(1.0, mean + half))
            elif metric == "top1":
                one |= results.share(metric, round(values[0] * images), images)
            else:
                one[metric] = values[0]
            one[f"{metric}_count"] = images
        for key, metric in (("tokens", "tokens_out"), ("work", "gmacs_share")):
            one[metric] = statistics.mean(row[key] for row in some)
        for metric, values in (timed or {}).get(called(name.removesuffix(UNTRAINED), share), {}).items():
            one |= results.spread(metric, values)
        made.append({**one, **some[0]["where"]})
    return made


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table: one for each setting, the mean of its seeds and the standard error of that mean."""
    lines = [f"{'setting':58} {'top-1':>16} {'garments':>8} {'tokens':>7} {'work':>7}"]
    for (_, name, _), some in seeds_of(rows).items():
        top1 = [row["top1"] for row in some]
        error = f" ±{error_of(top1):.4f}" if len(top1) > 1 else ""
        recall, tokens, done = (statistics.mean(row[key] for row in some) for key in ("recall", "tokens", "work"))
        label = f"{name}: {some[0]['setting']}"
        lines.append(
            f"{label:58} {f'{statistics.mean(top1):.4f}{error}':>16} {recall:>8.1%} {tokens:>7.1f} {done:>7.1%}"
        )
    return lines


def parsed() -> argparse.Namespace:
    """What the script is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="recipes of tokred or TOML files, then what trains like the first")
    parser.add_argument("--model", choices=tuple(LOOKS), default=EMBEDDED)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoints and rows")
    parser.add_argument("--table", type=Path, help="table of results that the means are put into")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33], help="of the multiply-adds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--lr", type=float, default=0.0, help="of the model's weights, where they learn")
    parser.add_argument("--labels", action="store_true", help="the labels alone teach, whatever the recipes say")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--rounds", type=int, default=0, help="of timing what the first seed has trained")
    parser.add_argument("--fitted", type=int, default=1000, help="pictures that the head of dinov2 is fitted on")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """The script."""
    args = parsed()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", tokred.NothingRemovedWarning)
    data = Data(args.fashion, args.photos)
    on = subject(args.model, data, args.test, args.fitted, args.out)
    plain, look, full = on.model, LOOKS[on.name], work(on.model, None)
    wanted = list(runs(args, plain, on.images))  # what cannot be is said before anything is trained
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ROWS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [{"model": EMBEDDED, **json.loads(line)} for line in lines]
    by_class, by_patch = Pictures(data, look), Pictures(data, look, of_patches=True)
    samples = {False: Samples(by_class, by_class.collate), True: Samples(by_patch, by_patch.collate)}

    def add(row: dict[str, Any], setting: str, method: str, model: nn.Module, seconds: float) -> None:
        found = measure(model, on.images, on.labels, on.shown, full)
        where = results.here("cpu", torch.float32)
        rows.append({**row, "setting": setting, "method": method, **found, "seconds": seconds, "where": where})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    def there(row: dict[str, Any]) -> bool:
        return any(all(found.get(key) == value for key, value in row.items()) for found in rows)

    test = len(on.labels)
    plan = {"model": on.name, "name": DENSE + UNTRAINED, "share": 1.0, "seed": 0}
    plan |= {"steps": 0, "batch": 0, "test": test}
    if not there(plan):
        add(plan, "", "unpatched", plain, 0.0)
    for name in BESIDE:
        for share in args.shares:
            row = {**plan, "name": name + UNTRAINED, "share": share}
            if there(row):
                continue
            try:
                method = setting(name, share, plain)
            except ValueError:  # said before
                continue
            with tokred.applied(plain, method):
                add(row, str(method), method.name, plain, 0.0)
    for row, arm in wanted:
        row = {**row, "steps": arm.recipe.steps, "batch": arm.recipe.batch, "test": test}
        if there(row):
            continue
        print(f"{row['name']} at {row['share']:.0%} of the work, seed {row['seed']}", flush=True)
        folder = args.out / folder_of(row)
        model, seconds = trained(arm, samples[arm.recipe.method in LABELLED], folder, args.every, plain)
        method = tokred.patched(model)[0]
        add(row, str(method) if method.removes(adapters.find(model).depth) else "", method.name, model, seconds)
        if on.name != EMBEDDED:  # hundreds of megabytes each, and nothing goes on from here
            (folder / CHECKPOINT).unlink(missing_ok=True)
    print("\n".join(table(rows)))
    beside = args.out / TIMES
    if args.rounds:
        models = {}
        for row, arm in wanted:
            if row["seed"] == args.seeds[0]:
                folder, labelled = args.out / folder_of(row), arm.recipe.method in LABELLED
                kept = (folder / CHECKPOINT).exists()
                model = trained(arm, samples[labelled], folder, args.every, plain)[0] if kept else untrained(arm)
                models[called(row["name"], row["share"])] = model.eval()
        beside.write_text(json.dumps(times(models, plain, on.images, args.rounds, AT)), encoding="utf-8")
    if args.table is not None:
        timed = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
        results.write(args.table, records(rows, timed), "learned", overwrite=True)


if __name__ == "__main__":
    main()
