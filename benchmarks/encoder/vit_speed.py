"""End-to-end speed of patched vision transformers against the unpatched model and against what is possible at all.

Arms, interleaved in one process in an order shuffled anew in each round:

- ``unpatched``: the model as timm runs it;
- ``tome r=0``: patched, with nothing to remove: what the patch itself costs;
- ``tome``: ToMe as tokred runs it;
- ``ceiling``: the same model whose blocks slice off as many tokens between attention and MLP, with the host's fused
  attention: what would remain if choosing and merging cost nothing;
- ``usual``: ToMe the way it is usually patched in: softmax attention written out with the size bias, gather and
  scatter-reduce with expanded indices.

Ratios are per round (unpatched / arm); the table has their median and quartiles.

    python -m benchmarks encoder/vit_speed --threads 2 --out benchmarks/results/encoder.csv --overwrite
    python -m benchmarks encoder/vit_speed --case vit_small_patch16_384:23 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from tokred.bench import results, timing
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
    arms: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("unpatched", ""): model,
        ("tome", "r=0"): patched_copy(model, tokred.ToMe(r=0)),
        ("tome", f"r={r}"): ours,
        ("ceiling", f"r={r}"): hand_patched(model, slicing_block, schedule, {}),
        ("usual", f"r={r}"): hand_patched(model, lambda b, k: usual_block(b, k, state), schedule, state),
    }
    seconds = timing.compared([lambda _, run=run: run(x) for run in arms.values()], args.rounds, warmup=2)
    share = matching_share(ours, r, x, 5)
    where = {**results.here("cpu", dtype), "batch": args.batch, "rounds": args.rounds}
    base = [name for name, _ in arms].index("ceiling")
    found = []
    for (arm, setting), values, faster, near in zip(
        arms, seconds, timing.ratios(seconds), timing.ratios(seconds, base), strict=True
    ):
        record = {"model": name, "method": arm, "setting": setting, "case": f"r{r}", "weights": "random", **where}
        record |= results.spread("images_per_second", [args.batch / s for s in values])
        record |= results.spread("speedup", faster) | results.spread("of_ceiling", near)
        found.append(record | ({"reduce_share": share} if setting == f"r={r}" and arm == "tome" else {}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="timm model:r (repeatable)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a batch of one, two rounds: does it run?")
    saving(parser)
    args = parser.parse_args()
    if args.quick:
        args.case, args.batch, args.rounds = ["vit_tiny_patch16_224:13"], 1, 2
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for dtype in args.dtype or ["float32"]:
            for case in args.case or CASES:
                new = run_case(case, getattr(torch, dtype), args)
                for row in new:
                    share = f"  reduce {row['reduce_share']:.1%}" if "reduce_share" in row else ""
                    print(
                        f"{row['model']:24s} {row['case']:<4} {row['dtype']:8s} {row['threads']}t {row['method']:10s}"
                        f"{row['setting']:6s}{row['images_per_second']:7.1f} im/s  x{row['speedup']:.3f} "
                        f"[{row['speedup_low']:.3f}, {row['speedup_high']:.3f}]  of ceiling {row['of_ceiling']:.3f}"
                        f"{share}",
                        flush=True,
                    )
                save(new, "vit_speed", args)


if __name__ == "__main__":
    main()
