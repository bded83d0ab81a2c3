"""The pictures of the tutorials: caches, visual tokens and latent tokens of the small real models of the zoo."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokred.analysis import viz

if TYPE_CHECKING:
    from tokred.analysis.viz import CacheDrawing, LatentDrawing, StreamDrawing, VisualDrawing

WANTED = "Which option of mdadm avoids the synchronization phase?"
CLIP = 5  # the seed of the video
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


def clip() -> VisualDrawing:
    """A piece of clothing that moves over a photo, for the small model with vision; a quarter of the tokens stays."""
    import torch

    from benchmarks.zoo import questions
    from benchmarks.zoo import vlm as zoo
    from tokred.vlm import clips

    model, tokenizer = zoo.build()
    frames = questions.clips("test", 1, seed=CLIP).images[0]
    given = zoo.inputs(tokenizer, frames)
    ids = given["input_ids"][0]
    place = ids == tokenizer.convert_tokens_to_ids(zoo.IMAGE_TOKEN)
    ids = torch.cat([ids[:1], ids[place].repeat(len(frames)), ids[1:][~place[1:]]])[None]
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    methods = ["uniform_visual budget=0.25", "divprune budget=0.25", "evs ratio=0.75", "vidcom2 ratio=0.75"]
    with clips([[len(frames)]]):
        drawing = viz.vlm(model, given, methods, tokenizer=tokenizer, pixels=[frames], tokens=1)
    # The model has learned single pictures: what it would say of a clip says nothing of the methods.
    runs = tuple(replace(run, answers=(None,)) for run in drawing.runs)
    return replace(drawing, answers=(None,), runs=runs)


def stream() -> StreamDrawing:
    """The same video, as a stream that remembers four frames."""
    import torch

    from benchmarks.zoo import data, questions
    from benchmarks.zoo import vlm as zoo

    model, tokenizer = zoo.build()
    frames = questions.clips("test", 1, seed=CLIP).images[0]
    methods = [
        "stc budget=64 + streaming_llm budget=257",
        "streamingtom budget=64 + streamingtom_cache groups=2 most=4",
    ]
    start = torch.tensor([tokenizer.bos_token_id])
    return viz.stream(model, data.normalise(frames), methods, prompt=start, tokenizer=tokenizer, pixels=frames)


def diffusion() -> LatentDrawing:
    """A height map, for the consistency model of terrain."""
    from benchmarks.zoo import terrain

    model = terrain.load()
    return viz.denoiser(model, lambda net: net.sample(1), "tomesd ratio=0.5 max_downsample=8")


KINDS = {"kv": kv, "vlm": vlm, "clip": clip, "stream": stream, "diffusion": diffusion}


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
