"""A stream of many frames under a fixed budget: time and memory a frame, and answers beside the dense model's.

    python -m benchmarks vlm/stream --out benchmarks/results/vlm.csv --overwrite          # small VLM
    python -m benchmarks vlm/stream --device cuda --out /tmp/stream.csv
    python -m benchmarks vlm/stream --only stc streamingtom --every 64
    python -m benchmarks vlm/stream --quick                                               # tiny model: does it run?

Pictures of clothes on drifting backgrounds come one by one, each shown for some frames. At every eighth
of the frames there is a row for each setting: ``ms`` of a frame, median and quartiles over those since the row
before; ``bytes`` of all that the stream holds, and ``rows_left`` of the fullest layer; ``agreement``: how many of the
answers since the row before, one every so many frames, are those of a stream that keeps every token of the last 16
frames alone. The setting without a method keeps everything, and stops at ``--dense`` frames.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from tokred.bench import results, timing
from tokred.bench.arms import BASE

LAST = 16
SETTINGS = {
    "": "",
    "streaming_llm": "streaming_llm budget={rows}",
    "uniform_visual": "uniform_visual budget={few} + streaming_llm budget={rows}",
    "stc": "stc budget={few} + streaming_llm budget={rows}",
    "streamingtom": "streamingtom budget={few} + streamingtom_cache groups={groups} most={most}",
}


class Watched(NamedTuple):
    """A model to be put in front of frames.

    Attributes:
        name: of it.
        model: itself.
        frames: makes so many, ``(n, 3, H, W)``.
        prompt, question: ids.
        tokens: of a frame.
        words: tokens of an answer that are compared.
    """

    name: str
    model: Any
    frames: Any
    prompt: list[int]
    question: list[int]
    tokens: int
    words: int


def tiny() -> Watched:
    """LLaVA-OneVision with random weights."""
    from tokred.adapters.tiny import vlm

    def frames(count: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, 16, 16, generator=g).mul(0.2).cumsum(0).sin()

    return Watched("tiny-onevision", vlm.build("onevision_video"), frames, [5, 6, 7], [8, 9, 10], 4, 2)


def small(size: int) -> Watched:
    """The small VLM of the zoo: DINOv2 and SmolLM2, a token for 14 x 14 pixels of a frame."""
    from benchmarks.zoo import data, dinov2, questions, vlm

    model, tokenizer = vlm.build(vlm.QUESTIONS)

    def frames(count: int, each: int = 8) -> Tensor:
        scenes = vlm.scenes("test", -(-count // each)).images
        g = torch.Generator().manual_seed(0)
        shown = scenes.repeat_interleave(each, 0)[:count].float()
        noise = 2 * torch.randn(shown.shape[0], 1, *shown.shape[2:], generator=g)
        return data.normalise(questions.resized((shown + noise).clamp(0, 255).to(torch.uint8), size))

    ids = tokenizer(vlm.PROMPT, add_special_tokens=False).input_ids
    return Watched(
        "dinov2-smollm2-135m-questions", model, frames, [tokenizer.bos_token_id], ids, (size // dinov2.PATCH) ** 2, 3
    )


def settings(watched: Watched, share: float, held: int) -> Iterator[tuple[str, str | None]]:
    """Names, and methods that leave a share of each frame and hold as many rows as so many frames have."""
    few = max(1, round(share * watched.tokens))
    for name, text in SETTINGS.items():
        rows = len(watched.prompt) + (few if " + " in text else watched.tokens) * held
        yield name, text.format(few=few, rows=rows, groups=held // 2, most=held) or None


def answer(stream: Any, watched: Watched) -> tuple[int, ...]:
    """The first words of an answer."""
    found: tuple[int, ...] = stream.ask(watched.question, max_new_tokens=watched.words).ids
    return found


def measure(watched: Watched, name: str, method: str | None, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of one setting."""
    count = options.frames if method else min(options.frames, options.dense)
    frames = watched.frames(options.frames)[:count]
    marks = {max(1, count * part // 8) for part in range(1, 9)}
    device = torch.device(options.device)
    stream = tokred.stream(watched.model, method, prompt=watched.prompt)
    seconds: list[float] = []
    agree: list[bool] = []
    watch = timing.Watch(device, time.process_time if options.clock == "process" else time.perf_counter)
    for t, pixels in enumerate(frames):
        begin = watch.now()
        stream.frame(pixels)
        seconds.append(watch.now() - begin)
        if method and (t + 1) % options.every == 0:
            dense = tokred.stream(watched.model, prompt=watched.prompt)
            dense.frames(frames[max(0, t + 1 - LAST) : t + 1])
            agree.append(answer(stream, watched) == answer(dense, watched))
        if t + 1 in marks:
            report = stream.report()
            row = {"model": watched.name, "method": name or BASE, "setting": method or "", "frames": t + 1}
            row |= {"rounds": len(seconds), "size": options.size, "clock": options.clock, "tokens": watched.tokens}
            row |= results.spread("ms", [1000 * one for one in seconds])
            row |= {"bytes": report.nbytes, "rows_left": report.rows}
            if agree:
                row |= {"agreement": sum(agree) / len(agree), "images": len(agree)}
            yield row | results.here(device, watched.model.dtype)
            seconds, agree = [], []


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--frames", type=int, default=512)
    made.add_argument("--dense", type=int, default=64, help="frames at most where everything is kept")
    made.add_argument("--share", type=float, default=0.25, help="of each frame's tokens that methods leave")
    made.add_argument("--held", type=int, default=LAST, help="frames that memory has room for")
    made.add_argument("--every", type=int, default=32, help="frames from one question to the next")
    made.add_argument("--size", type=int, default=224, help="height and width of the frames, a multiple of 14")
    made.add_argument("--only", nargs="+", choices=[one or BASE for one in SETTINGS], help="these settings alone")
    made.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: of this process alone")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="16 frames of a tiny model: does it run?")
    saving(made)
    return made


def run(options: argparse.Namespace) -> None:
    """All settings, one after the other."""
    torch.set_num_threads(options.threads)
    if options.quick:
        options.frames, options.dense, options.held, options.every = 16, 8, 4, 8
    watched = tiny() if options.quick else small(options.size)
    watched.model.to(options.device)
    for name, method in settings(watched, options.share, options.held):
        if options.only is not None and (name or BASE) not in options.only:
            continue
        start = time.perf_counter()
        for row in measure(watched, name, method, options):
            shown = f"{row['agreement']:.2f}" if "agreement" in row else "-"
            print(
                f"{row['method']:14} {row['frames']:6} frames {row['ms']:8.1f} ms {row['bytes'] / 2**20:9.2f} MiB "
                f"{row['rows_left']:7} rows  agreement {shown}",
                flush=True,
            )
            save([row], "stream", options)
        print(f"{name or BASE}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run(parser().parse_args())
