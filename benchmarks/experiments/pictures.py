"""The pictures of the tutorials: caches, visual tokens and latent tokens of the small real models of the zoo."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from tokred.analysis import viz

if TYPE_CHECKING:
    from tokred.analysis.viz import CacheDrawing, LatentDrawing, VisualDrawing

WANTED = "Which option of mdadm avoids the synchronization phase?"
COLOURS = 192  # of a picture: these are drawings, which pack well in few


def kv() -> CacheDrawing:
    """A piece of the handbook and a question about it, for SmolLM2-135M."""
    from benchmarks.zoo import data, smollm2

    model, tokenizer = smollm2.load()
    text = data.handbook()
    there = text.index("Fortunately, this synchronization phase can be avoided")
    first = text.rindex(". ", 0, there - 700) + 2
    piece = text[first : there + 600]
    turn = [{"role": "user", "content": f"{piece[: piece.rindex('. ') + 1]}\n\n{WANTED}"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    methods = ["snapkv budget=0.25", "streaming_llm budget=0.25"]
    return viz.cache(model, ids, methods, tokenizer=tokenizer, tokens=40)


def vlm() -> VisualDrawing:
    """A piece of clothing before clouds, for the small model with vision."""
    from benchmarks.zoo import vlm as zoo

    model, tokenizer = zoo.build()
    images = zoo.scenes("test", 6, seed=3).images[:1]
    methods = ["divprune budget=64", "fastv layer=8 ratio=0.75", "pyramiddrop"]
    return viz.vlm(model, zoo.inputs(tokenizer, images), methods, tokenizer=tokenizer, pixels=images, tokens=6)


def diffusion() -> LatentDrawing:
    """A height map, for the consistency model of terrain."""
    from benchmarks.zoo import terrain

    model = terrain.load()
    return viz.denoiser(model, lambda net: net.sample(1), "tomesd ratio=0.5 max_downsample=8")


KINDS = {"kv": kv, "vlm": vlm, "diffusion": diffusion}


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KINDS, help="one of them")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for pages and pictures")
    parser.add_argument("--dpi", type=int, default=110, help="of the pictures")
    arguments = parser.parse_args()
    from PIL import Image

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, make in KINDS.items():
        if arguments.only in (None, name):
            drawing = make()
            print(drawing.save(arguments.out / f"viz_{name}.html"))
            path = drawing.save(arguments.out / f"viz_{name}.png", dpi=arguments.dpi)
            with Image.open(io.BytesIO(path.read_bytes())) as picture:
                picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
