"""Time to the first token over texts that were computed before, and whether what stands in them is still found.

    python -m benchmarks.zoo.fetch smollm2 handbook devil
    python -m benchmarks kv/reuse --threads 1 --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/reuse --length 128 --front 3 --threads 1 --out benchmarks/results/kv.csv
    python -m benchmarks kv/reuse --quick

A context is eight chunks of prose behind a few words, each with a number hidden in it, and a question. ``dense``
computes all of it. The others join chunks that were computed apart, each behind those words (``tokred.blend``), compute
a share of them again, and then the question; ``recompute=0`` computes nothing again. Computing the chunks for the first
time is not counted: that they have been is the point. With ``--front`` so many more chunks of the kind, about which
nothing is asked, stand behind those words, in front of everything, as a system's prompt with examples does.

Which tokens are computed again, ``--measures`` says: ``key`` and ``value`` are CacheBlend's, ``foreseen`` is what
depended on the text before when the chunk was stored (another text of the kind stood there, which is in no context),
``random`` and ``first`` (the first tokens of each chunk) are their rivals at the same cost as ``foreseen``.

All arms run in one process, in an order shuffled anew in each of ``--rounds``, which go through the contexts in turn.
``ratio`` is an arm's time over that of ``dense`` in the same round: median and quartiles over rounds. ``--clock cpu``
counts the seconds of this process, for machines that others use too; with ``--times`` nothing else is measured.

``keys`` is the share of numbers whose every token is the likeliest when all eight are asked for, one after another,
each with the right answer before the next; ``nll`` the mean negative log-likelihood of their tokens; ``kl`` the mean
divergence from ``dense`` over all that is asked. In tables of results ``keys`` is ``retrieval``.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from benchmarks.kv.decode import CLOCKS
from benchmarks.kv.texts import NAMES, Maker, Sample
from benchmarks.saving import save, saving
from tokred.bench import results, timing

CHUNKS = 8
SHARES = (0.0, 0.15, 0.25)
MEASURES = ("key", "foreseen", "random", "first")
LEAD = "The text says: "


class Context(NamedTuple):
    """Chunks ``(n,)`` of token ids, and eight questions with their answers behind them."""

    chunks: list[Tensor]
    asked: Sample

    @property
    def question(self) -> Tensor:
        """``(1, M)`` of the first question."""
        return self.asked.follows[None, : self.asked.question]


def contexts(maker: Maker, count: int, length: int) -> list[Context]:
    """``count`` contexts of chunks of ``length`` tokens."""
    found = []
    for index in range(count):
        rng = random.Random(f"reuse {index} {length}")
        names = rng.sample(NAMES, CHUNKS)
        things = {name: str(rng.randrange(10000, 100000)) for name in names}
        chunks = []
        for name, number in things.items():
            key = maker.ids(f" The magic number of the {name} is {number}. Remember: {number}.")
            straw = maker.stretch(maker.prose[:1], 0, rng, length - len(key))
            cut = rng.randrange(len(straw) // 8, len(straw))
            chunks.append(torch.cat([straw[:cut], key, straw[cut:]]))
        order = rng.sample(names, CHUNKS)
        pairs = [
            (f" What is the magic number of the {n}? The magic number of the {n} is", f" {things[n]}") for n in order
        ]
        found.append(Context(chunks, maker.asked("several", chunks[0], pairs, ".\n")))
    return found


class Arm(NamedTuple):
    """A share that is computed again, and by what tokens are chosen."""

    share: float
    measure: str

    @property
    def setting(self) -> str:
        """In words."""
        return f"recompute={self.share:g} {self.measure}" if self.share else "recompute=0"


class Run:
    """One context after another, by any arm.

    Args:
        model: without a patch.
        lead: ``(n,)`` what stands in front of each context, and did when its chunks were computed.
        given: contexts.
        against: a text of the kind, which is in none of them.
    """

    def __init__(self, model: Any, lead: Tensor, given: list[Context], against: Tensor) -> None:
        self.model, self.given, self.lead = model, given, lead
        store = tokred.ChunkStore(model, behind=self.lead, against=against)
        chunks = [[store.add(chunk) for chunk in context.chunks] for context in given]
        self.parts = {"key": [[store.prefix, *row] for row in chunks]}
        draws = torch.Generator().manual_seed(0)
        # Rivals are told of other tokens, and cost the same.
        rivals = {
            "random": lambda n: torch.rand(n, generator=draws),
            "first": lambda n: -torch.arange(n).float(),
        }
        for name, say in rivals.items():
            told = [[part._replace(foreseen=say(part.ids.shape[1])) for part in row] for row in chunks]
            self.parts[name] = [[store.prefix, *row] for row in told]
        self.now: Arm | None = None

    @contextlib.contextmanager
    def arm(self, arm: Arm | None) -> Iterator[None]:
        """The state that is timed; None computes all at once."""
        self.now = arm
        yield

    def ids(self, index: int) -> Tensor:
        """``(1, N)`` of a context's chunks and what stands in front."""
        return torch.cat([self.lead, *self.given[index].chunks])[None]

    def logits(self, index: int, follows: Tensor, keep: int) -> Any:
        """Those of the last ``keep`` tokens of a context with ``follows`` ``(1, M)`` behind it."""
        ids, given = follows, dict[str, Any]()
        if self.now is None:
            ids = torch.cat([self.ids(index), follows], 1)
        else:
            share, measure = self.now
            parts = self.parts.get(measure, self.parts["key"])[index]
            told = "foreseen" if measure in ("random", "first") else measure
            given = tokred.cache_kwargs(tokred.blend(self.model, parts, recompute=share, measure=told).cache)
        return self.model(ids.to(self.model.device), use_cache=True, logits_to_keep=keep, **given).logits

    def first(self, index: int) -> Any:
        """Up to the first token of the answer."""
        return self.logits(index, self.given[index].question, 1).argmax(-1)

    def asked(self, index: int) -> tuple[int, float, Tensor]:
        """Numbers that are found, mean negative log-likelihood of their tokens, and all log-probabilities."""
        sample = self.given[index].asked
        follows = sample.follows[None]
        said = self.logits(index, follows, follows.shape[1])[0, :-1].float().log_softmax(-1).cpu()
        right = said.argmax(-1) == follows[0, 1:]
        each = -said.gather(-1, follows[0, 1:, None])[:, 0]
        spans = [slice(start - 1, end - 1) for start, end in sample.answers]
        return sum(bool(right[s].all()) for s in spans), sum(float(each[s].mean()) for s in spans) / len(spans), said


def measure(model: Any, maker: Maker, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each arm."""
    given, other = contexts(maker, options.contexts, length), contexts(maker, options.contexts + 1, length)[-1]
    lead = torch.cat([maker.ids(LEAD), *other.chunks[1 : 1 + options.front]])
    with torch.inference_mode():
        run = Run(model, lead, given, other.chunks[0])
    shares = [Arm(share, name) for share in options.shares if share for name in options.measures]
    arms: list[Arm | None] = [None, *([Arm(0.0, "key")] if 0.0 in options.shares else []), *shares]
    rounds = options.rounds or len(given)
    seconds = timing.paired(
        [lambda arm=arm: run.arm(arm) for arm in arms],
        lambda i: run.first(i % len(given)),
        rounds,
        device=options.device,
        warmup=1,
        clock=CLOCKS[options.clock],
    )
    tokens = run.ids(0).shape[1]
    where = {"model": options.name, "tokens": tokens, "chunks": CHUNKS, "clock": options.clock, "rounds": rounds}
    where |= {"front": len(lead)} if options.front else {}
    where |= results.here(options.device, options.dtype)
    found: list[list[tuple[int, float, float]]] = [[] for _ in arms]
    with torch.inference_mode():
        for i in range(0 if options.times else len(given)):
            with run.arm(None):
                dense = run.asked(i)[2]
            for n, arm in enumerate(arms):
                with run.arm(arm):
                    right, nll, said = run.asked(i)
                found[n].append((right, nll, float((dense.exp() * (dense - said)).sum(-1).mean())))
    table = []
    for arm, times, asked in zip(arms, seconds, found, strict=True):
        name, setting = ("dense", "") if arm is None else ("blend", arm.setting)
        row: dict[str, Any] = {"method": name, "setting": setting, **where}
        row |= results.spread("ms_to_first_token", [1e3 * t for t in times])
        row |= results.spread("ratio", [t / base for t, base in zip(times, seconds[0], strict=True)])
        text = f"{tokens:>6} tokens {name:<6}{setting:<24}{row['ms_to_first_token']:9.1f} ms to the first token "
        text += f"{row['ratio']:.3f} of dense [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        if asked:
            row |= results.share("retrieval", sum(a[0] for a in asked), CHUNKS * len(given))
            row["retrieval_count"] = CHUNKS * len(given)
            row |= {key: sum(a[at] for a in asked) / len(asked) for at, key in ((1, "nll"), (2, "kl"))}
            text += f" keys {row['retrieval']:.2f} nll {row['nll']:.3f} kl {row['kl']:.4f}"
        table.append(row)
        print(text, flush=True)
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", default="128,448", help="tokens of a chunk, with commas")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="that are computed again, with commas")
    parser.add_argument("--measures", default=",".join(MEASURES), help="by which tokens are chosen, with commas")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--front", type=int, default=0, help=f"chunks in front of all contexts, at most {CHUNKS - 1}")
    parser.add_argument("--rounds", type=int, help="of the times; default: one for each context")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--times", action="store_true", help="measure nothing but times")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="two contexts of short chunks")
    saving(parser)
    options = parser.parse_args()
    if not 0 <= options.front < CHUNKS:
        parser.error(f"--front must be from 0 to {CHUNKS - 1}; got {options.front}")
    if options.quick:
        options.length, options.contexts = "64", 2
    if options.threads:
        torch.set_num_threads(options.threads)
    from benchmarks.zoo import smollm2

    options.name = "smollm2-135m"
    options.shares = [float(share) for share in options.shares.split(",")]
    options.measures = options.measures.split(",")
    model, tokenizer = smollm2.load(getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    maker = Maker(tokenizer)
    for length in options.length.split(","):
        save(measure(model, maker, int(length), options), "reuse", options)


if __name__ == "__main__":
    main()
