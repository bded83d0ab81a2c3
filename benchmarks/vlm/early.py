"""Tower and prompt of a clip with fewer tokens inside and behind the tower, by thread time, on random weights.

    python -m benchmarks vlm/early --blocks 6 --rounds 3 --out benchmarks/results/vlm.csv
    python -m benchmarks vlm/early --frames 32 --blocks 1 --layers 1 --methods vidcom2,fastvid --out vlm.csv

Layers have the shapes of LLaVA-OneVision-7B (SigLIP of 1152 channels and 729 patches a frame, Qwen2 of 3584), and there
are a few of each; ``share_of_full_depth`` is what choosing takes beside the prompt's time in 28 layers, without the
tower. Frames go slowly from one picture to another, as neighbours in a film do. The arms run in turn in one
process, and the time is that of the thread alone, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.saving import known, save, saving
from benchmarks.vlm.clips import METHODS
from tokred.bench import results, timing
from tokred.bench.arms import BASE

VIDEO = 63
DEPTH = 28  # layers of Qwen2-7B
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


def build(blocks: int, layers: int) -> Any:
    """The model, of so many blocks and layers, with random weights."""
    import transformers as t

    torch.manual_seed(0)
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**TOWER, num_hidden_layers=blocks, vision_use_head=False),
        text_config=t.Qwen2Config(**TEXT, num_hidden_layers=layers, vocab_size=64),
        image_token_id=62, video_token_id=VIDEO, vision_feature_layer=-1,
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config).eval()


def film(frames: int) -> dict[str, Tensor]:
    """A prompt with one clip of so many frames."""
    g = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 3, 384, 384, generator=g)
    step = torch.linspace(0, 0.3, frames).view(-1, 1, 1, 1)
    ids = torch.tensor([[1, 2, 3, *[VIDEO] * (196 * frames + 1), 4, 5, 6, 7]])
    return {"input_ids": ids, "pixel_values_videos": (start + (end - start) * step)[None]}


def one(model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of the tower, of the layers, and of all that lies between them; and tokens behind it all."""
    watch, core = timing.Watch(clock=time.thread_time), model.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch.around(core.vision_tower, "forward", "tower"))
        for layer in core.language_model.layers:
            stack.enter_context(watch.around(layer, "forward", "prompt"))
        for kind in {type(method) for method in tokred.patched(model)}:
            stack.enter_context(watch.around(kind, "reduce", "choosing"))
        with watch("whole"):
            model(**batch, logits_to_keep=1)
    found = {part: watch.total(part) for part in ("whole", "tower", "prompt", "choosing")}
    found["between"] = found["whole"] - found["tower"] - found["prompt"]
    shown = tokred.patched(model)
    found["left"] = sum(tokred.report(model).layers[0].visual) if shown else batch["input_ids"].shape[1]
    return found


def main() -> None:
    """Run the arms in turn, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2, help="of the tower; frames merge behind the first third")
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--methods", default="holitom,earlytom", help="names of vlm/clips and earlytom, with commas")
    saving(parser)
    given = parser.parse_args()
    known(parser, "methods", given.methods.split(","), {"earlytom", *METHODS})
    model, batch = build(given.blocks, given.layers), film(given.frames)
    places = tuple(sorted({(given.blocks - 1) // 3, given.blocks - 2})) if given.blocks > 1 else (0,)
    early = tokred.EarlyTom(budget=given.budget, layers=places, tau=0.3)
    arms: dict[str, Any] = {BASE: contextlib.nullcontext}
    for name in given.methods.split(","):
        method = early if name == "earlytom" else METHODS[name](given.budget)
        arms[name] = partial(tokred.applied, model, method)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}

    def told(arm: int, _: int, row: dict[str, float]) -> None:
        name = [*arms][arm]
        rows[name].append(row)
        print(name, row, flush=True)

    timing.paired([*arms.values()], lambda _: one(model, batch), given.rounds, warmup=0, collect=told)
    where = {"model": "llava-onevision-7b-shapes", "weights": "random", "clock": "thread", "frames": given.frames}
    where |= {"tower_depth": given.blocks, "depth": given.layers, "keeps": given.budget, "rounds": given.rounds}
    for name, mine in rows.items():
        row: dict[str, Any] = {"method": name, "setting": "", **where, "tokens_left": mine[0]["left"]}
        for part, column in (("tower", "tower"), ("prompt", "prompt"), ("between", "rest"), ("choosing", "selection")):
            row |= results.spread(f"{column}_seconds", [r[part] for r in mine])
        if name != BASE:
            whole = [r["prompt"] * DEPTH / given.layers for r in rows[BASE]]
            row |= results.spread("share_of_full_depth", [r["choosing"] / w for r, w in zip(mine, whole, strict=True)])
            row |= results.spread("speedup", [a["whole"] / b["whole"] for a, b in zip(rows[BASE], mine, strict=True)])
            print(f"{name}: {row['speedup']:.2f} times as fast as all tokens")
        save([row | results.here("cpu", torch.float32)], "early", given)


if __name__ == "__main__":
    main()
