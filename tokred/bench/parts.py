"""The time of the parts of a run: tower, encoder, selection, prompt, decoding, denoiser, and the rest.

Hooks on the model's own modules write down when each part begins and ends; a part inside another one counts for itself
alone, so that all of them add up to the whole. On CUDA events are recorded instead, so that nothing is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokred import adapters
from tokred.bench.timing import entering
from tokred.core.method import Method
from tokred.errors import UnsupportedModelError
from tokred.kv.engine import Engine as CacheEngine

PARTS = ("tower", "encoder", "selection", "prompt", "decode", "denoiser", "rest")
SELECTION, PROMPT, DECODE, REST = "selection", "prompt", "decode", "rest"
TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states")


class Parts:
    """Seconds by part of the run at hand.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stack: list[str] = []
        self.marks: list[tuple[str, Any]] = []

    def _mark(self) -> None:
        """Write down that from now on the part on top of the stack is at work."""
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        self.marks.append((self.stack[-1] if self.stack else REST, now))

    def begin(self) -> None:
        """A run begins."""
        self.stack, self.marks = [], []
        self._mark()

    def end(self) -> list[tuple[str, Any]]:
        """The marks of the run, which ends."""
        self.stack = []
        self._mark()
        return self.marks

    def seconds(self, marks: Sequence[tuple[str, Any]]) -> dict[str, float]:
        """Seconds of each part, by the marks of a run."""
        if self.cuda:
            marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (part, start), (_, stop) in pairwise(marks):
            spent = start.elapsed_time(stop) / 1000 if self.cuda else stop - start
            found[part] = found.get(part, 0.0) + spent
        return found

    def push(self, part: str) -> None:
        """A part begins. What a method runs of the model, to select, belongs to the selection."""
        self.stack.append(SELECTION if SELECTION in self.stack else part)
        self._mark()

    def pop(self) -> None:
        """The part ends."""
        if self.stack:  # an error has ended a run, whose hooks still come
            self.stack.pop()
            self._mark()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A part that lasts as long as this."""
        self.push(part)
        try:
            yield
        finally:
            self.pop()

    @contextmanager
    def watching(self, roles: Sequence[tuple[nn.Module, str]], methods: Sequence[Method]) -> Iterator[None]:
        """Watch modules with their parts, and the decisions of methods, while this lasts.

        Args:
            roles: modules; the part ``"prompt"`` is that of a decoder, whose single tokens are decoding.
            methods: that act on the model meanwhile.
        """
        handles = []
        for module, part in roles:
            before = self._decoder() if part == PROMPT else self._other(part)
            # Hooks that come last, so that whatever the model's own do is a part of it as well.
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(lambda *_: self.pop(), always_call=True))
        with ExitStack() as stack:
            for owner, name in _deciders(methods):
                stack.enter_context(entering(owner, name, lambda: self.within(SELECTION)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _other(self, part: str) -> Callable[..., None]:
        return lambda *_: self.push(part)

    def _decoder(self) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [kwargs.get(name) for name in TOKENS] + [*args]
            width = next((x.shape[1] for x in given if isinstance(x, Tensor) and x.ndim > 1), 0)
            begun = any(part == PROMPT for part, _ in self.marks)
            self.push(DECODE if begun and width == 1 else PROMPT)

        return before


def _deciders(methods: Sequence[Method]) -> list[tuple[Any, str]]:
    """Functions in which methods decide, each once."""
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for method in methods:
        if method.stage == "cache":
            # Not above: these need transformers, which other kinds of model are measured without.
            from tokred.adapters.kv import hooks

            pairs: list[tuple[Any, str]] = [(CacheEngine, "observe"), (CacheEngine, "finish"), (hooks, "repeat")]
        else:
            pairs = [(type(method), "reduce")]
        found |= {(id(owner), name): (owner, name) for owner, name in pairs}
    return [*found.values()]


def roles(model: Any, target: nn.Module, run: str) -> list[tuple[nn.Module, str]]:
    """Modules of a model that have a part of their own in a kind of run.

    Args:
        model: the unpatched model.
        target: the module in it that methods act on.
        run: the name of the run.
    """
    if run == "pipeline":
        return [(target, "denoiser")]
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if both:
        return [(model.get_encoder(), "encoder"), (model.get_decoder(), PROMPT)]
    found: list[tuple[nn.Module, str]] = []
    for stage, names in (("projector", ("tower", "language")), ("cache", ("decoder",))):
        try:
            host: Any = adapters.find(target, stage)
        except UnsupportedModelError:
            continue
        if stage == "projector":
            return [(host.core.get_submodule(host.facts.tower), "tower"), (host.language, PROMPT)]
        found.append((getattr(host, names[0]), PROMPT))
    return found
