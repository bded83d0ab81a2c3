"""Perplexity and pass-key retrieval over compressed caches; prompts are read once for all policies."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from benchmarks.kv import prompt as kv_prompt
from benchmarks.kv.arms import Arm, held_bytes

DEPTHS = (0.1, 0.35, 0.6, 0.85)
QUESTION = " What is the pass key? The pass key is"
PARTS = ("perplexity", "retrieval", "padded")
ANSWER = 8  # tokens that hold a key and a space


class Found(NamedTuple):
    """One number of one arm: ``value`` is a sum over ``count`` tokens or keys."""

    arm: Arm
    measure: str
    asked: str
    batch: int
    length: int
    value: float
    count: int


class Haystack(NamedTuple):
    """A context with a key in it."""

    context: Tensor
    question: Tensor
    key: str


def haystacks(tokenizer: Any, text: Tensor, length: int, keys: int, seed: int = 0) -> list[list[Haystack]]:
    """For each depth ``keys`` contexts of ``length`` tokens, question included."""
    rng = random.Random(length + 1_000_003 * seed)
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False).input_ids[0]
    found = []
    for depth in DEPTHS:
        group = []
        for _ in range(keys):
            key = str(rng.randrange(10000, 100000))
            needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
            hidden = tokenizer(needle, return_tensors="pt", add_special_tokens=False).input_ids[0]
            room = length - len(hidden) - len(question)
            start = rng.randrange(0, len(text) - room)
            straw, cut = text[start : start + room], int(room * depth)
            group.append(Haystack(torch.cat([straw[:cut], hidden, straw[cut:]]), question, key))
        found.append(group)
    return found


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
    prompt, last = kv_prompt.read(model, whole, mask)
    for arm in arms:
        for asked in ("after", "before"):
            with _patched(model, arm):
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
    prompt, _ = kv_prompt.read(model, windows, mask)
    target = windows[:, n:]
    for arm in arms:
        with _patched(model, arm):
            cache = prompt.fill(tokred.kv_cache(model), n - 1)
            held = held_bytes(cache)
            total, at = 0.0, n - 1
            while at < length - 1:
                step = min(chunk if arm.stepwise else length, length - 1 - at)
                logits = _forward(model, windows[:, at : at + step], cache, mask, keep=0)
                goal = target[:, at - n + 1 : at - n + 1 + step]
                total += F.cross_entropy(logits.flatten(0, 1).float(), goal.flatten(), reduction="sum").item()
                at += step
        yield Found(arm, "nll", "", b if padded else 1, length, total, target.numel())
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


def _patched(model: Any, arm: Arm) -> Any:
    # The unpatched model's cache is filled like the others, by a policy that keeps everything.
    return tokred.applied(model, arm.policy if arm.policy is not None else tokred.make("snapkv", budget=1.0))


def run(
    model: Any,
    tokenizer: Any,
    text: Tensor,
    arms: list[Arm],
    setting: Any,
    say: Callable[[str], None],
    parts: Sequence[str] = PARTS,
) -> Iterator[list[Found]]:
    """Some of :data:`PARTS`, a list of numbers for each prompt."""
    started = time.perf_counter()

    def told(what: str, found: Iterator[Found]) -> list[Found]:
        numbers = list(found)
        say(f"{time.perf_counter() - started:6.0f} s  {what}")
        return numbers

    windows = text[: setting.windows * setting.window].view(setting.windows, setting.window)
    if "perplexity" in parts:
        yield told("perplexity", perplexity(model, windows, arms, chunk=setting.chunk))
    for length in setting.lengths if "retrieval" in parts else ():
        for depth, group in zip(DEPTHS, haystacks(tokenizer, text, length, setting.keys), strict=True):
            yield told(f"retrieval {length} at {depth}", retrieval(model, tokenizer, group, arms))
    if "padded" in parts:
        quarter = [a for a in arms if a.policy is None or a.budget == 0.25]
        yield told("perplexity, padded batch", perplexity(model, windows, quarter, chunk=setting.chunk, padded=True))
        length = setting.lengths[len(setting.lengths) // 2]
        for depth, group in zip(DEPTHS, haystacks(tokenizer, text, length, 4, seed=1), strict=True):
            found = retrieval(model, tokenizer, group, quarter, padded=True)
            yield told(f"retrieval {length} at {depth}, padded", found)
