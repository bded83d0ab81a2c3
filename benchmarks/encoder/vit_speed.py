"""End-to-end speed of patched vision transformers against the unpatched model and against what is possible at all.

Arms, interleaved in one process in an order shuffled anew in each round:

- ``unpatched``: the model as timm runs it;
- ``tokred r=0``: patched, with nothing to remove: what the patch itself costs;
- ``tokred``: ToMe as tokred runs it;
- ``ceiling``: the same model whose blocks slice off as many tokens between attention and MLP, with the host's fused
  attention: what would remain if choosing and merging cost nothing;
- ``usual``: ToMe the way it is usually patched in: softmax attention written out with the size bias, gather and
  scatter-reduce with expanded indices.

Ratios are per round (unpatched / arm); the table has their median and quartiles.

    python -m benchmarks encoder/vit_speed --out benchmarks/results/vit_speed_cpu.csv
    python -m benchmarks encoder/vit_speed --case vit_small_patch16_384:23 --threads 1
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import tokred
from tokred.core.schedules import amounts

CASES = (
    "vit_small_patch16_224:13",
    "vit_small_patch16_224:16",
    "vit_base_patch16_224:13",
    "vit_base_patch16_224:16",
    "vit_small_patch16_384:23",
)


def slicing_block(block: Any, r: int) -> Callable[[Tensor], Tensor]:
    """A block of timm that drops its last ``r`` tokens between attention and MLP."""

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        if r:
            x = x[:, : x.shape[1] - r]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return forward


def usual_block(block: Any, r: int, state: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A block of timm with ToMe written the usual way."""

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        b, n, c = x.shape
        attn, h = block.attn, block.attn.num_heads
        qkv = attn.qkv(block.norm1(x)).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        size = state.get("size")
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        x = x + block.ls1(attn.proj(y))
        if r:
            x, state["size"] = usual_merge(x, k.mean(1), min(r, (n - 1) // 2), size)
        return x + block.ls2(block.mlp(block.norm2(x)))

    return forward


def usual_merge(x: Tensor, metric: Tensor, r: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bipartite matching and a size-weighted mean by gathers and scatters with expanded indices."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, match = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    unmerged, merged = order[:, r:].sort(1).values, order[:, :r]
    target = match[..., None].gather(1, merged)

    def combine(t: Tensor) -> Tensor:
        c = t.shape[-1]
        a, b = t[:, ::2], t[:, 1::2]
        kept = a.gather(1, unmerged.expand(-1, -1, c))
        gone = a.gather(1, merged.expand(-1, -1, c))
        b = b.scatter_reduce(1, target.expand(-1, -1, c), gone, reduce="sum")
        return torch.cat([kept, b], 1)

    size = torch.ones_like(x[..., :1]) if size is None else size
    total = combine(size)
    return combine(x * size) / total, total


def hand_patched(
    model: Any, make: Callable[[Any, int], Callable[[Tensor], Tensor]], schedule: list[int], state: dict[str, Any]
):
    """A function that runs ``model`` with its blocks' forwards replaced, and puts them back."""

    def run(x: Tensor) -> Tensor:
        state.clear()
        for block, r in zip(model.blocks, schedule, strict=True):
            block.forward = make(block, r)
        try:
            y: Tensor = model(x)
        finally:
            for block in model.blocks:
                del block.forward
        return y

    return run


def patched_copy(model: Any, method: Any) -> Callable[[Tensor], Tensor]:
    """A patched copy that shares the weights."""
    import copy

    memo = {id(p): p for p in model.parameters()}
    clone = copy.deepcopy(model, memo)
    tokred.apply(clone, method)
    return clone


def effective(r: int, n: int, depth: int) -> list[int]:
    """What ToMe removes in each block, capped."""
    out = []
    for want in amounts(r, depth):
        out.append(min(want, (n - 1) // 2))
        n -= out[-1]
    return out


def measure(
    arms: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of every arm in every round."""
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2):
        for run in arms.values():
            run(x)
    for _ in range(rounds):
        names = list(arms)
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            arms[name](x)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, mid, high = statistics.quantiles(values, n=4)
    return low, mid, high


def matching_share(model: Any, r: int, x: Tensor, rounds: int) -> float:
    """Share of the patched forward that deciding and merging take, from a profile."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from tokred.adapters.encoder import block as adapter_block

    originals = {name: getattr(adapter_block, name) for name in ("decide", "follow")}

    def marked(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with record_function("tokred::reduce"):
                return original(*args)

        return run

    for name, original in originals.items():
        setattr(adapter_block, name, marked(original))
    try:
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            for _ in range(rounds):
                with record_function("tokred::forward"):
                    model(x)
    finally:
        for name, original in originals.items():
            setattr(adapter_block, name, original)
    total = {e.key: e.cpu_time_total for e in prof.key_averages()}
    return total["tokred::reduce"] / total["tokred::forward"]


@torch.inference_mode()
def run_case(case: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, Any]]:
    name, _, value = case.partition(":")
    r = int(value)
    model: Any = timm.create_model(name, num_classes=1000).eval().to(dtype)
    x = torch.randn(args.batch, *model.default_cfg["input_size"]).to(dtype)
    n, depth = model.patch_embed.num_patches + 1, len(model.blocks)
    schedule, state = effective(r, n, depth), dict[str, Any]()
    ours = patched_copy(model, tokred.ToMe(r=r))
    arms: dict[str, Callable[[Tensor], Tensor]] = {
        "unpatched": model,
        "tokred r=0": patched_copy(model, tokred.ToMe(r=0)),
        "tokred": ours,
        "ceiling": hand_patched(model, slicing_block, schedule, {}),
        "usual": hand_patched(model, lambda b, k: usual_block(b, k, state), schedule, state),
    }
    seconds = measure(arms, x, args.rounds)
    share = matching_share(ours, r, x, 5)
    rows = []
    for arm, values in seconds.items():
        low, mid, high = quartiles([a / b for a, b in zip(seconds["unpatched"], values, strict=True)])
        near = quartiles([a / b for a, b in zip(seconds["ceiling"], values, strict=True)])
        rows.append(
            {
                "model": name, "r": r, "dtype": str(dtype).removeprefix("torch."), "batch": args.batch,
                "threads": torch.get_num_threads(), "arm": arm,
                "images_per_second": args.batch / statistics.median(values),
                "speedup": mid, "speedup_q25": low, "speedup_q75": high,
                "of_ceiling": near[1], "of_ceiling_q25": near[0], "of_ceiling_q75": near[2],
                "reduce_share": share if arm == "tokred" else "", "rounds": args.rounds,
                "device": "cpu", "torch": torch.__version__, "timm": timm.__version__, "tokred": tokred.__version__,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help="timm model:r (repeatable)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for dtype in args.dtype or ["float32"]:
            for case in args.case or CASES:
                new = run_case(case, getattr(torch, dtype), args)
                rows += new
                for row in new:
                    share = f"  reduce {row['reduce_share']:.1%}" if row["reduce_share"] != "" else ""
                    print(
                        f"{row['model']:24s} r={row['r']:<3} {row['dtype']:8s} {row['threads']}t {row['arm']:11s} "
                        f"{row['images_per_second']:7.1f} im/s  x{row['speedup']:.3f} "
                        f"[{row['speedup_q25']:.3f}, {row['speedup_q75']:.3f}]  of ceiling {row['of_ceiling']:.3f}"
                        f"{share}",
                        flush=True,
                    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
