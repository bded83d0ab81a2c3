"""A stream of many frames under a fixed budget: time and memory a frame, and answers beside the dense model's.

    python -m benchmarks vlm/stream --out benchmarks/results/vlm.csv --overwrite          # small VLM
    python -m benchmarks vlm/stream --device cuda --out /tmp/stream.csv
    python -m benchmarks vlm/stream --only stc streamingtom --every 64
    python -m benchmarks vlm/stream --quick                                               # tiny model: does it run?

Clips of ``--last`` frames, of a piece of clothing that moves over a photo, come one after the other, a frame at a time;
at the end of every so many it is asked what is moving. At every eighth of the frames there is a row for each setting:
``ms`` of a frame, median and quartiles over those since the row before; ``bytes`` of all that the stream holds, and
``rows_left`` of the fullest layer; ``exact``: how many answers since the row before are right; ``agreement``: how many
are those of a stream that has every token of so many last frames alone, whose own stand in the row ``short``. The
setting without a method keeps everything, and stops at ``--dense`` frames.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from tokred.bench import results, timing
from tokred.bench.arms import BASE

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
        dtype: of the frames.
        right: whether an answer after so many frames is right; None: there is no telling.
    """

    name: str
    model: Any
    frames: Any
    prompt: list[int]
    question: list[int]
    tokens: int
    words: int
    dtype: torch.dtype = torch.float32
    right: Callable[[tuple[int, ...], int], bool] | None = None


def tiny() -> Watched:
    """LLaVA-OneVision with random weights."""
    from tokred.adapters.tiny import vlm

    def frames(count: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, 16, 16, generator=g).mul(0.2).cumsum(0).sin()

    return Watched("tiny-onevision", vlm.build("onevision_video"), frames, [5, 6, 7], [8, 9, 10], 4, 2)


def small(size: int, dtype: torch.dtype, last: int) -> Watched:
    """The small VLM of the zoo, as it takes clips: a token for 28 x 28 pixels of a frame."""
    from benchmarks.zoo import data, dinov2, questions, vlm

    model, tokenizer = vlm.build_video()
    model.model.config.vision_config.image_size = size
    said: list[str] = []

    def frames(count: int) -> Tensor:
        asked = questions.clips("test", -(-count // last), last)
        said[:] = [q.answer for q in asked.questions if q.kind == "what"]
        shown = asked.images.flatten(0, 1)[:count]
        return data.normalise(shown if size == vlm.SIZE else questions.resized(shown, size)).to(dtype)

    def right(ids: tuple[int, ...], seen: int) -> bool:
        return vlm.said(tokenizer.decode(ids)) == said[(seen - 1) // last]

    ids = tokenizer(vlm.asked(questions.ASKED["what"]), add_special_tokens=False).input_ids
    tokens = (size // (2 * dinov2.PATCH)) ** 2
    return Watched(
        "dinov2-smollm2-135m-questions", model.to(dtype), frames, [tokenizer.bos_token_id], ids, tokens, 4, dtype, right
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


def measure(
    watched: Watched, name: str, method: str | None, options: argparse.Namespace, short: dict[int, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """Records of one setting.

    Args:
        watched: the model and its frames.
        name, method: of :func:`settings`.
        options: of :func:`parser`.
        short: answers by the frames seen, of streams that have the last of them alone; those that are missing are made.
    """
    count = options.frames if method else min(options.frames, options.dense)
    frames = watched.frames(options.frames)[:count]
    marks = {max(1, count * part // 8) for part in range(1, 9)}
    device = torch.device(options.device)
    positions = options.positions if method else None
    stream = tokred.stream(watched.model, method, prompt=watched.prompt, positions=positions)
    if positions == "video":
        method = f"{method} positions=video"
    seconds: list[float] = []
    agree: list[bool] = []
    right: list[bool] = []
    watch = timing.Watch(device, time.process_time if options.clock == "process" else time.perf_counter)
    for t, pixels in enumerate(frames):
        begin = watch.now()
        stream.frame(pixels)
        seconds.append(watch.now() - begin)
        if method and (t + 1) % options.every == 0:
            if t + 1 not in short:
                dense = tokred.stream(watched.model, prompt=watched.prompt)
                dense.frames(frames[max(0, t + 1 - options.last) : t + 1])
                short[t + 1] = answer(dense, watched)
            own = answer(stream, watched)
            agree.append(own == short[t + 1])
            right += [watched.right(own, t + 1)] if watched.right else []
        if t + 1 in marks:
            report = stream.report()
            row = {"model": watched.name, "method": name or BASE, "setting": method or "", "frames": t + 1}
            row |= {"rounds": len(seconds), "size": options.size, "clock": options.clock, "tokens": watched.tokens}
            row |= {"length": options.last}
            row |= results.spread("ms", [1000 * one for one in seconds])
            row |= {"bytes": report.nbytes, "rows_left": report.rows}
            if agree:
                row |= {"agreement": sum(agree) / len(agree), "images": len(agree)}
            if right:
                row |= results.share("exact", sum(right), len(right))
            yield row | results.here(device, watched.dtype)
            seconds, agree, right = [], [], []


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--frames", type=int, default=512)
    made.add_argument("--dense", type=int, default=64, help="frames at most where everything is kept")
    made.add_argument("--share", type=float, default=0.25, help="of each frame's tokens that methods leave")
    made.add_argument("--last", type=int, default=16, help="frames of a clip, and of the stream that has no others")
    made.add_argument("--held", type=int, default=16, help="frames that memory has room for")
    made.add_argument(
        "--every", type=int, default=32, help="frames from one question to the next, a multiple of --last"
    )
    made.add_argument(
        "--positions", choices=("contiguous", "video"), default="contiguous",
        help="whether the prompt moves up behind frames that have left, or stays",
    )  # fmt: skip
    made.add_argument("--size", type=int, default=224, help="height and width of the frames, a multiple of 28")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the small model")
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
    watched = tiny() if options.quick else small(options.size, getattr(torch, options.dtype), options.last)
    watched.model.to(options.device)
    short: dict[int, tuple[int, ...]] = {}
    for name, method in settings(watched, options.share, options.held):
        if options.only is not None and (name or BASE) not in options.only:
            continue
        start = time.perf_counter()
        for row in measure(watched, name, method, options, short):
            shown = f"{row['agreement']:.2f}" if "agreement" in row else "-"
            print(
                f"{row['method']:14} {row['frames']:6} frames {row['ms']:8.1f} ms {row['bytes'] / 2**20:9.2f} MiB "
                f"{row['rows_left']:7} rows  agreement {shown}  right {row.get('exact', float('nan')):.2f}",
                flush=True,
            )
            save([row], "stream", options)
        print(f"{name or BASE}: {time.perf_counter() - start:.0f} s", flush=True)
    if short and watched.right is not None:
        right = sum(watched.right(ids, seen) for seen, ids in short.items())
        print(f"the last {options.last} frames alone: {right} of {len(short)} answers are right", flush=True)
        row = {"model": watched.name, "method": "short", "setting": "", "frames": options.last, "size": options.size}
        row |= {
            "clock": options.clock,
            "tokens": watched.tokens,
            "length": options.last,
            "images": len(short),
            **results.share("exact", right, len(short)),
        }
        save([row | results.here(options.device, watched.dtype)], "stream", options)


if __name__ == "__main__":
    run(parser().parse_args())
