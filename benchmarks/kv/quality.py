"""KV-cache policies on SmolLM2-135M or Gemma 3 270M: perplexity, pass-keys, bytes really held, and speed.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/quality --out benchmarks/results/kv.csv --overwrite        # hours on a CPU
    python -m benchmarks kv/quality --quick --out /tmp/kv.csv                          # minutes

Metrics, for every policy and budget:

- ``perplexity`` of the last quarter of windows of the Debian handbook, the first three quarters being the prompt;
- ``retrieval`` of a five-digit key hidden in the handbook, the question asked *after* the context was compressed (the
  fair order) or *before*, as part of the prompt, which flatters scores that look at the last queries;
- ``bytes`` that the cache holds for a sample after the prompt, keys, values, positions and state, measured; those of
  the perplexity's prompts are ``bytes_window``, since these are three quarters as long as the window;
- ``prefill_s`` and ``decode_tokens_per_s``, batch 1 and a left-padded batch of 4 (``--only speed``; an idle machine).

Of Gemma's layers three of eighteen attend to everything, and on these alone policies act; the others hold a window of
511 rows, which is counted in ``bytes``. Each of its texts begins with the token that it wants there::

    python -m benchmarks.zoo.fetch gemma3 handbook
    python -m benchmarks kv/quality --model gemma3-270m --policies snapkv --budgets 0.25,0.125 --store "kivi bits=4"

Prompts are read once for all policies. Budgets are shares of the prompt. Batch 4 is padded on the left, each row more
than the one before; its quality is measured at a quarter of the cache. bfloat16, the default, wants a CPU that has
instructions for it; ``--dtype float32`` gives the same perplexities to a quarter of a percent.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from benchmarks.engine import threads
from benchmarks.kv import feed
from benchmarks.kv.feed import held_bytes
from benchmarks.kv.haystacks import DEPTHS, Haystack, begin_of, haystacks
from benchmarks.saving import known, save, saving
from benchmarks.zoo import data, gemma3, smollm2
from tokred import kv
from tokred.bench import results, timing
from tokred.bench.arms import BASE, Arm, typed
from tokred.core.registry import methods

BUDGETS = (0.5, 0.25, 0.125, 0.05)

# Settings of small windows: a twentieth of a prompt of 1,024 tokens has to hold them.
POLICIES: dict[str, Callable[[float], Any]] = {
    "streaming_llm": lambda b: tokred.make("streaming_llm", budget=b),
    "h2o": lambda b: tokred.make("h2o", budget=b),
    "tova": lambda b: tokred.make("tova", budget=b),
    "keyformer": lambda b: tokred.make("keyformer", budget=b),
    "zeromerge": lambda b: tokred.make("zeromerge", budget=b),
    "snapkv": lambda b: tokred.make("snapkv", budget=b, window=32),
    "pyramidkv": lambda b: tokred.make("pyramidkv", budget=b, window=32),
    "adakv": lambda b: tokred.make("adakv", budget=b, score=kv.Window(32)),
    "criticalkv": lambda b: tokred.make("criticalkv", budget=b, score=kv.Window(32)),
    "cake": lambda b: tokred.make("cake", budget=b),
    "squeezeattention": lambda b: tokred.make("squeezeattention", budget=b),
    "observed_attention": lambda b: tokred.make("observed_attention", budget=b),
    "expected_attention": lambda b: tokred.make("expected_attention", budget=b),
    "kvzip": lambda b: tokred.make("kvzip", budget=b),
    "knorm": lambda b: tokred.make("knorm", budget=b),
    "keydiff": lambda b: tokred.make("keydiff", budget=b, turns=False),
    "lagkv": lambda b: tokred.make("lagkv", budget=b, lag=64),
    # From experiments/kv_search. Merged rows carry weights, so fewer rows make up the bytes of the others.
    "composed": lambda b: tokred.KVPolicy(score=kv.Reconstruction(), budget=kv.Global(0.93 * b), fate=kv.Merge()),
    "random_evict": lambda b: tokred.make("random_evict", budget=b, sinks=4, recent=32),
}
# Presets that have a budget and no settings above: with their defaults. "kv" is what "composed" is made by.
POLICIES |= {
    name: lambda b, name=name: tokred.make(name, budget=b)
    for name, cls in methods.of("cache").items()
    if name not in {*POLICIES, "kv"} and "budget" in (cls.nothing or {})
}


PARTS = ("perplexity", "retrieval", "padded")
ANSWER = 8  # tokens that hold a key and a space
LOGITS = 1 << 28  # that are made at once, of 4 bytes each


class Setting(NamedTuple):
    """How much is measured.

    Attributes:
        window: tokens of a perplexity window.
        windows: how many of them, a batch.
        lengths: contexts that a key is hidden in.
        keys: keys for each length and depth.
        timed: tokens decoded for a speed.
        timed_window: tokens of the prompt before them.
        chunk: tokens that are fed at once to policies that evict at every step; 1 is exact.
    """

    window: int = 4096
    windows: int = 3
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    keys: int = 5
    timed: int = 32
    timed_window: int = 2048
    chunk: int = 8


MODELS: dict[str, Callable[..., tuple[Any, Any]]] = {"smollm2-135m": smollm2.load, "gemma3-270m": gemma3.load}
QUICK = Setting(window=512, windows=2, lengths=(512,), keys=2, timed=8, timed_window=256, chunk=32)


def arms(names: Sequence[str], budgets: Sequence[float]) -> list[Arm]:
    """The unpatched model, and every policy at every budget."""
    every = [Arm(n, f"budget={b:g}", POLICIES[n](b)) for n in names for b in budgets]
    return [Arm(BASE, ""), *every]


def stepwise(arm: Arm) -> bool:
    """Whether rows go while tokens are generated."""
    policy: Any = arm.method
    return policy is not None and bool(policy.parts.when.every)


class Found(NamedTuple):
    """One number of one arm: a sum over ``count`` tokens or keys, and the sum of squares where it has an interval."""

    arm: Arm
    measure: str
    asked: str
    batch: int
    length: int
    value: float
    count: int
    squares: float = 0.0


@torch.inference_mode()
def retrieval(
    model: Any, tokenizer: Any, group: list[Haystack], arms: list[Arm], *, padded: bool = False
) -> Iterator[Found]:
    """Share of keys that greedy answers begin with; the question comes after the context was compressed, or before, as
    its end.

    Args:
        group: contexts of one length, a batch.
        padded: rows lose up to 9 % of their context at the front, each more than the one before, and are padded there;
            the keys stand behind that.
    """
    whole = torch.stack([torch.cat([h.context, h.question]) for h in group])
    mask = torch.ones_like(whole) if padded else None
    if mask is not None:
        for i in range(1, len(group)):
            mask[i, : i * whole.shape[1] * 9 // (100 * (len(group) - 1))] = 0
            whole[i][mask[i] == 0] = 0
    length = whole.shape[1]
    n, batch = len(group[0].context), len(group) if padded else 1
    prompt, last = feed.read(model, whole, mask)
    for arm in arms:
        for asked in ("after", "before"):
            with patched(model, arm.method):
                cache = prompt.fill(tokred.kv_cache(model), n, rest=0 if asked == "after" else length - n)
                if asked == "after":
                    yield Found(arm, "bytes", "", batch, length, held_bytes(cache), len(group))
                    logits = _forward(model, whole[:, n:], cache, mask)
                else:
                    logits = last
                right = greedy(model, tokenizer, logits, cache, mask, [h.key for h in group])
            yield Found(arm, "retrieval", asked, batch, length, right, len(group))


@torch.inference_mode()
def perplexity(
    model: Any, windows: Tensor, arms: list[Arm], *, chunk: int = 8, cut: float = 0.75, padded: bool = False
) -> Iterator[Found]:
    """Negative log-likelihood of the last quarter of each window, given the compressed rest.

    Args:
        windows: ``[B, N]``.
        chunk: tokens that are fed at once to policies that evict at every step; 1 is exact, more lets each token see
            up to as many rows more than the budget.
        cut: share of the window that is the prompt.
        padded: rows begin up to a third of the prompt later, each more than the one before, and are padded there.
    """
    b, length = windows.shape
    n = int(length * cut)
    mask = torch.ones_like(windows) if padded else None
    if mask is not None:
        for i in range(1, b):
            mask[i, : i * n // (3 * b)] = 0
    prompt, _ = feed.read(model, windows, mask)
    target = windows[:, n:]
    most = max(1, LOGITS // (b * model.config.vocab_size))
    for arm in arms:
        with patched(model, arm.method):
            cache = prompt.fill(tokred.kv_cache(model), n - 1)
            held = held_bytes(cache)
            total, squares, at = 0.0, 0.0, n - 1
            while at < length - 1:
                step = min(chunk if stepwise(arm) else most, length - 1 - at)
                logits = _forward(model, windows[:, at : at + step], cache, mask, keep=0)
                goal = target[:, at - n + 1 : at - n + 1 + step]
                losses = F.cross_entropy(logits.flatten(0, 1).float(), goal.flatten(), reduction="none").double()
                total, squares = total + float(losses.sum()), squares + float(losses.square().sum())
                at += step
        yield Found(arm, "nll", "", b if padded else 1, length, total, target.numel(), squares)
        yield Found(arm, "bytes_window", "", b if padded else 1, length, held, b)


def _forward(model: Any, ids: Tensor, cache: Any, mask: Tensor | None, keep: int = 1) -> Tensor:
    seen = cache.get_seq_length()
    given: dict[str, Any] = {}
    if mask is not None:
        all_of_it = F.pad(mask[:, : seen + ids.shape[1]], (0, max(0, seen + ids.shape[1] - mask.shape[1])), value=1)
        positions = (all_of_it.cumsum(1) - 1).clamp(min=0)[:, seen:]
        given = {"attention_mask": all_of_it, "position_ids": positions}
    return model(ids, past_key_values=cache, logits_to_keep=keep, **given).logits


def greedy(model: Any, tokenizer: Any, logits: Tensor, cache: Any, mask: Tensor | None, keys: list[str]) -> int:
    """How many answers begin with their key; stops when no other can."""
    said: list[Tensor] = []
    while True:
        said.append(logits[:, -1].argmax(-1))
        texts = [tokenizer.decode(row).strip() for row in torch.stack(said, 1)]
        right = sum(text.startswith(key) for text, key in zip(texts, keys, strict=True))
        open_ = any(key.startswith(text) and key != text for text, key in zip(texts, keys, strict=True))
        if len(said) == ANSWER or not open_:
            return right
        logits = _forward(model, said[-1][:, None], cache, mask)


def patched(model: Any, method: Any) -> Any:
    """A model under a policy until a ``with`` ends; None: the unpatched one."""
    # Its cache is filled like the others, by a policy that keeps everything.
    return tokred.applied(model, tokred.make("snapkv", budget=1.0) if method is None else method)


def run(
    model: Any, tokenizer: Any, text: Tensor, every: list[Arm], setting: Setting, parts: Sequence[str] = PARTS
) -> Iterator[list[Found]]:
    """Some of :data:`PARTS`; the numbers of each length come together, so that none has to be written again."""
    started = time.monotonic()

    def told(what: str, found: Iterable[Found]) -> list[Found]:
        numbers = list(found)
        print(f"{time.monotonic() - started:6.0f} s  {what}", file=sys.stderr, flush=True)
        return numbers

    def keys(length: int, count: int, chosen: list[Arm], padded: bool) -> list[Found]:
        found = []
        for depth, group in zip(DEPTHS, haystacks(tokenizer, text, length, count, int(padded)), strict=True):
            what = f"retrieval {length} at {depth}{', padded' * padded}"
            found += told(what, retrieval(model, tokenizer, group, chosen, padded=padded))
        return found

    windows = text[: setting.windows * setting.window].view(setting.windows, setting.window).clone()
    begin = begin_of(tokenizer)
    windows[:, : len(begin)] = begin
    if "perplexity" in parts:
        yield told("perplexity", perplexity(model, windows, every, chunk=setting.chunk))
    for length in setting.lengths if "retrieval" in parts else ():
        yield keys(length, setting.keys, every, False)
    if "padded" in parts:
        quarter = [arm for arm in every if arm.setting in ("", "budget=0.25")]
        yield told("perplexity, padded batch", perplexity(model, windows, quarter, chunk=setting.chunk, padded=True))
        yield keys(setting.lengths[len(setting.lengths) // 2], 4, quarter, True)


def records(found: Iterable[Found], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Sums over prompts as records of results."""
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for f in found:
        total = sums[(f.arm.name, f.arm.setting, f.measure, f.asked, f.batch, f.length)]
        for i, part in enumerate((f.value, f.count, f.squares)):
            total[i] += part
    rows = []
    for (name, setting, measure, asked, batch, length), (value, count, squares) in sums.items():
        row = {"method": name, "setting": setting, "asked": asked, "length": length, "batch": batch, **where}
        average, n = value / count, int(count)
        if measure == "nll":
            error = math.sqrt(max(0.0, squares / n - average**2) / n)
            ends = results.mean("perplexity", average, error)
            row |= {k: math.exp(v) for k, v in ends.items()} | {"tokens_scored": n}
        elif measure == "retrieval":
            row |= {**results.share("retrieval", int(value), n), "keys": n}
        else:
            row |= {measure: round(average), "prompts": n}
        rows.append(row)
    return rows


def timings(model: Any, text: Tensor, every: list[Arm], setting: Setting, where: dict[str, Any]) -> Iterator[dict]:
    """Records with seconds in them."""
    for arm in every:
        for batch in (1, 4):
            with arm.applied(model):
                prefill, decode, held = speed(model, text, arm, batch, setting)
            row = {"method": arm.name, "setting": arm.setting, "length": setting.timed_window, "batch": batch, **where}
            row |= {"prefill_s": prefill, "decode_tokens_per_s": decode, "bytes_timed": held}
            yield row | {"tokens_timed": setting.timed}


@torch.inference_mode()
def speed(model: Any, ids: Tensor, arm: Arm, batch: int, setting: Setting) -> tuple[float, float, float]:
    """Seconds of the prompt, tokens a second after it, and bytes of a sample after the prompt."""
    from transformers import DynamicCache

    n, device = setting.timed_window, ids.device
    rows = ids[: n * batch].view(batch, n)
    mask = torch.ones_like(rows)
    for i in range(1, batch):
        mask[i, : i * n // (2 * batch)] = 0  # padded on the left, each sample more than the one before
    cache = DynamicCache(config=model.config) if arm.method is None else tokred.kv_cache(model)
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def read(step: Tensor) -> Tensor:
        given = {"attention_mask": mask} if batch > 1 else {}
        out = model(step, position_ids=position, past_key_values=cache, logits_to_keep=1, **given)
        return out.logits[:, -1:].argmax(-1)

    prefill, step = timing.seconds_of(lambda: read(rows), device)
    held, times, position = held_bytes(cache) / batch, [], position[:, -1:]
    for _ in range(setting.timed):
        position, mask = position + 1, torch.cat([mask, torch.ones_like(step)], 1)
        seconds, step = timing.seconds_of(lambda step=step: read(step), device)  # type: ignore[misc]
        times.append(seconds)
    return prefill, batch / timing.spread(times).median, held


def main() -> None:
    """Measure, and write the numbers of each length when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short windows, few keys")
    parser.add_argument("--only", choices=(*PARTS, "speed"), help="a part of the work")
    parser.add_argument("--model", default="smollm2-135m", choices=tuple(MODELS))
    parser.add_argument("--store", action="append", default=[], help='such as "kivi bits=4"; as often as needed')
    parser.add_argument("--window", type=int, help="tokens of a perplexity window")
    parser.add_argument("--keys", type=int, help="for each length and depth")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, with commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="shares, with commas")
    parser.add_argument("--lengths", help="contexts of the keys, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--device", default="cpu")
    saving(parser)
    arguments = parser.parse_args()
    names = [n for n in arguments.policies.split(",") if n]
    known(parser, "policies", names, POLICIES)
    threads(arguments.threads)
    setting = QUICK if arguments.quick else Setting()
    if arguments.lengths:
        setting = setting._replace(lengths=tuple(map(int, arguments.lengths.split(","))))
    if arguments.window:
        setting = setting._replace(window=arguments.window)
    if arguments.keys:
        setting = setting._replace(keys=arguments.keys)
    model, tokenizer = MODELS[arguments.model](dtype=getattr(torch, arguments.dtype))
    model.to(arguments.device)
    prose = tokenizer(data.handbook()[:400_000], return_tensors="pt", add_special_tokens=False)
    text = prose.input_ids[0].to(arguments.device)
    every = arms(names, [float(b) for b in arguments.budgets.split(",")])
    every += map(typed, arguments.store)
    where = {"model": arguments.model, **results.here(arguments.device, arguments.dtype)}
    parts = (arguments.only,) if arguments.only else PARTS
    # Pages that are made of the first model's rows are not to find the other's among them.
    scenario = "quality" if arguments.model == "smollm2-135m" else f"quality-{arguments.model}"
    for numbers in run(model, tokenizer, text, every, setting, parts):
        save(records(numbers, where), scenario, arguments)
    for row in timings(model, text, every, setting, where) if arguments.only in (None, "speed") else ():
        print(row["method"], row["setting"], f"{row['decode_tokens_per_s']:.2f} tokens/s", file=sys.stderr, flush=True)
        save([row], scenario, arguments)


if __name__ == "__main__":
    main()
