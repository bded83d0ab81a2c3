"""Pages of which a share is blank, with PixelPrune before the tower: times of tower and prompt, by thread time.

    python -m benchmarks vlm/pixels --rounds 3 --out benchmarks/results/vlm.csv
    python -m benchmarks vlm/pixels --model dinov2 --rounds 5 --out vlm.csv          # real weights, alone

``qwen2.5-vl-7b`` has that model's layer shapes, a few of each and random weights; three of four blocks attend within
windows (of the model's own 32 it is seven of eight), the last sees the whole page. ``pixelprune`` acts in the tower
alone, whose rows are all there again behind it; with ``pixelprune_visual`` the same tokens leave the prompt. The upper
part of a page is blank, on the rest no two patches are alike, so that pixels can be rebuilt (``tau=0``). The arms run
in turn in one process, and the time is that of the thread alone, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from benchmarks.vlm import early
from benchmarks.zoo import carriers
from tokred.bench import results, timing
from tokred.bench.arms import BASE

QWEN, DINO = "qwen2.5-vl-7b", "dinov2"
ARMS = {
    QWEN: {"pixelprune": ["pixelprune"], "pixelprune+pixelprune_visual": ["pixelprune", "pixelprune_visual"]},
    DINO: {"pixelprune": ["pixelprune"]},
}


def lines(side: int, blank: float, unit: int = 1) -> int:
    """Upper lines of a grid of so many patches each way that are blank: a share of it, in whole units."""
    return unit * round(blank * side / unit)


def qwen_page(side: int, blank: float) -> dict[str, Tensor]:
    """A prompt of Qwen2.5-VL with one image of ``side x side`` patches, of which a share is blank."""
    draw = torch.Generator().manual_seed(0)
    cells = torch.rand(side, side, 1176, generator=draw) * 2 - 1
    cells[: lines(side, blank, 2)] = 1.0
    patches = cells.view(side // 2, 2, side // 2, 2, -1).transpose(1, 2).reshape(side * side, -1)
    ids = torch.tensor([[1, 2, 60, *[early.IMAGE] * (side * side // 4), 61, 4, 5, 6, 7]])
    grid, types = torch.tensor([[1, side, side]]), (ids == early.IMAGE).long()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def page(side: int, blank: float, patch: int) -> Tensor:
    """``(1, 3, side * patch, side * patch)`` normalised pixels, of which a share is blank."""
    pixels = torch.randn(1, 3, side * patch, side * patch, generator=torch.Generator().manual_seed(0))
    pixels[:, :, : lines(side, blank) * patch] = 2.0
    return pixels


def parts(run: Callable[[], object], tower: Any, layers: list[Any]) -> dict[str, float]:
    """Seconds of the whole, of the tower, and of the language model's layers."""
    watch = timing.Watch(clock=time.thread_time)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch.around(tower, "forward", "tower"))
        for layer in layers:
            stack.enter_context(watch.around(layer, "forward", "prompt"))
        with torch.inference_mode(), watch("whole"):
            run()
    return {part: watch.total(part) for part in ("whole", "tower", "prompt")}


def measured(
    model: Any, name: str, run: Callable[[], object], tower: Any, layers: list[Any], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What :func:`parts` says of every arm of a name, one a round, the unpatched model's first."""
    arms: dict[str, Any] = {BASE: contextlib.nullcontext}
    arms |= {arm: partial(tokred.applied, model, methods) for arm, methods in ARMS[name].items()}
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}

    def told(arm: int, _: int, row: dict[str, float]) -> None:
        rows[[*arms][arm]].append(row)

    timing.paired([*arms.values()], lambda _: parts(run, tower, layers), rounds, warmup=1, collect=told)
    return rows


def main() -> None:
    """Run the arms in turn, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(ARMS), default=QWEN)
    parser.add_argument("--side", type=int, default=0, help="patches of a page each way; 0: 48 of Qwen, 37 of DINOv2")
    parser.add_argument("--blank", type=float, nargs="+", default=[0.0, 0.5, 0.8], help="shares of a page")
    parser.add_argument("--blocks", type=int, default=4, help="of Qwen's tower")
    parser.add_argument("--layers", type=int, default=1, help="of its language model")
    parser.add_argument("--rounds", type=int, default=3)
    saving(parser)
    given = parser.parse_args()
    for blank in given.blank:
        if not 0 <= blank < 1:
            parser.error(f"--blank must be at least 0 and less than 1; got {blank:g}")
    torch.set_num_threads(1)
    where: dict[str, Any] = {"clock": "thread", "rounds": given.rounds}
    source = results.here("cpu", torch.float32)
    if given.model == QWEN:
        side = given.side or 48
        if side % 2:
            parser.error(f"--side must be even for {QWEN}, whose tokens are of 2 x 2 patches; got {side}")
        model = early.qwen(given.blocks, given.layers)
        tower, layers = model.model.visual, [*model.model.language_model.layers]
        where |= {"model": f"{QWEN}-shapes", "weights": "random", "tower_depth": given.blocks, "depth": given.layers}
    else:
        from benchmarks.zoo import dinov2

        side = given.side or 37
        model = dinov2.load_timm(side * dinov2.PATCH)
        tower, layers = model, []
        where |= {"model": "dinov2-vits14", "weights": "trained", "tower_depth": len(model.blocks), "depth": 0}
        source["versions"] = f"{source['versions']} {carriers.cited('dinov2')}".strip()
    for blank in given.blank:
        if given.model == QWEN:
            run = partial(model, **qwen_page(side, blank), logits_to_keep=1)
        else:
            run = partial(model, page(side, blank, dinov2.PATCH))
        rows, made = measured(model, given.model, run, tower, layers, given.rounds), []
        for name, mine in rows.items():
            row = {"method": name, "setting": "", "size": side, "blank": blank, **where}
            for part in ("tower", "prompt") if layers else ("tower",):
                row |= results.spread(f"{part}_seconds", [r[part] for r in mine])
            if name != BASE:
                for metric, part in (("speedup", "whole"), ("tower_speedup", "tower")):
                    pairs = zip(rows[BASE], mine, strict=True)
                    row |= results.spread(metric, [a[part] / b[part] for a, b in pairs])
                print(f"{blank:.0%} blank: {name}: tower {row['tower_speedup']:.2f} times as fast", flush=True)
            made.append(row | source)
        save(made, "pixels", given)


if __name__ == "__main__":
    main()
