"""Train a method with weights on the embedded default by a recipe, and measure it beside methods without.

    python -m benchmarks encoder/train_learned dynamicvit --fashion FOLDER --photos FOLDER --out trained

The training pictures are drawn as for the embedded model itself, see ``encoder/train_embedded`` for the two folders.
Accuracy is top-1 on the first ``--test`` pictures of the sample that travels with tokred;
tokens are the mean that every image has after the last
block, and work is the multiply-adds of all blocks of one image, as a share of the dense model's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import tokred
from benchmarks.encoder.train_embedded import Data
from tokred import adapters, learn
from tokred.bench import embedded
from tokred.bench.data.model import SIZE


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


def setting(name: str, share: float, model: nn.Module) -> tokred.Method:
    """The training-free method whose blocks do the most work that is at most ``share`` of the dense ones'."""
    best, at = None, 0.0
    host = adapters.find(model)
    dense = sum(macs for _, _, macs in host.plan(None, embedded.SHAPE))
    choices = {
        "tome": [{"r": r} for r in range(1, 25)],
        "random_prune": [{"r": r} for r in range(1, 25)],
        "evit": [{"kappa": k / 100} for k in range(20, 100, 2)],
    }[name]
    for parameters in choices:
        method = tokred.make(name, **parameters)
        work = sum(macs for _, _, macs in host.plan(method, embedded.SHAPE)) / dense
        if at < work <= share + 0.01:
            best, at = method, work
    if best is None:
        raise ValueError(f"{name} has no setting for {share:.0%} of the work")
    return best


def train(name: str, args: argparse.Namespace, data: Data) -> nn.Module:
    """The embedded default, trained by a recipe."""
    recipe = learn.recipe(name)
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    torch.manual_seed(recipe.seed)
    model = embedded.load()
    teacher = copy.deepcopy(model)
    tokred.apply(model, recipe.method, **recipe.parameters)
    start = time.time()

    def each(i: int, step: learn.Step) -> None:
        if i % 50 == 0 or i == recipe.steps - 1:
            terms = ", ".join(f"{k} {v:.4f}" for k, v in step.terms.items())
            print(f"{time.time() - start:5.0f} s step {i}: loss {step.loss:.4f} ({terms})", flush=True)

    def patches(model: nn.Module) -> Tensor:
        gate = tokred.trace(model).gate
        return torch.cat([torch.zeros_like(gate[:, :1]), gate[:, 1:]], 1)  # without the class token

    order = torch.arange(len(data.labels))
    batches = ((data.batch(i, SIZE)[0], b) for i, b in learn.endless(order, data.labels, recipe.batch, recipe.seed))
    learn.fit(
        model, batches, recipe, modules=tokred.modules(model).values(), losses=tokred.losses, teacher=teacher,
        tokens="norm", gate=patches, each=each,
    )  # fmt: skip
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe of tokred by its name, or the path of a TOML file")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's folder of pictures")
    parser.add_argument("--out", type=Path, help="folder for the trained weights and settings")
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", tokred.NothingRemovedWarning)
    xt, yt = embedded.sample(args.test)
    plain = embedded.load()
    rows = [("dense", measure(plain, xt, yt))]
    model = train(args.recipe, args, Data(args.fashion, args.photos))
    rows.append((f"{args.recipe}, trained", measure(model, xt, yt)))
    share = rows[-1][1][2]
    if args.out:
        print("saved in", tokred.save(model, args.out / args.recipe))
    weights = tokred.remove(copy.deepcopy(model))
    rows.append(("its weights, dense", measure(weights, xt, yt)))
    for name in ("evit", "tome", "random_prune"):
        try:
            method = setting(name, share, plain)
        except ValueError as error:  # a method that cannot do with so little is no reason to lose what was trained
            print(f"left out: {error}")
            continue
        with tokred.applied(plain, method):
            rows.append((f"{method}", measure(plain, xt, yt)))
        with tokred.applied(weights, method):
            rows.append((f"{name}, on its weights", measure(weights, xt, yt)))
    for label, (top1, tokens, work) in rows:
        print(f"{label:70} top-1 {top1:.4f}  tokens {tokens:6.1f}  work {work:.1%}")


if __name__ == "__main__":
    main()
