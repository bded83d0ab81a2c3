"""Tower and prompt of a clip with fewer tokens inside and behind the tower, by thread time, on random weights.

    python -m benchmarks vlm/early --blocks 6 --rounds 3 --out benchmarks/results/vlm.csv
    python -m benchmarks vlm/early --frames 32 --blocks 1 --layers 1 --methods vidcom2,fastvid --out vlm.csv
    python -m benchmarks vlm/early --model qwen2.5-vl-7b --frames 32 --blocks 1 --layers 1 --methods vidcom2

Layers have the shapes of LLaVA-OneVision-7B (SigLIP of 1152 channels and 729 patches a frame, Qwen2 of 3584) or of
Qwen2.5-VL-7B (1280 channels, 784 patches of two frames, which become 196 tokens), and there are a few of each;
``share_of_full_depth`` is what choosing takes beside the prompt's time in 28 layers, without the tower. Frames go
slowly from one picture to another, as neighbours in a film do. The arms run in turn in one process, and the time is
that of the thread alone, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.saving import known, save, saving
from benchmarks.vlm.clips import METHODS
from tokred.bench import results, timing
from tokred.bench.arms import BASE

IMAGE, VIDEO = 62, 63
DEPTH = 28  # layers of Qwen2-7B
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


class Shapes(NamedTuple):
    """A model of random weights.

    Attributes:
        name: in the table.
        build: makes it, of so many blocks and layers.
        film: makes a prompt with one clip of so many frames.
        tower: the tower's name in the model's core.
    """

    name: str
    build: Callable[[int, int], Any]
    film: Callable[[int], dict[str, Tensor]]
    tower: str


def onevision(blocks: int, layers: int) -> Any:
    """LLaVA-OneVision, of so many blocks and layers, with random weights."""
    import transformers as t

    torch.manual_seed(0)
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**TOWER, num_hidden_layers=blocks, vision_use_head=False),
        text_config=t.Qwen2Config(**TEXT, num_hidden_layers=layers, vocab_size=64),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_feature_layer=-1,
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config).eval()


def qwen(blocks: int, layers: int) -> Any:
    """Qwen2.5-VL, of so many blocks and layers, with random weights; the last block sees the whole frame."""
    import transformers as t

    torch.manual_seed(0)
    text = {**TEXT, "num_hidden_layers": layers, "vocab_size": 64, "max_position_embeddings": 1 << 15}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = {
        "depth": blocks, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [blocks - 1],
    }  # fmt: skip
    config = t.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=60, vision_end_token_id=61,
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config).eval()


def _frames(count: int, side: int) -> Tensor:
    """``(count, 3, side, side)``, slowly from one picture to another."""
    g = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 3, side, side, generator=g)
    return start + (end - start) * torch.linspace(0, 0.3, count).view(-1, 1, 1, 1)


def film(frames: int) -> dict[str, Tensor]:
    """OneVision's prompt with one clip of so many frames."""
    ids = torch.tensor([[1, 2, 3, *[VIDEO] * (196 * frames + 1), 4, 5, 6, 7]])
    return {"input_ids": ids, "pixel_values_videos": _frames(frames, 384)[None]}


def qwen_film(frames: int) -> dict[str, Tensor]:
    """Qwen's prompt with one clip of so many frames, two of which make 28 x 28 patches."""
    t, side = frames // 2, 28
    cells = _frames(2 * t, 14 * side).reshape(t, 2, 3, side // 2, 2, 14, side // 2, 2, 14)
    patches = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * side * side, -1)
    ids = torch.tensor([[1, 2, 60, *[VIDEO] * (t * side * side // 4), 61, 4, 5, 6, 7]])
    grid, types = torch.tensor([[t, side, side]]), 2 * (ids == VIDEO).long()
    return {"input_ids": ids, "pixel_values_videos": patches, "video_grid_thw": grid, "mm_token_type_ids": types}


MODELS = {
    "llava-onevision-7b": Shapes("llava-onevision-7b-shapes", onevision, film, "vision_tower"),
    "qwen2.5-vl-7b": Shapes("qwen2.5-vl-7b-shapes", qwen, qwen_film, "visual"),
}


def one(model: Any, batch: dict[str, Tensor], tower: str) -> dict[str, float]:
    """Seconds of the tower, of the layers, and of all that lies between them; and tokens behind it all."""
    watch, core = timing.Watch(clock=time.thread_time), model.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch.around(getattr(core, tower), "forward", "tower"))
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
    parser.add_argument("--model", choices=tuple(MODELS), default="llava-onevision-7b", help="whose shapes layers have")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2, help="of the tower; frames merge behind the first third")
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--methods", default="holitom,earlytom", help="names of vlm/clips and earlytom, with commas")
    saving(parser)
    given = parser.parse_args()
    known(parser, "methods", given.methods.split(","), METHODS)
    shapes = MODELS[given.model]
    model, batch = shapes.build(given.blocks, given.layers), shapes.film(given.frames)
    places = tuple(sorted({(given.blocks - 1) // 3, given.blocks - 2})) if given.blocks > 1 else (0,)
    early = tokred.EarlyTom(budget=given.budget, layers=places, tau=0.3)
    arms: dict[str, Any] = {BASE: contextlib.nullcontext}
    for name in given.methods.split(","):
        method = early if name == "earlytom" else METHODS[name](given.budget)
        try:
            with tokred.applied(model, method):
                pass
        except (tokred.TokredError, ValueError) as error:
            print(f"{name} takes no part: {error}", flush=True)
            continue
        arms[name] = partial(tokred.applied, model, method)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}

    def told(arm: int, _: int, row: dict[str, float]) -> None:
        name = [*arms][arm]
        rows[name].append(row)
        print(name, row, flush=True)

    timing.paired([*arms.values()], lambda _: one(model, batch, shapes.tower), given.rounds, warmup=0, collect=told)
    where = {"model": shapes.name, "weights": "random", "clock": "thread", "frames": given.frames}
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
