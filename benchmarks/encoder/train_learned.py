"""Train methods with weights on the embedded default, and measure them beside others at equal work.

    python -m benchmarks encoder/train_learned cropr dynamicvit --photos FOLDER --out trained
    python -m benchmarks encoder/train_learned cropr tome evit random_prune --photos FOLDER --out trained --steps 400

Every name is a recipe of tokred (or the path of a TOML file), or a method without weights, which is then trained with:
by the first recipe, but for what only its method has. Each is trained at every share of ``--shares`` and with every
seed of ``--seeds``. The same command goes on where it was stopped: within a training from its last checkpoint, and
rows that are there are not made again.

It prints a table: top-1 on the first ``--test`` pictures of the sample that travels with tokred, the mean of the seeds
with its standard error; the tokens that an image has after the last block; and the work, the multiply-adds of all
blocks of an image as a share of the dense model's. Below stand ToMe, EViT and random pruning at the same shares without
any training. The rows of every seed are in ``rows.jsonl``. The training pictures are drawn as for the embedded model
itself; see ``encoder/train_embedded`` for the two folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from benchmarks.encoder.train_embedded import Data
from tokred import adapters, learn
from tokred.bench import embedded
from tokred.bench.data.model import SIZE
from tokred.learn.recipe import FOLDER
from tokred.learn.training import Samples, train

BESIDE = ("tome", "evit", "random_prune")
ROWS = "rows.jsonl"
# The parameter that decides how much is removed, and its values, the most work first.
AMOUNTS: dict[str, tuple[str, list[float]]] = {
    "cropr": ("r", list(range(1, 60))),
    "dtem": ("r", list(range(1, 60))),
    "dynamicvit": ("rho", [k / 100 for k in range(99, 1, -1)]),
    "evit": ("kappa", [k / 100 for k in range(99, 1, -1)]),
    "random_prune": ("r", list(range(1, 60))),
    "tome": ("r", list(range(1, 60))),
}


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Top-1, tokens after the last block, and the share of the dense blocks' work."""
    hits, tokens, work, full = 0, 0.0, 0, 0
    host = adapters.find(model)
    dense = host.plan(None, (1, *images.shape[1:]))
    uneven = any(method.uneven for method in tokred.patched(model))
    size = 1 if uneven else 100  # padding of a batch is no token
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        hits += int((model(x).argmax(1) == y).sum())
        full += len(x) * sum(macs for _, _, macs in dense)
        if tokred.patched(model):
            found = tokred.report(model)
            tokens += len(x) * found.layers[-1].tokens_out
            work += len(x) * found.macs
        else:
            tokens += len(x) * dense[-1][1]
            work = full
    return hits / len(labels), tokens / len(labels), work / full


def setting(name: str, share: float, model: nn.Module, **more: Any) -> tokred.Method:
    """The method whose blocks do the most work that is at most ``share`` of the dense ones', or a hundredth more.

    Args:
        name: of :data:`AMOUNTS`.
        share: of the multiply-adds.
        model: without a patch.
        more: other parameters of the method.

    Raises:
        ValueError: even the least work of this method is more.
    """
    host = adapters.find(model)
    dense = sum(macs for _, _, macs in host.plan(None, embedded.SHAPE))
    parameter, values = AMOUNTS[name]
    for value in values:
        method = tokred.make(name, **{**more, parameter: value})
        if sum(macs for _, _, macs in host.plan(method, embedded.SHAPE)) / dense <= share + 0.01:
            return method
    raise ValueError(f"{name} has no setting for {share:.0%} of the work")


def recipes(names: Sequence[str], steps: int, batch: int) -> dict[str, learn.Recipe]:
    """The recipes by the names that were given; a method without weights takes the first one's numbers.

    Raises:
        ValueError: a name is neither a recipe nor a method, or no recipe comes before a method.
    """
    found: dict[str, learn.Recipe] = {}
    for name in names:
        if name.endswith(".toml") or (FOLDER / f"{name}.toml").exists():
            one = learn.recipe(name)
        elif not found:
            raise ValueError(f"{name!r} is no recipe: the first name has to be one, since others train like it")
        else:
            tokred.make(name)
            # Nothing of the method learns, and no soft decisions say which tokens are to be like the teacher's.
            like = next(iter(found.values()))
            one = dataclasses.replace(like, method=name, parameters={}, lr_method=None, tokens=0.0, schedule={})
        numbers = {"steps": steps, "batch": batch}
        found[Path(name).stem] = dataclasses.replace(one, **{k: v for k, v in numbers.items() if v})
    return found


def at_share(recipe: learn.Recipe, share: float, model: nn.Module) -> learn.Recipe:
    """The recipe whose method does this share of the work; as it is where the amount is what it learns."""
    if recipe.method not in AMOUNTS:
        return recipe
    method = setting(recipe.method, share, model, **recipe.parameters)
    parameter = AMOUNTS[recipe.method][0]
    value = method.to_dict()["parameters"][parameter]
    return dataclasses.replace(recipe, parameters={**recipe.parameters, parameter: value})


class Pictures:
    """Numbers of garments: their pictures are drawn for a whole batch at once.

    Args:
        data: of ``encoder/train_embedded``.
    """

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures ``(B, 3, SIZE, SIZE)`` and labels ``(B,)``, by draws of torch's own generator."""
        index = torch.tensor(rows)
        return self.data.batch(index, SIZE)[0], self.data.labels[index]


def runs(args: argparse.Namespace, plain: nn.Module) -> Iterator[tuple[dict[str, Any], learn.Recipe]]:
    """Every training: what it is called, and its recipe."""
    for name, recipe in recipes(args.names, args.steps, args.batch).items():
        done = set()
        for share in args.shares:
            one = at_share(recipe, share, plain)
            # One whose amount is learned is the same at every share.
            if repr(one.parameters) in done:
                continue
            done.add(repr(one.parameters))
            for seed in args.seeds:
                yield {"name": name, "share": share, "seed": seed}, dataclasses.replace(one, seed=seed)


def trained(recipe: learn.Recipe, samples: Samples, folder: Path, every: int) -> nn.Module:
    """The embedded default, trained by a recipe; it goes on from the folder's checkpoint."""
    start = time.time()

    def each(i: int, step: learn.Step) -> None:
        if i % 50 == 0 or i == recipe.steps - 1:
            terms = ", ".join(f"{k} {v:.4f}" for k, v in step.terms.items())
            print(f"  {time.time() - start:5.0f} s step {i}: loss {step.loss:.4f} ({terms})", flush=True)

    return train(embedded.load(), samples, recipe, folder, every=every, each=each).model


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table: one for each setting, the mean of its seeds and the standard error of that mean."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["name"], row["share"]), []).append(row)
    lines = [f"{'setting':52} {'top-1':>16} {'tokens':>7} {'work':>7}"]
    for some in found.values():
        top1 = [row["top1"] for row in some]
        error = f" ±{statistics.stdev(top1) / len(top1) ** 0.5:.4f}" if len(top1) > 1 else ""
        tokens, work = (statistics.mean(row[key] for row in some) for key in ("tokens", "work"))
        label = f"{some[0]['setting']}{some[0]['how']}"
        lines.append(f"{label:52} {f'{statistics.mean(top1):.4f}{error}':>16} {tokens:>7.1f} {work:>7.1%}")
    return lines


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="recipes of tokred or TOML files, then methods without weights")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoints and rows")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33], help="of the multiply-adds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", tokred.NothingRemovedWarning)
    plain = embedded.load()
    wanted = list(runs(args, plain))  # what cannot be is said before anything is trained
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ROWS
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    pictures = Pictures(Data(args.fashion, args.photos))
    samples = Samples(pictures, pictures.collate)
    xt, yt = embedded.sample(args.test)

    def add(row: dict[str, Any], setting: str, how: str, model: nn.Module) -> None:
        top1, tokens, work = measure(model, xt, yt)
        rows.append({**row, "setting": setting, "how": how, "test": len(yt), "top1": top1, "tokens": tokens,
                     "work": work})  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    def there(row: dict[str, Any]) -> bool:
        return any(all(found.get(key) == value for key, value in row.items()) for found in rows)

    for row, recipe in wanted:
        row = {**row, "steps": recipe.steps, "batch": recipe.batch}
        if there(row):
            continue
        print(f"{row['name']} at {row['share']:.0%} of the work, seed {row['seed']}", flush=True)
        folder = args.out / f"{row['name']}-{row['share']}-{row['seed']}"
        model = trained(recipe, samples, folder, args.every)
        add(row, str(tokred.patched(model)[0]), ", trained", model)
    dense = {"name": "dense", "share": 1.0, "seed": 0}
    if not there(dense):
        add(dense, "the model as it is", "", plain)
    for name in BESIDE:
        for share in args.shares:
            row = {"name": f"{name}, untrained", "share": share, "seed": 0}
            if there(row):
                continue
            try:
                method = setting(name, share, plain)
            except ValueError as error:  # a method that cannot do with so little is no reason to stop
                print(f"left out: {error}")
                continue
            with tokred.applied(plain, method):
                add(row, str(method), "", plain)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
