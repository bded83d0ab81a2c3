"""Shares of a forward that deciding takes, at the sizes at which vision transformers are used, by every learned method.

    python -m benchmarks encoder/learned_deciding --threads 1 --out benchmarks/results/encoder.csv
    python -m benchmarks encoder/learned_deciding avit random_prune --case vit_base_patch16_224 --batch 8

Weights are random, the models' and the methods': that changes what is kept, and neither how much nor the time. Each
method is set to a half of the blocks' multiply-adds, by its plan, and A-ViT by a search of its ``beta``; DoViT's heads
are sure of nothing before they learn, so that no token leaves. Methods whose samples keep different numbers of tokens
run on one picture at a time, whatever the batch. ``random_prune`` and ``evit`` stand beside them as what deciding costs
where almost nothing is reckoned. Seconds are those that the processor spends on this process. ``decision_work`` counts
the multiply-adds of deciding, which no way of running it saves.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from torch import nn

import tokred
from benchmarks.encoder.learned_arms import AMOUNTS, halting, setting, work
from benchmarks.encoder.learned_times import times
from benchmarks.saving import save, saving
from tokred import adapters
from tokred.adapters.encoder import block as adapter_block
from tokred.bench import costs, results, timing

CASES = ("vit_base_patch16_224", "vit_base_patch16_384", "vit_large_patch16_224", "vit_large_patch16_384")
NAMES = ("avit", "bavit", "cropr", "diffrate", "dovit", "dtem", "dynamicvit", "vtm", "evit", "random_prune")
# What their amounts do not say; all else is the methods' own.
PARAMETERS: dict[str, dict[str, Any]] = {
    "avit": {"gamma": 1.0},
    "bavit": {"mode": "ratio"},
    "vtm": {"variant": "learned", "gamma": 3},
}
SHARE = 0.5


def patched(name: str, model: nn.Module, images: torch.Tensor, share: float) -> nn.Module:
    """A copy that shares the weights of ``model``, with the method of a name at a share of the work.

    Args:
        name: of a method.
        model: of timm, without a patch.
        images: ``(N, 3, H, W)``, by which A-ViT is set.
        share: of the dense blocks' multiply-adds.
    """
    parameters: dict[str, Any] = dict(PARAMETERS.get(name, {}))
    if name in AMOUNTS:
        method = setting(name, share, model, **parameters)
    elif name == "avit":
        parameters["beta"] = halting(share, model, parameters, images[:1])
        method = tokred.make(name, **parameters)
    elif name == "diffrate":
        method = halved(model, images, share)
    else:
        method = tokred.make(name, **parameters)
    clone = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return tokred.apply(clone, method)


def halved(model: Any, images: torch.Tensor, share: float) -> tokred.Method:
    """``diffrate`` with counts at a share of the work: of what leaves a block a half is pruned, the rest merged.

    Args:
        model: of timm, without a patch.
        images: ``(N, 3, H, W)``.
        share: of the dense blocks' multiply-adds.

    Raises:
        ValueError: even the least work is more.
    """
    host, one = adapters.find(model), (1, *images.shape[1:])
    patches, dense = host.tokens(one) - host.prefix, work(model, None)
    for r in range(1, patches):
        merge = [max(1, patches - r * (i + 1)) for i in range(len(model.blocks))]
        method = tokred.make("diffrate", prune=[min(patches, k + r // 2) for k in merge], merge=merge)
        if work(model, method) <= (share + 0.01) * dense:
            return method
    raise ValueError(f"diffrate has no setting for {share:.0%} of the work")


def products(model: nn.Module, images: torch.Tensor) -> float:
    """The share of a forward's multiply-adds that deciding takes.

    Args:
        model: patched.
        images: ``(N, 3, H, W)``.
    """
    with costs.counter() as counted:
        watch = timing.Watch(clock=counted.get_total_flops)
        with watch.around(adapter_block, "decide", "deciding"), torch.inference_mode():
            model(images)
    return watch.total() / counted.get_total_flops()


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"methods; none: {' '.join(NAMES)}")
    parser.add_argument("--case", action="append", help="timm model (repeatable)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--share", type=float, default=SHARE, help="of the blocks' multiply-adds")
    saving(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", tokred.NothingRemovedWarning)
    import timm

    for case in args.case or CASES:
        torch.manual_seed(0)
        model: Any = timm.create_model(case, num_classes=1000).eval()
        images = torch.randn(max(2, args.batch), *model.default_cfg["input_size"])
        models = {name: patched(name, model, images, args.share) for name in args.names or NAMES}
        with torch.inference_mode():
            found = times(models, model, images, args.rounds, args.batch)
        where = {**results.here("cpu", torch.float32), "batch": args.batch, "rounds": args.rounds}
        rows = []
        for name, spreads in found.items():
            row = {"model": case, "method": name, "setting": "", "weights": "random", "goal": args.share, **where}
            for metric, values in spreads.items():
                row |= results.spread(metric, values)
            row["decision_work"] = products(models[name], images[: args.batch])
            rows.append(row)
            said = f"deciding {row['decision_share']:.2%} of the time, {row['decision_work']:.2%} of the work"
            print(f"{case:24} {name:12} x{row['speedup']:.2f}  {said}", flush=True)
        save(rows, "deciding", args)


if __name__ == "__main__":
    main()
